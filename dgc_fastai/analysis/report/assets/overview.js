"use strict";
// Several runs: accuracy against cost, training side by side, a table.

function frontChart(cost) {
  const {name, unit, scale, note} = cost, groups = data.groups.filter(group => known(group.top_1) && known(group[cost.key]));
  if (!groups.length) return null;
  const front = new Set(data.fronts[cost.key]);
  const points = groups.map(group => ({...group, x: group[cost.key] * scale, y: 100 * group.top_1, e: 100 * (group.error || 0), best: front.has(group.label)}));
  const line = d3.sort(points.filter(point => point.best), point => point.x);
  const dense = [...new Set(data.runs.map(cost.dense).filter(known).map(value => Number((value * scale).toPrecision(3))))];
  const xs = [...points.map(point => point.x), ...(dense.length === 1 ? dense : [])], pad = 0.08 * (d3.max(xs) - d3.min(xs) || d3.max(xs) || 1);
  const low = d3.min(points, point => point.y - point.e), high = d3.max(points, point => point.y + point.e), room = 0.1 * (high - low || 1);
  const middle = (d3.min(xs) + d3.max(xs)) / 2;
  const draw = width => Plot.plot(base(width, 330, {marginRight: 20, marginTop: 24, x: {domain: [Math.max(0, d3.min(xs) - pad), d3.max(xs) + pad]}, y: {domain: [Math.max(0, low - room), Math.min(100, high + room)], nice: false}, marks: [
    gridY({ticks: 6}), axisY({ticks: 6}), axisX({label: `${name} (${unit})`, ticks: Math.max(3, width / 90)}),
    dense.length === 1 && Plot.ruleX(dense, {stroke: "var(--plain)", strokeDasharray: "3,3"}),
    dense.length === 1 && Plot.text(dense, {x: value => value, text: () => "dense", frameAnchor: "top", dy: -14, fill: "var(--muted)"}),
    Plot.line(line, {x: "x", y: "y", stroke: "var(--accent)", strokeOpacity: .45, strokeWidth: 1.5}),
    Plot.ruleX(points.filter(point => point.e), {x: "x", y1: point => point.y - point.e, y2: point => point.y + point.e, stroke: point => point.best ? "var(--accent)" : "var(--plain)", strokeWidth: 1.5}),
    Plot.dot(points, {x: "x", y: "y", r: 4.5, fill: point => point.best ? "var(--accent)" : "var(--surface)", stroke: point => point.best ? "var(--accent)" : "var(--plain)", strokeWidth: 1.5}),
    ...(line.length <= 6 ? ["start", "end"] : []).map(side => Plot.text(line.filter(point => (point.x > middle) === (side === "end")), {x: "x", y: "y", text: point => isolated(point.label, 30),
      textAnchor: side, dx: side === "end" ? -10 : 10, dy: side === "end" ? -7 : 9, fill: "var(--ink)", stroke: "var(--page)", strokeWidth: 4})),
    Plot.tip(points, Plot.pointer(tip({x: "x", y: "y", title: point => `${isolated(point.label, 60)}\n${point.y.toFixed(2)} %${point.error ? " \u00b1 " + point.e.toFixed(2) : ""}, ${significant(point.x)} ${unit}`}))),
  ].filter(Boolean)}));
  const columns = [{name: "runs", value: point => point.label}, {name: "top-1 (%)", number: true, value: point => point.y, text: point => point.y.toFixed(2)},
    {name: "standard error", number: true, value: point => point.error, text: point => known(point.error) ? point.e.toFixed(2) : null}, {name: "seeds", number: true, value: point => point.seeds},
    {name: unit, number: true, value: point => point.x, text: point => significant(point.x)}, {name: "Pareto front", value: point => point.best ? "yes" : ""}];
  return chart({title: `Accuracy against ${cost.title}`, draw, columns, rows: points, sub: `Top-1 of the best epoch, in percent. ${note}`,
    text: `Accuracy against ${cost.title} of ${plural(points.length, "setting")}. On the Pareto front, from the cheapest: ${line.map(point => `${isolated(point.label, 60)} with ${point.y.toFixed(2)} % at ${significant(point.x)} ${unit}`).join("; ")}.`});
}

function fronts() {
  const machine = data.machine;
  return [
    frontChart({key: "macs", title: "MACs", name: "multiply-accumulates of one image", unit: "M", scale: 1e-6, dense: run => run.summary.macs_dense, note: "Filled: on the Pareto front. Lines: standard error over seeds."}),
    frontChart({key: "ms", title: "measured latency", name: "one image, deployed", unit: "ms", scale: 1, dense: run => run.dense_ms, note: `Measured on ${machine.processor}, ${plural(machine.threads, "thread")}.`}),
  ];
}

