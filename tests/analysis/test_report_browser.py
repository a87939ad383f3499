"""The page of `report` in a browser: no error, no request, every chart drawn, themes, a phone, paper, hostile names."""

import json
import os
import shutil

import pytest

from dgc_fastai.analysis.report import latency
from dgc_fastai.analysis.report.build import write_report
from helpers.datasets import write_imagenet
from helpers.stored_runs import DIGITS, store_run

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not BROWSER:
    pytest.skip("there is no Chromium or Chrome on the path", allow_module_level=True)

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' \U0001f408 \u0645\u0631\u062d\u0628\u0627"
CLASSES = ["<b>bold & 'quoted'", '"double"', "\U0001f408 cat", "\u0642\u0637\u0629"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages by name: of one run, of one with hostile names, of what a killed run left, and of sixty runs."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "TIMING", (1, 1e-6))
        patch.setattr(latency, "TIMING_MANY", (1, 1e-6))
        data = write_imagenet(folder / "data", CLASSES)
        hostile = store_run(
            folder / EVIL.replace("/", "|"),
            "data.name=folder", f"data.path={data}", "data.size=16",
            classes=sorted(CLASSES), problems=[EVIL], environment={"command": EVIL, "versions": {EVIL: EVIL}},
        )  # fmt: skip
        gates_of(hostile, sorted(CLASSES))
        one = store_run(folder / "quickstart-20260101-000000", environment={"command": "dgc quickstart"})
        gates_of(one, DIGITS)
        killed = store_run(folder / "killed", epochs=2, weights=False)
        (killed / "history.csv").unlink()
        many = [(factor / 20, seed) for factor in range(1, 21) for seed in range(3)]
        for number, (factor, seed) in enumerate(many):
            overrides = [f"model.gate_factor={factor}", f"train.seed={seed}", f"name=r{number:02}"]
            top_1 = 0.7 + factor / 5 + seed / 100
            store_run(folder / "many" / f"r{number:02}", *overrides, weights=number % 15 == 14, top_1=top_1)
        return {
            name: write_report([path], folder / f"{name}.html")
            for name, path in {"one": one, "hostile": hostile, "killed": killed, "many": folder / "many"}.items()
        }


def gates_of(run, classes):
    """A gates.json as `gates` writes it."""
    shares = ["kept_share", "usage_entropy", "fixed_share", "mutual_information", "mutual_information_permuted"]
    shares += ["class_information", "class_share", "overlap_heads", "overlap_images", "overlap_same_class"]
    shares += ["overlap_different_class", "gate_mean", "gate_std"]
    layer = {"channels": 4, "heads": 2, "inactive": 3, **dict.fromkeys(shares, 0.25)}
    usage = [[1.0, 0.5, 0.25, 0.0]] * 2
    use = {"usage": usage, "usage_by_class": [usage] * len(classes), "never_kept": [3], "always_kept": []}
    use["by_head"] = {"never_kept": [1, 1], "always_kept": [1, 1]}
    layers = [{"name": f"layers.{number}", **layer, **use} for number in range(4)]
    exchanged = {"accuracy": 0.5, "difference": -0.4, "standard_error": 0.02}
    controls = {"images": 360, "own": 0.9, "another_image": exchanged, "mean": exchanged}
    gates = {"format": 1, "images": 360, "classes": classes, "controls": controls, "verdict": [EVIL] * 3}
    gates["weights"] = str(run / "best.safetensors")
    (run / "gates").mkdir()
    (run / "gates" / "gates.json").write_text(json.dumps({**gates, "layers": layers}))


@pytest.fixture
def visit(browser, pages):
    """Opens a page; at the end, it must have had no error, no dialog and no request."""
    contexts, complaints = [], []

    def open_page(name, width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url) if asks(request) else None)
        page.goto(pages[name].as_uri())
        page.wait_for_selector("html[data-ready]")
        # Charts are drawn when their width is known.
        page.wait_for_function(
            "[...document.querySelectorAll('figure.chart .canvas')].every(one => one.children.length)"
        )
        return page

    def asks(request):
        return not request.url.startswith("data:") and not request.is_navigation_request()

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def titles(page):
    return page.locator("figure.chart h3").all_inner_texts()


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def is_too_wide(page):
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


