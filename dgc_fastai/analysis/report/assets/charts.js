"use strict";
// Charts of one run: training, cost, latency, classes. Each function returns a figure.

const AXIS = {stroke: "var(--line)", fill: "var(--muted)"};
const base = (width, height, options) => ({width, height, marginTop: 22, marginRight: 16, marginBottom: 42, marginLeft: 44, ...options});
const gridY = (options = {}) => Plot.gridY({stroke: "var(--line)", strokeOpacity: 1, ...options});
const axisX = (options = {}) => Plot.axisX({tickSize: 0, tickPadding: 8, fill: "var(--muted)", stroke: null, labelArrow: "none", labelAnchor: "center", labelOffset: 35, ...options});
const axisY = (options = {}) => Plot.axisY({tickSize: 0, fill: "var(--muted)", stroke: null, labelArrow: "none", label: null, ...options});
const wholeTicks = (low, high, count) => d3.ticks(low, high, Math.max(2, count)).filter(Number.isInteger);
const tip = options => ({fontSize: 12, fill: "var(--surface)", stroke: "var(--line)", ...options});

// curves: [{key, name, color, scale}]. The gates' phases lie behind as bands.
function curves(run, {title, sub, text, lines, zero = false, top = null, format, height = 250}) {
  const history = run.history, epochs = history.epoch || [];
  const there = lines.filter(line => (history[line.key] || []).some(known));
  if (!there.length) return null;
  const points = there.flatMap(line => epochs.map((epoch, index) => ({epoch, name: line.name, color: line.color, value: history[line.key][index]}))
    .filter(point => known(point.value)).map(point => ({...point, value: point.value * (line.scale || 1)})));
  const last = Math.max(...epochs, run.epochs[1] || 1);
  const values = points.map(point => point.value);
  let [low, high] = [zero ? 0 : Math.min(...values), top !== null ? top : Math.max(...values)];
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
  const draw = width => {
    const marks = [];
    if (run.phases) {
      const [begin, end] = run.phases;
      const bands = [{a: 0, b: begin, name: "open"}, {a: begin, b: end, name: "gates closing"}, {a: end, b: last, name: "closed"}];
      marks.push(Plot.rect([bands[1]], {x1: "a", x2: "b", fill: "var(--band)"}));
      const room = width - 60;
      marks.push(Plot.text(bands.filter(band => (band.b - band.a) / last * room > band.name.length * 6.2),
        {x: band => (band.a + band.b) / 2, text: "name", frameAnchor: "top", dy: -14, fill: "var(--muted)", fontSize: 11}));
    }
    marks.push(gridY({ticks: 5}), axisY({ticks: 5, tickFormat: format}), axisX({label: "epochs", ticks: wholeTicks(0, last, width / 60), tickFormat: "d"}),
      Plot.line(points, {x: "epoch", y: "value", z: "name", stroke: point => point.color, strokeWidth: 2, strokeLinejoin: "round"}),
      Plot.dot(points, {x: "epoch", y: "value", fill: point => point.color, r: epochs.length > 40 ? 0 : 2.5}),
      Plot.tip(points, Plot.pointer(tip({x: "epoch", y: "value", title: point => `${point.name}\nepoch ${point.epoch}: ${format ? format(point.value) : significant(point.value)}`}))));
    return Plot.plot(base(width, height, {x: {domain: [0, last], nice: false}, y: {domain: [low, high], nice: top === null}, marks}));
  };
  const columns = [{name: "epoch", value: row => row.epoch, number: true}, ...there.map(line => ({name: line.name, number: true,
    value: row => row[line.key], text: row => known(row[line.key]) ? significant(row[line.key] * (line.scale || 1), 4) : null}))];
  const rows = epochs.map((epoch, index) => Object.fromEntries([["epoch", epoch], ...there.map(line => [line.key, history[line.key][index]])]));
  return chart({title, sub, text, draw, columns, rows, legend: there.length > 1 ? there.map(line => [line.name, line.color]) : null});
}

