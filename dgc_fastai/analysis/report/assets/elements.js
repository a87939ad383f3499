"use strict";
// Elements, numbers, tables and the frame of a chart. Text from a run enters the page by textContent only.

const data = JSON.parse(document.getElementById("data").textContent);

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

// A name from a run: on its own, whatever the direction of its script.
const named = text => h("bdi", null, String(text));

const known = value => value !== null && value !== undefined;
const clip = (text, length) => { const signs = [...String(text)]; return signs.length > length ? signs.slice(0, length - 1).join("") + "\u2026" : signs.join(""); };
// Isolates a name inside a text of a chart, where there are no elements to do so.
const isolated = (text, length = 24) => "\u2068" + clip(text, length) + "\u2069";
const percent = (share, digits = 2) => known(share) ? (100 * share).toFixed(digits) + " %" : "\u2013";
const significant = (value, digits = 3) => {
  if (!known(value)) return "\u2013";
  if (value === 0) return "0";
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en-US", {minimumFractionDigits: Math.min(places, 8), maximumFractionDigits: Math.min(places, 8)});
};
function quantity(value) {
  if (!known(value)) return "\u2013";
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (value >= size) return significant(value / size) + "\u00a0" + unit;
  return String(Math.round(value));
}
function duration(seconds) {
  if (!known(seconds)) return "\u2013";
  if (seconds < 60) return Math.round(seconds) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return minutes + " min";
  return Math.floor(minutes / 60) + " h" + (minutes % 60 ? " " + (minutes % 60) + " min" : "");
}
const plural = (count, noun, many = noun + "s") => count + " " + (count === 1 ? noun : many);

// columns: {name, value(row), text?(row) or element?(row), number?: bool}. A click on a heading sorts.
function table(columns, rows, {label, sort = null, current = () => false} = {}) {
  const body = h("tbody");
  const heads = columns.map(column => {
    const button = h("button", {type: "button"}, column.name);
    const head = h("th", {scope: "col", class: column.number && "number"}, button);
    button.addEventListener("click", () => order(column, head));
    return head;
  });
  const lines = rows.map(row => ({row, line: h("tr", {class: current(row) && "on"}, columns.map(column => {
    const content = column.element ? column.element(row) : column.text ? column.text(row) : column.value(row);
    return h("td", {class: column.number && "number"}, content instanceof Node ? content : named(known(content) ? content : "\u2013"));
  }))}));
  body.append(...lines.map(({line}) => line));
  function order(column, head) {
    const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : Boolean(column.number);
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const last = value => !known(value) || Number.isNaN(value);
    lines.sort(({row: a}, {row: b}) => {
      const [one, two] = [column.value(a), column.value(b)];
      if (last(one) || last(two)) return last(one) - last(two);
      const up = typeof one === "number" && typeof two === "number" ? one - two : String(one).localeCompare(String(two), undefined, {numeric: true});
      return down ? -up : up;
    });
    body.append(...lines.map(({line}) => line));
  }
  if (sort !== null) order(columns[sort], heads[sort]);
  return h("div", {class: "scroll", role: "region", "aria-label": label, tabindex: 0}, h("table", null, h("thead", null, h("tr", null, heads)), body));
}

// Redraws charts when their width changes.
const widths = new ResizeObserver(entries => { for (const entry of entries) entry.target.redraw?.(Math.floor(entry.contentRect.width)); });
let figures = 0;

// A chart: a title, a sentence that says what it shows, the picture, and its numbers as a table.
function chart({title, sub, text, draw, columns, rows, wide, legend}) {
  const id = "chart-" + ++figures;
  const canvas = h("div", {class: "canvas"});
  const figure = h("figure", {class: "chart" + (wide ? " wide" : ""), "aria-labelledby": id}, h("figcaption", null, h("h3", {id}, title), sub && h("p", {class: "sub"}, sub)),
    legend && h("div", {class: "legend", "aria-hidden": "true"}, legend.map(([name, color]) => h("span", {style: `--key: ${color}`}, name))), canvas);
  let drawn = 0;
  canvas.redraw = width => {
    if (width === drawn || width < 40) return;
    drawn = width;
    const svg = draw(width);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", text);
    svg.removeAttribute("aria-description");
    canvas.replaceChildren(svg);
    figure.dataset.drawn = "true";
  };
  widths.observe(canvas);
  if (rows) {
    const details = h("details", null, h("summary", null, "Numbers"));
    details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(table(columns, rows, {label: title + ": numbers"})); });
    figure.append(details);
  }
  return figure;
}