RUN_CHARTS = ["Loss", "Accuracy", "Inactive channels", "Learning rate", "Latency, deployed", "Cost by layer"]
CONTROLS = "Does the selection matter?"  # which `gates` measures
GATE_CHARTS = ["Does the selection depend on the image?", "What the heads keep", CONTROLS, "Channels by class"]
CLASS_CHARTS = ["Accuracy by class", "Confusion matrix"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("one", RUN_CHARTS + GATE_CHARTS + CLASS_CHARTS),
        ("hostile", RUN_CHARTS + GATE_CHARTS + CLASS_CHARTS),
        ("killed", []),
        ("many", ["Accuracy against MACs", "Accuracy against measured latency", "Accuracy while training", *RUN_CHARTS,
                  *(title for title in GATE_CHARTS if title != CONTROLS), *CLASS_CHARTS]),
    ],
)  # fmt: skip
def test_every_chart_is_drawn_and_has_a_text(visit, name, expected):
    page = visit(name)
    assert titles(page) == expected
    charts = page.locator("figure.chart svg[role=img]")
    assert charts.count() == len(expected)
    for chart in charts.all():
        assert len(chart.get_attribute("aria-label")) > 20
        assert "NaN" not in chart.inner_html() and "undefined" not in chart.get_attribute("aria-label")
        assert chart.locator("path, rect, circle, line").count() > 3


def test_numbers_of_a_chart_open_as_a_table(visit):
    page = visit("one")
    figure = page.locator("figure.chart", has_text="Loss").first
    figure.locator("summary").click()
    figure.locator("tbody tr").nth(15).wait_for()  # `toggle` is sent after the click has returned
    assert figure.locator("tbody tr").count() == 16


def test_the_theme_follows_the_system_and_switches(visit):
    light, dark = visit("one", color_scheme="light"), visit("one", color_scheme="dark")
    colors = background(light), background(dark)
    assert colors[0] != colors[1]
    for page, other in ((light, colors[1]), (dark, colors[0])):
        before = page.locator("figure.chart svg text").first.evaluate("one => getComputedStyle(one).fill")
        page.locator("button.theme").click()
        assert background(page) == other
        assert page.locator("figure.chart svg text").first.evaluate("one => getComputedStyle(one).fill") != before


@pytest.mark.parametrize("name", ["one", "hostile", "killed", "many"])
def test_a_phone_does_not_scroll_sideways(visit, name):
    assert not is_too_wide(visit(name, width=375))


def test_charts_follow_the_width(visit):
    page = visit("one")
    chart = page.locator("figure.chart svg").first
    page.set_viewport_size({"width": 375, "height": 800})
    page.wait_for_function("document.querySelector('figure.chart svg').getAttribute('width') < 375")
    assert chart.bounding_box()["width"] <= 375 and not is_too_wide(page)


@pytest.mark.parametrize("name", ["one", "many"])
def test_it_prints(visit, name):
    page = visit(name, color_scheme="dark")
    page.emulate_media(media="print")
    assert background(page) in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
    assert not page.locator("button.theme").is_visible()
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF") and 20_000 < len(paper) < 3_000_000


def test_names_are_shown_and_never_executed(visit):
    page = visit("hostile")
    shown = page.locator("body").inner_text()
    for name in (EVIL, *CLASSES):
        assert name in shown or name in page.locator("#page").text_content(), name
    assert page.locator("h1").inner_text() == EVIL.replace("/", "|")
    assert page.title() == EVIL.replace("/", "|")
    assert page.locator("#page script, #page b, img[src=x]").count() == 0
    page.wait_for_function("[...document.images].every(one => one.src.startsWith('data:') && one.naturalWidth > 0)")
    assert page.locator(".mistakes img").count() > 0


def test_the_policy_lets_no_other_script_run(browser, pages):
    page = browser.new_page()  # where the browser may complain
    page.goto(pages["one"].as_uri())
    refused = page.evaluate(
        """new Promise(resolve => {
            document.addEventListener("securitypolicyviolation", () => resolve(true));
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            setTimeout(() => resolve(false), 5000);
        })"""
    )
    assert refused and not page.evaluate("window.ran")
    page.close()


def test_tables_sort(visit):
    page = visit("many")
    rows = page.locator("#runs tbody tr")
    assert rows.count() == 60

    def column(number):
        return [float(row.locator("td").nth(number).inner_text()) for row in rows.all()]

    accuracy = column(3)
    assert accuracy == sorted(accuracy, reverse=True)
    heading = page.locator("#runs th", has_text="gate_factor")
    heading.locator("button").click()
    assert column(1) == sorted(column(1)) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(1) == sorted(column(1), reverse=True) and heading.get_attribute("aria-sort") == "descending"


def test_a_run_of_many_is_shown_in_detail(visit):
    page = visit("many")
    page.locator("#runs .link", has_text="r07").click()
    assert page.locator("#run option:checked").inner_text() == "r07"
    assert "There is no best.safetensors" in page.locator("#detail").inner_text()


def test_what_is_missing_is_said(visit):
    text = visit("killed").locator("body").inner_text()
    assert "What this page lacks" in text and "The run ended after 2 epochs of 16" in text and "no history.csv" in text


def test_pages_are_small(pages):
    sizes = {name: os.path.getsize(path) for name, path in pages.items()}
    assert sizes["one"] < 3_000_000 and sizes["many"] < 6_000_000