function allCurves(choose) {
  const runs = data.runs.filter(run => (run.history.top_1 || []).some(known));
  if (runs.length < 2) return null;
  const points = runs.flatMap(run => run.history.epoch.map((epoch, index) => ({run, epoch, value: known(run.history.top_1[index]) ? 100 * run.history.top_1[index] : null})).filter(point => known(point.value)));
  const best = d3.greatest(runs, run => run.top_1 ?? -1), last = d3.max(points, point => point.epoch);
  const draw = width => Plot.plot(base(width, 330, {x: {domain: [0, last]}, y: {nice: true, domain: d3.extent(points, point => point.value)}, marks: [
    gridY({ticks: 6}), axisY({ticks: 6}), axisX({label: "epochs", ticks: wholeTicks(0, last, width / 60), tickFormat: "d"}),
    Plot.line(points.filter(point => point.run !== best), {x: "epoch", y: "value", z: point => point.run.id, stroke: "var(--plain)", strokeWidth: 1.25, strokeOpacity: runs.length > 12 ? .45 : .8}),
    Plot.line(points.filter(point => point.run === best), {x: "epoch", y: "value", stroke: "var(--accent)", strokeWidth: 2.25}),
    last === 1 && Plot.dot(points, {x: "epoch", y: "value", fill: "var(--accent)", r: 3}),
    Plot.tip(points, Plot.pointer(tip({x: "epoch", y: "value", title: point => `${isolated(point.run.label, 60)}, seed ${point.run.seed}\nepoch ${point.epoch}: ${point.value.toFixed(2)} %`}))),
  ].filter(Boolean)}));
  return chart({title: "Accuracy while training", wide: true, draw, sub: `Top-1 on validation images, in percent, of ${runs.length} runs.`, legend: [["the best run", "var(--accent)"], ["all others", "var(--plain)"]],
    text: `Validation accuracy of ${runs.length} runs by epoch; the best run is ${isolated(best.name, 90)} with ${percent(best.top_1)}.`,
    rows: runs, columns: [{name: "run", value: run => run.name}, {name: "first epoch (%)", number: true, value: run => run.history.top_1[0], text: run => percent(run.history.top_1[0])},
      {name: "last epoch (%)", number: true, value: run => run.history.top_1.at(-1), text: run => percent(run.history.top_1.at(-1))}, {name: "best (%)", number: true, value: run => run.top_1, text: run => percent(run.top_1)}]});
}

function runTable(choose) {
  const varied = data.keys.slice(0, 8), states = new Set(data.runs.map(run => run.state)), best = run => run.summary.best || {};
  const columns = [
    {name: "run", value: run => run.name, element: run => h("button", {class: "link", type: "button", onclick: () => choose(run.id)}, named(run.short))},
    ...varied.map(key => ({name: key.split(".").at(-1), value: run => Number.isFinite(Number(run.values[key])) ? Number(run.values[key]) : run.values[key], text: run => run.values[key]})),
    {name: "seed", value: run => Number(run.seed), text: run => run.seed, number: true},
    {name: "top-1 (%)", number: true, value: run => run.top_1, text: run => known(run.top_1) ? (100 * run.top_1).toFixed(2) : null},
    {name: "MACs (M)", number: true, value: run => run.macs, text: run => known(run.macs) ? significant(run.macs / 1e6) : null},
    {name: "of dense (%)", number: true, value: run => run.macs / run.summary.macs_dense, text: run => known(run.macs) ? Math.round(100 * run.macs / run.summary.macs_dense) : null},
    {name: "latency (ms)", number: true, value: run => run.ms, text: run => significant(run.ms)},
    {name: "params (M)", number: true, value: run => run.summary.parameters, text: run => known(run.summary.parameters) ? significant(run.summary.parameters / 1e6) : null},
    {name: "epochs", number: true, value: run => run.epochs[0], text: run => run.epochs[0] === run.epochs[1] ? run.epochs[0] : `${run.epochs[0]} of ${run.epochs[1] ?? "?"}`},
    {name: "time", number: true, value: run => run.summary.seconds, text: run => duration(run.summary.seconds)},
    states.size > 1 && {name: "state", value: run => run.state},
  ].filter(Boolean);
  return h("div", {class: "full"}, table(columns, data.runs, {label: "All runs", sort: columns.findIndex(column => column.name === "top-1 (%)")}));
}
