"use strict";
// One run in detail.

const tile = (name, value, unit, detail) => h("div", {class: "tile"}, h("dt", null, name), h("dd", {class: "value"}, value, unit && h("small", null, " " + unit)), detail && h("dd", {class: "detail"}, detail));
const section = (id, title, ...content) => content.flat().some(Boolean) && h("section", {id}, h("h2", null, title), ...content);
const grid = (...content) => content.flat().some(Boolean) && h("div", {class: "grid"}, ...content);

function tiles(run) {
  const {summary} = run, best = summary.best || {}, [done, planned] = run.epochs;
  const faster = known(run.ms) && known(run.dense_ms) ? `${significant(run.dense_ms / run.ms)} \u00d7 as fast as dense` : "one image, deployed";
  return h("dl", {class: "tiles"},
    known(best.top_1) && tile("Top-1 accuracy", (100 * best.top_1).toFixed(2), "%", `epoch ${best.epoch}` + (known(best.top_5) ? `; top-5 ${percent(best.top_5)}` : "")),
    known(summary.macs) && tile("MACs", ...quantity(summary.macs).split("\u00a0"), summary.macs_dense ? `${percent(summary.macs / summary.macs_dense, 0)} of dense` : null),
    known(run.ms) && tile("Latency", significant(run.ms), "ms", faster),
    known(summary.parameters) && tile("Parameters", ...quantity(summary.parameters).split("\u00a0")),
    known(summary.seconds) && tile("Training", duration(summary.seconds), null, planned && done !== planned ? `${done} of ${plural(planned, "epoch")}` : plural(done, "epoch")));
}

// A sentence with commands between backticks.
const sentence = line => line.split("`").map((part, index) => index % 2 ? h("code", null, part) : named(part));

const callout = (kind, title, lines) => lines.length ? h("div", {class: "callout " + kind, role: "note"}, h("strong", null, title), h("ul", null, lines.map(line => h("li", {dir: "auto"}, sentence(line))))) : null;

function costTable(run) {
  const {summary} = run, rows = [["multiply-accumulates (MACs)", summary.macs], ["with ordinary convolutions", summary.macs_dense], ["the authors' count of operations", summary.operations], ["parameters", summary.parameters]]
    .filter(([, value]) => known(value));
  return rows.length ? h("div", null, h("h3", null, "Cost of one image"), h("p", {class: "note"}, "With the gates closed as the recipe says."), h("div", {class: "full"},
    table([{name: "count", value: row => row[0]}, {name: "number", number: true, value: row => row[1], text: row => Math.round(row[1]).toLocaleString("en-US")}], rows, {label: "Cost of one image"}))) : null;
}

// A network before and after its compression.
function compression(run) {
  const found = run.compression;
  if (!found) return null;
  const number = (name, place) => ({name, number: true, value: row => row[place]});
  const cost = [{name: "", value: row => row[0]}, number("before", 1), number("after", 2), number("change", 3)];
  const speed = [{name: "precision", value: row => row[0]}, {name: "network", value: row => row[1]}, ...found.batches.map((name, place) => number(name, place + 2))];
  return section("compression", "Before and after", h("p", {class: "lead"}, named(found.answer)), found.lines.map(line => h("p", {class: "note", dir: "auto"}, sentence(line))),
    callout("", "What to try", found.advice),
    grid(h("div", null, h("h3", null, "Accuracy and cost"), table(cost, found.cost, {label: "Accuracy and cost"})), h("div", null, h("h3", null, "Milliseconds"), table(speed, found.speed, {label: "Milliseconds"}))));
}

function classes(run) {
  const evaluation = run.evaluation;
  if (!evaluation) return null;
  return section("classes", "Classes", h("p", {class: "lead"}, `${plural(evaluation.images, "validation image")}, ${percent(evaluation.top_1)} of them right, evaluated with the deployed network when this page was written.`),
    grid(classChart(evaluation), confusionChart(evaluation)), h("h3", {style: "margin: 2.25rem 0 .75rem"}, "Most confident mistakes"), mistakes(evaluation));
}

function repeat(run) {
  const env = run.summary.environment || {}, versions = Object.entries(env.versions || {}).filter(([, version]) => known(version));
  const facts = [
    ["Folder", run.folder], ["Command", env.command], ["Started", env.started], ["Commit", env.commit], ["Versions", versions.map(pair => pair.join(" ")).join(", ")],
    ["Machine", [env.gpu, env.processor, env.platform].filter(Boolean).join("; ")],
    ["Device", env.device && `${env.device}, ${plural(env.processes, "process", "processes")}, ${plural(env.threads, "CPU thread")}`],
    ["Started from", run.summary.starts_from],
  ].filter(([, value]) => known(value) && value !== "");
  return section("repeat", "Repeat it", h("dl", {class: "facts"}, facts.map(([name, value]) => [h("dt", null, name), h("dd", null, named(value))])),
    h("h3", null, "To train it again"), h("pre", null, `${data.program} train ${quoted(run.folder + "/recipe.yaml")}`), run.recipe && [h("h3", null, "Its recipe"), h("pre", {dir: "auto"}, run.recipe.trimEnd())]);
}

// As a POSIX shell takes it.
const quoted = word => /^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\"'\"'") + "'";

function deployment(run) {
  const folder = quoted(run.folder);
  const python = `import torch\nfrom dgc_fastai import deploy\nfrom dgc_fastai.inference.predict import Predictor\n\npredictor = Predictor.from_weights(${JSON.stringify(run.folder)})\nnetwork = deploy(predictor.model)  # faster, the same numbers\nwith torch.no_grad():\n    outputs = network(images)  # [B, ${run.input || "C, H, W"}], normalized`;
  return section("deploy", "Use it", h("h3", null, "In a shell"), h("pre", null, `${data.program} predict ${folder} IMAGE ...\n${data.program} export ${folder} network.onnx`), h("h3", null, "In Python"), h("pre", null, python));
}

function runPage(run) {
  return [
    callout("warn", run.summary.problems?.length === 1 ? "A problem of this run" : "Problems of this run", run.summary.problems || []),
    callout("", "What this page lacks", run.missing),
    compression(run),
    section("training", "Training", grid(trainingCharts(run))),
    section("cost", "Cost and speed", grid(run.latency.length > 0 && latencyChart(run), costTable(run), run.layers?.length > 0 && costChart(run))),
    run.gates && section("gates", "Gates", gateSection(run)),
    classes(run),
    repeat(run),
    run.layers && deployment(run),
  ];
}
