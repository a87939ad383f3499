"use strict";
// What the gates select: from gates.json.

function gateSection(run) {
  const gates = run.gates, layers = gates.layers.map((layer, index) => ({...layer, number: index + 1}));
  if (!layers.length) return [];
  return [
    gates.verdict && h("div", {class: "callout"}, gates.verdict.map(line => h("p", null, named(line)))),
    h("div", {class: "grid"}, selectionChart(layers), usageChart(layers), gates.controls && controlChart(gates.controls), classUsage(gates, layers)),
  ];
}

const layerAxis = (layers, width) => axisX({label: "DGC layer, from input to output", ticks: wholeTicks(1, layers.length, width / 50), tickFormat: "d"});

function selectionChart(layers) {
  const lines = [{key: "usage_entropy", name: "varies by image", color: "var(--accent)"}, {key: "class_share", name: "share of this that the class explains", color: "var(--second)"}]
    .filter(line => layers.some(layer => known(layer[line.key])));
  const points = lines.flatMap(line => layers.filter(layer => known(layer[line.key])).map(layer => ({...line, layer, value: 100 * layer[line.key]})));
  const draw = width => Plot.plot(base(width, 250, {x: {domain: [.5, layers.length + .5]}, y: {domain: [0, 100]}, marks: [
    gridY({ticks: 5}), axisY({ticks: 5}), layerAxis(layers, width),
    Plot.line(points, {x: point => point.layer.number, y: "value", z: "name", stroke: point => point.color, strokeWidth: 1.5, strokeOpacity: .5}),
    Plot.dot(points, {x: point => point.layer.number, y: "value", fill: point => point.color, r: 3.5}),
    Plot.tip(points, Plot.pointer(tip({x: point => point.layer.number, y: "value", title: point => `${point.layer.name}\n${point.name}: ${point.value.toFixed(1)} %`}))),
  ]}));
  const mean = d3.mean(layers, layer => layer.usage_entropy);
  return chart({title: "Does the selection depend on the image?", draw, legend: lines.map(line => [line.name, line.color]),
    sub: "In percent. 0: every image gets the same channels; 100: every channel is kept as often as any other.",
    text: `How much the selection varies over images, by layer: ${percent(mean, 0)} on average, from ${percent(d3.min(layers, layer => layer.usage_entropy), 0)} to ${percent(d3.max(layers, layer => layer.usage_entropy), 0)}.`,
    rows: layers, columns: [{name: "layer", value: layer => layer.number, number: true}, {name: "name", value: layer => layer.name},
      ...[["kept", "kept_share"], ["varies", "usage_entropy"], ["by class", "class_share"], ["common to two heads", "overlap_heads"], ["common to two images", "overlap_images"],
        ["same class", "overlap_same_class"], ["other class", "overlap_different_class"]].map(([name, key]) => ({name, number: true, value: layer => layer[key], text: layer => percent(layer[key], 1)})),
      ...[["mean gate", "gate_mean"], ["spread", "gate_std"]].map(([name, key]) => ({name, number: true, value: layer => layer[key], text: layer => significant(layer[key])}))]});
}

const USES = [["never", "for no image", "var(--plain)"], ["some", "for some images", "var(--accent-soft)"], ["always", "for every image", "var(--accent)"]];

function usageChart(layers) {
  const total = layer => d3.sum(USES, ([key]) => layer.inputs[key]) || 1;
  const bars = layers.flatMap(layer => USES.map(([key, name, color]) => ({number: layer.number, key, name, color, share: 100 * layer.inputs[key] / total(layer)})));
  const mean = key => d3.mean(bars.filter(bar => bar.key === key), bar => bar.share) / 100;
  const draw = width => Plot.plot(base(width, 250, {x: {domain: layers.map(layer => layer.number), padding: .15}, y: {domain: [0, 100]}, marks: [
    gridY({ticks: 5}), axisY({ticks: 5}), axisX({label: "DGC layer, from input to output", ticks: wholeTicks(1, layers.length, width / 50)}),
    Plot.barY(bars, {x: "number", y: "share", fill: bar => bar.color, order: null}),
    Plot.tip(layers, Plot.pointerX(tip({x: "number", y: () => 50, title: layer => `${layer.name}\n` + bars.filter(bar => bar.number === layer.number).map(bar => `${bar.name}: ${bar.share.toFixed(0)} %`).join("\n")}))),
  ]}));
  return chart({title: "What the heads keep", draw, legend: USES.map(([, name, color]) => [name, color]), sub: "Share of the input channels of all heads, in percent, by the images that they are kept for.",
    text: `Share of the heads' input channels, on average over layers: ${USES.map(([key, name]) => `${percent(mean(key), 0)} are kept ${name}`).join(", ")}.`, rows: layers,
    columns: [{name: "layer", value: layer => layer.number, number: true}, {name: "name", value: layer => layer.name}, {name: "channels", value: layer => layer.channels, number: true},
      {name: "heads", value: layer => layer.heads, number: true}, ...USES.map(([key, name]) => ({name, number: true, value: layer => layer.inputs[key]}))]});
}