function trainingCharts(run) {
  const best = run.summary.best || {}, history = run.history;
  const final = key => (history[key] || []).filter(known).at(-1);
  const phases = run.phases ? ` The gates start to close after epoch ${significant(run.phases[0])} and are closed from epoch ${significant(run.phases[1])} on.` : "";
  return [
    curves(run, {title: "Loss", sub: "Cross entropy; in training smoothed, of augmented images.", zero: true,
      text: `Training and validation loss by epoch; at the end ${significant(final("train_loss"))} and ${significant(final("valid_loss"))}.${phases}`,
      lines: [{key: "train_loss", name: "training", color: "var(--plain)"}, {key: "valid_loss", name: "validation", color: "var(--accent)"}]}),
    curves(run, {title: "Accuracy", sub: "Validation images, in percent.",
      text: `Accuracy on validation images by epoch; the best epoch, ${best.epoch}, has ${percent(best.top_1)} top-1.${phases}`,
      lines: [{key: "top_5", name: "top-5", color: "var(--plain)", scale: 100}, {key: "top_1", name: "top-1", color: "var(--accent)", scale: 100}]}),
    run.is_gated && curves(run, {title: "Inactive channels", sub: "Share of channels that a head drops, in percent.", zero: true, top: 100, height: 200,
      text: `Share of inactive channels by epoch; at the end ${percent(final("inactive"), 0)}.`, lines: [{key: "inactive", name: "inactive", color: "var(--second)", scale: 100}]}),
    curves(run, {title: "Learning rate", zero: true, height: 200, text: `Learning rate by epoch, at most ${significant(d3.max(history.lr || [0]))}.`,
      format: value => value ? d3.format(".2~e")(value) : "0", sub: "At the end of each epoch.", lines: [{key: "lr", name: "learning rate", color: "var(--second)"}]}),
  ];
}

function latencyChart(run) {
  const bars = run.latency.flatMap(row => ["deployed", "dense"].filter(kind => row[kind]).map(kind => {
    const per = row.batch, time = row[kind];
    return {batch: row.batch, kind, label: kind === "deployed" ? "this network" : "dense baseline", value: time.median / per, low: time.min / per, high: time.max / per};
  }));
  if (!bars.length) return null;
  const group = row => plural(row.batch, "image") + (row.batch > 1 ? " at once" : "");
  const ratios = run.latency.filter(row => row.dense).map(row => `${significant(row.dense.median / row.deployed.median)} times as fast as the dense baseline for ${group(row)}`);
  const machine = data.machine, place = `${machine.processor}, ${plural(machine.threads, "thread")}, PyTorch ${machine.torch}`;
  const draw = width => Plot.plot(base(width, 44 + 34 * bars.length + 14 * run.latency.length, {marginLeft: 104, marginRight: 62, marginTop: 6,
    x: {domain: [0, d3.max(bars, bar => bar.high)]}, y: {axis: null, padding: .28}, fy: {label: null, padding: .12, axis: null},
    marks: [
      axisX({label: "milliseconds per image", labelOffset: 35, ticks: Math.max(3, width / 110)}), Plot.gridX({stroke: "var(--line)", strokeOpacity: 1, ticks: Math.max(3, width / 110)}),
      Plot.barX(bars, {fy: group, y: "label", x: "value", fill: bar => bar.kind === "deployed" ? "var(--accent)" : "var(--plain)", rx: 2}),
      Plot.ruleY(bars, {fy: group, y: "label", x1: "low", x2: "high", stroke: "var(--ink)", strokeWidth: 1}),
      Plot.text(bars, {fy: group, y: "label", x: "high", text: bar => significant(bar.value) + " ms", textAnchor: "start", dx: 6, fill: "var(--ink)"}),
      Plot.text(bars, {fy: group, y: "label", text: "label", frameAnchor: "left", textAnchor: "end", dx: -8, fill: "var(--muted)"}),
      Plot.text(bars.filter(bar => bar.kind === "dense" || bars.every(other => other.batch !== bar.batch || other.kind === "deployed")), {fy: group, text: group, frameAnchor: "top-left", textAnchor: "start", dx: -100, dy: -4, fill: "var(--ink)", fontWeight: 600}),
    ]}));
  return chart({title: "Latency, deployed", draw, text: `Measured milliseconds per image of the deployed network: ${ratios.join("; ") || "it has no dense baseline"}.`,
    sub: `Median and range, measured when this page was written, on ${place}.`, rows: bars,
    columns: [{name: "network", value: bar => bar.label}, {name: "batch", value: bar => bar.batch, number: true},
      ...[["median", "value"], ["least", "low"], ["most", "high"]].map(([name, key]) => ({name: name + " (ms per image)", number: true, value: bar => bar[key], text: bar => significant(bar[key])}))]});
}

