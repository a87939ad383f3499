"use strict";
// The page.

function themeButton() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  const button = h("button", {type: "button", class: "theme"});
  const show = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
  dark.addEventListener("change", show);
  show();
  return button;
}

function navigation(page) {
  const links = [...page.querySelectorAll("section[id]")].map(one => h("a", {href: "#" + one.id}, one.querySelector("h2").textContent));
  return links.length > 1 && h("nav", {"aria-label": "Sections"}, links);
}

function header(subtitle) {
  return h("header", {class: "top"}, h("div", null, h("h1", null, named(data.title)), h("p", null, subtitle)), themeButton());
}

function single(run) {
  const details = h("div", null, runPage(run));
  return [header(named([run.arch, run.folder].filter(Boolean).join(" \u00b7 "))), navigation(details), callout("", "What this page lacks", data.notes), tiles(run), details];
}

function several() {
  const best = d3.greatest(data.runs, run => run.top_1 ?? -1), place = h("div");
  const choice = h("select", {id: "run"}, data.runs.map(run => h("option", {value: run.id, selected: run === best}, run.name)));
  const show = () => {
    const run = data.runs.find(one => String(one.id) === choice.value);
    place.replaceChildren(...[h("p", {class: "lead"}, named(run.label)), tiles(run), ...runPage(run)].flat().filter(Boolean));
  };
  const choose = id => { choice.value = id; show(); document.getElementById("detail").scrollIntoView(); };
  choice.addEventListener("change", show);
  const overview = h("div", null,
    callout("", "What this page lacks", data.notes),
    section("results", "Results", grid(fronts(), allCurves(choose))),
    section("runs", "Runs", h("p", {class: "lead"}, "A click on a heading sorts; a run's name shows it in detail below."), runTable(choose)),
    section("detail", "One run in detail", h("div", {class: "choose"}, h("label", {for: "run"}, "Run"), choice), place));
  show();
  const seeds = new Set(data.runs.map(run => run.label)).size;
  return [header(`${plural(data.runs.length, "run")}, ${plural(seeds, "setting")}`), navigation(overview), overview];
}

document.getElementById("page").append(...(data.runs.length === 1 ? single(data.runs[0]) : several()).flat().filter(Boolean),
  h("footer", null, `Written ${data.created} by dgc_fastai. Charts: Observable Plot and D3 (ISC license).`));
document.documentElement.dataset.ready = "true";