function controlChart(controls) {
  const bars = [["its own gates", controls.own, null], ["of another image", controls.another_image?.accuracy, controls.another_image?.standard_error], ["the batch's mean", controls.mean?.accuracy, controls.mean?.standard_error]]
    .filter(([, value]) => known(value)).map(([name, value, error]) => ({name, value: 100 * value, error: 100 * (error || 0)}));
  const draw = width => Plot.plot(base(width, 46 + 34 * bars.length, {marginTop: 6, marginLeft: 122, marginRight: 62, x: {domain: [0, 100]}, y: {domain: bars.map(bar => bar.name), label: null, padding: .3}, marks: [
    Plot.gridX({stroke: "var(--line)", strokeOpacity: 1, ticks: Math.max(3, width / 110)}), axisX({label: "top-1 (%)", ticks: Math.max(3, width / 110)}), Plot.axisY({tickSize: 0, fill: "var(--ink)", label: null}),
    Plot.barX(bars, {y: "name", x: "value", fill: (bar, index) => index ? "var(--plain)" : "var(--accent)", rx: 2}),
    Plot.ruleY(bars, {y: "name", x1: bar => bar.value - bar.error, x2: bar => bar.value + bar.error, stroke: "var(--ink)"}),
    Plot.text(bars, {y: "name", x: bar => bar.value + bar.error, text: bar => bar.value.toFixed(1) + " %", textAnchor: "start", dx: 6, fill: "var(--ink)"}),
  ]}));
  return chart({title: "Does the selection matter?", draw, sub: `Accuracy of ${plural(controls.images, "image")} when the gates are exchanged, without any training. Lines: standard error of the difference.`,
    text: "Accuracy with " + bars.map(bar => `${bar.name}: ${bar.value.toFixed(1)} %`).join("; ") + ".", rows: bars,
    columns: [{name: "gates", value: bar => bar.name}, {name: "top-1 (%)", number: true, value: bar => bar.value, text: bar => bar.value.toFixed(2)}]});
}

// Class by channel, of a layer to choose.
function classUsage(gates, layers) {
  const able = layers.filter(layer => layer.usage_by_class);
  if (!gates.classes || !able.length) return null;
  const place = h("div"), chosen = d3.greatest(able, layer => layer.class_information ?? 0) || able[0];
  const choice = h("select", {id: "gate-layer"}, able.map(layer => h("option", {value: layer.number, selected: layer === chosen}, `${layer.number}: ${layer.name}`)));
  const show = () => place.replaceChildren(classHeat(gates, able.find(layer => String(layer.number) === choice.value)));
  choice.addEventListener("change", show);
  show();
  return h("div", {class: "wide"}, h("div", {class: "choose"}, h("label", {for: "gate-layer"}, "Layer"), choice), place);
}

function classHeat(gates, layer) {
  // Channels that share a gate have the same numbers.
  const size = layer.granularity || 1, first = channel => channel - channel % size;
  const channels = channel => size > 1 ? `channels ${first(channel)} to ${first(channel) + size - 1}` : `channel ${channel}`;
  const order = d3.sort(d3.range(layer.channels), channel => -layer.usage[channel]), rank = new Map(order.map((channel, index) => [channel, index]));
  const cells = layer.usage_by_class.flatMap((row, number) => row.map((share, channel) => ({number, channel, rank: rank.get(channel), share})));
  const draw = width => {
    const left = 26 + 7 * d3.max(gates.classes, name => Math.min(14, [...name].length));
    return Plot.plot(base(width, 56 + Math.max(14, Math.min(24, 400 / gates.classes.length)) * gates.classes.length, {marginTop: 6, marginLeft: left, x: {domain: d3.range(layer.channels)}, y: {domain: d3.range(gates.classes.length), label: null}, marks: [
      Plot.axisY({tickSize: 0, fill: "var(--ink)", tickFormat: number => isolated(gates.classes[number], 14), label: null}),
      axisX({label: "channels, the most used first", labelOffset: 24, ticks: [], tickFormat: () => ""}),
      Plot.cell(cells, {x: "rank", y: "number", fill: "var(--accent)", fillOpacity: {value: "share", scale: null}, inset: 0}),
      Plot.tip(cells, Plot.pointer(tip({x: "rank", y: "number", title: cell => `${isolated(gates.classes[cell.number])}, ${channels(cell.channel)}\nkept for ${percent(cell.share, 0)} of the images`}))),
    ]}));
  };
  return chart({title: "Channels by class", draw, sub: `Share of a class's images for which a head keeps the channel, mean over heads: the stronger the color, the more. Layer ${layer.number}, ${layer.name}.`,
    text: `Use of ${layer.channels} channels by class in layer ${layer.name}; ${percent(layer.class_share, 0)} of the variation is explained by the class.`});
}