function costChart(run) {
  const layers = run.layers.map((layer, index) => ({...layer, number: index + 1}));
  const largest = d3.greatest(layers, layer => layer.macs), total = d3.sum(layers, layer => layer.macs);
  const isLess = layers.some(layer => layer.macs < layer.macs_dense);
  const draw = width => Plot.plot(base(width, 260, {x: {domain: layers.map(layer => layer.number), padding: .2}, y: {domain: [0, d3.max(layers, layer => Math.max(layer.macs, layer.macs_dense))], nice: true},
    marks: [
      gridY({ticks: 5}), axisY({ticks: 5, tickFormat: value => value ? d3.format("~s")(value) : "0"}),
      axisX({label: "layer, from input to output", ticks: layers.map(layer => layer.number).filter(number => number === 1 || number % Math.max(1, Math.ceil(layers.length / (width / 40) / 5) * 5) === 0)}),
      Plot.barY(layers, {x: "number", y: "macs_dense", fill: "var(--accent-soft)"}),
      Plot.barY(layers, {x: "number", y: "macs", fill: "var(--accent)"}),
      Plot.tip(layers, Plot.pointerX(tip({x: "number", y: layer => Math.max(layer.macs, layer.macs_dense), title: layer => `${layer.number}: ${layer.name}\n${quantity(layer.macs)} of ${quantity(layer.macs_dense)}`}))),
    ]}));
  return chart({title: "Cost by layer", wide: true, draw, sub: "Multiply-accumulates (MACs) for one image, gates included.",
    legend: isLess ? [["this network", "var(--accent)"], ["with ordinary convolutions", "var(--accent-soft)"]] : null,
    text: `Multiply-accumulates of ${plural(layers.length, "layer")}; the costliest is ${largest.name} with ${quantity(largest.macs)}, ${percent(largest.macs / total, 0)} of all.`,
    rows: layers, columns: [{name: "layer", value: layer => layer.number, number: true}, {name: "name", value: layer => layer.name}, {name: "kind", value: layer => layer.kind},
      {name: "output", value: layer => layer.output.join("\u00d7")}, ...[["MACs", "macs"], ["dense MACs", "macs_dense"], ["parameters", "parameters"]].map(([name, key]) => ({name, number: true, value: layer => layer[key], text: layer => layer[key].toLocaleString("en-US")}))]});
}

// The interval of Wilson, 95 %: where the accuracy of a class may lie, given so many images.
function wilson(right, images) {
  const z = 1.96, share = right / images, middle = share + z * z / (2 * images);
  const half = z * Math.sqrt(share * (1 - share) / images + z * z / (4 * images * images));
  return [(middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)];
}

const MAX_CLASSES = 30;

function classChart(evaluation) {
  const all = evaluation.classes.filter(one => one.images).map((one, index) => ({...one, index, share: one.right / one.images, range: wilson(one.right, one.images)}));
  if (!all.length) return null;
  const sorted = d3.sort(all, one => one.share), shown = sorted.slice(0, MAX_CLASSES);
  const few = all.length > shown.length;
  const low = Math.max(0, Math.floor(10 * d3.min(shown, one => one.range[0])) * 10);
  const draw = width => Plot.plot(base(width, 48 + 22 * shown.length, {marginTop: 4, marginLeft: Math.min(130, 26 + 7 * d3.max(shown, one => Math.min(16, [...one.name].length))), marginRight: 12,
    x: {domain: [low, 100]}, y: {domain: shown.map(one => one.index), label: null},
    marks: [
      Plot.gridX({stroke: "var(--line)", strokeOpacity: 1, ticks: Math.max(3, width / 90)}), axisX({label: "accuracy (%)", ticks: Math.max(3, width / 90)}),
      Plot.axisY({tickSize: 0, tickFormat: index => isolated(all[index].name, 16), fill: "var(--ink)", label: null}),
      Plot.ruleX([100 * evaluation.top_1], {stroke: "var(--muted)", strokeDasharray: "3,3"}),
      Plot.ruleY(shown, {y: "index", x1: one => 100 * one.range[0], x2: one => 100 * one.range[1], stroke: "var(--accent-soft)", strokeWidth: 5, strokeLinecap: "round"}),
      Plot.dot(shown, {y: "index", x: one => 100 * one.share, fill: "var(--accent)", r: 4}),
      Plot.tip(shown, Plot.pointerY(tip({y: "index", x: one => 100 * one.share, title: one => `${isolated(one.name, 40)}\n${one.right} of ${one.images} right, ${percent(one.share, 1)}`}))),
    ]}));
  return chart({title: "Accuracy by class", draw, rows: sorted,
    sub: (few ? `The ${MAX_CLASSES} lowest of ${all.length} classes. ` : "Lowest first. ") + "Bars: 95 % interval for this number of images. Dashed: all images.",
    text: `Accuracy of ${plural(all.length, "class", "classes")}, from ${percent(sorted[0].share, 1)} for ${isolated(sorted[0].name)} to ${percent(sorted.at(-1).share, 1)} for ${isolated(sorted.at(-1).name)}.`,
    columns: [{name: "class", value: one => one.name}, {name: "images", value: one => one.images, number: true}, {name: "right", value: one => one.right, number: true},
      {name: "accuracy", number: true, value: one => one.share, text: one => percent(one.share, 1)}]});
}

function confusionChart(evaluation) {
  const {matrix, classes, confusions} = evaluation;
  const columns = [{name: "true", value: one => one.true}, {name: "taken for", value: one => one.predicted}, {name: "images", value: one => one.images, number: true}];
  if (!matrix) {
    if (!confusions.length) return null;
    return h("figure", {class: "chart", "aria-labelledby": "confusions"}, h("h3", {id: "confusions"}, "Most frequent confusions"), table(columns, confusions, {label: "Most frequent confusions", sort: 2}));
  }
  const cells = matrix.flatMap((row, i) => row.map((count, j) => ({i, j, count, share: count / (d3.sum(row) || 1)}))).filter(cell => cell.count);
  const numbers = d3.range(classes.length), wrong = d3.sum(cells, cell => cell.i === cell.j ? 0 : cell.count);
  const draw = width => {
    const long = d3.max(classes, one => Math.min(14, [...one.name].length)), left = 26 + 7 * long, turned = long > 3;
    const side = Math.min((width - left - 8) / classes.length, 44), bottom = turned ? 30 + 6 * long : 40;
    const name = number => isolated(classes[number].name, 14);
    return Plot.plot(base(Math.ceil(left + 8 + side * classes.length), Math.ceil(24 + bottom + side * classes.length), {marginTop: 24, marginLeft: left, marginRight: 8, marginBottom: bottom,
      x: {domain: numbers, padding: .04}, y: {domain: numbers, padding: .04},
      marks: [
        Plot.axisX({tickSize: 0, tickFormat: name, tickRotate: turned ? -60 : 0, fill: "var(--ink)", label: null}),
        Plot.axisY({tickSize: 0, tickFormat: name, fill: "var(--ink)", label: null}),
        Plot.text(["predicted \u2192"], {frameAnchor: "top", dy: -18, fill: "var(--muted)"}),
        Plot.text(["\u2193 true"], {frameAnchor: "top-left", dx: -left + 4, dy: -18, textAnchor: "start", fill: "var(--muted)"}),
        Plot.cell(numbers.flatMap(i => numbers.map(j => ({i, j}))), {x: "j", y: "i", fill: "var(--band)"}),
        Plot.cell(cells, {x: "j", y: "i", fill: cell => cell.i === cell.j ? "var(--accent)" : "var(--second)", fillOpacity: {value: cell => cell.i === cell.j ? .15 + .45 * cell.share : Math.min(1, .25 + 1.5 * cell.share), scale: null}}),
        side > 17 && Plot.text(cells, {x: "j", y: "i", text: "count", fill: "var(--ink)", fontSize: side > 26 ? 12 : 10}),
        Plot.tip(cells, Plot.pointer(tip({x: "j", y: "i", title: cell => `${name(cell.i)}${cell.i === cell.j ? "" : " taken for " + name(cell.j)}\n${plural(cell.count, "image")}, ${percent(cell.share, 1)}`}))),
      ].filter(Boolean)}));
  };
  const first = confusions[0];
  return chart({title: "Confusion matrix", draw, sub: "Number of images. Rows: true class; columns: what the network said.", columns, rows: confusions.length ? confusions : null,
    text: `Confusion matrix of ${evaluation.images} images, of which ${wrong} are wrong` + (first ? `; the most frequent confusion is ${isolated(first.true)} taken for ${isolated(first.predicted)}, ${plural(first.images, "image")}.` : ".")});
}

function mistakes(evaluation) {
  if (!evaluation.mistakes.length) return h("p", {class: "note"}, "There is none: every validation image is right.");
  return h("div", {class: "mistakes"}, evaluation.mistakes.map(one => h("figure", null,
    h("img", {src: one.picture, class: one.side <= 48 && "small", alt: `${one.name}: ${one.true}, taken for ${one.predicted}`}),
    h("figcaption", null, h("div", {class: "said"}, named(one.predicted), " ", percent(one.probability, 1)), h("div", null, "is ", named(one.true)), h("div", {class: "file"}, named(one.name))))));
}
