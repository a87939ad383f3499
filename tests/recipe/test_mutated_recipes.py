"""300 recipes with mistakes in them: each is answered in one line, or is a recipe after all and runs."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RECIPE = """\
name: mutant
model: {arch: dgc_densenet86, stages: [1, 1], growth: [4, 8], heads: 2, gate_factor: 0.5, squeeze_rate: 4}
data:
  name: digits
  batch_size: 700
  augment: [crop_flip, random_erasing]
train:
  epochs: 1
  optimizer: adamw
  lr: 1.0e-3
  momentum: 0.9
  schedule: one_cycle
  ema: 0.99
  seed: 0
log: {print_every: 100}
device: cpu
output: runs
"""
VALUES = [
    "-1", "0", "1", "3", "0.5", "-0.0", "1e400", "-1e-400", ".nan", ".inf", "1" + 40 * "0", 5000 * "9", "0x10",
    "1_000", "true", "null", "~", "''", "[]", "{}", "[1]", "[[1]]", "{a: 1}", "'3'", "ten", "2020-01-01",
    "2020-99-99", "12:30:45", "!!binary aGk=", "!!set {a}", "!!python/object/apply:os.system ['true']", "!unknown 3",
    "*nothing", "&a [*a]", "🦊", "\u202e", "\x00", "\x85", "naïve", 3000 * "x", "|\n    text", "> \n", "'",
    '"\\ud800"', "@", "%", "`", "? a", "- 1", "[4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096]", "4096", "100000",
    "200", "1.5", "<<: {a: 1}", "[1, a, null]",
]  # fmt: skip
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))


SIGNS = ["", "\t", "[", "}", ":", "'", '"', "#", "\n", "- ", "&x ", "*x", "\ufeff", "\x07", ": :", ","]
MORE_LINES = [
    LAUGHS, "x: " + 3000 * "[" + "\n", "---\nname: two\n", "<<: &m {name: merged}\n", "extra: {a: 1}\n",
    "Train: {a: 1}\n", "modle: {a: 1}\n",
]  # fmt: skip
ANY_VALUE = st.one_of(
    st.sampled_from(VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
VALID = {
    "arch": ["dgc_densenet22", "dgc_densenet86_sgc"], "heads": ["1", "4"], "gate_factor": ["0.25", "1.0"],
    "squeeze_rate": ["1", "16"], "batch_size": ["1", "64"], "augment": ["[]", "[rand_augment]"], "epochs": ["3"],
    "optimizer": ["sgd", "lamb"], "lr": ["0.1", "1e-5"], "schedule": ["cosine", "multistep"], "ema": ["0.5", "null"],
    "seed": ["7"], "print_every": ["1"], "device": ["auto"],
}  # fmt: skip
KEY = r"\w+(?=: )"


def misspelled(draw, text):
    """One key with a letter missing or added, in capitals, or gone."""
    key = draw(st.sampled_from(re.findall(KEY, text)))
    place = draw(st.integers(0, len(key) - 1))
    wrong = [key[:place] + key[place + 1 :], key[:place] + "x" + key[place:], key.upper(), key + "é", ""]
    return text.replace(f"{key}: ", f"{draw(st.sampled_from(wrong))}: ", 1)


def revalued(draw, text):
    """One key with another value."""
    key = draw(st.sampled_from(re.findall(KEY, text)))
    value = draw(ANY_VALUE)
    return re.sub(rf"\b{key}: ([^,\n\[{{}}]+|\[[^\]]*\])", lambda _: f"{key}: {value}", text, count=1)


def tuned(draw, text):
    """One key with another value that it may have."""
    keys = [key for key in re.findall(KEY, text) if key in VALID] or ["heads"]
    key = draw(st.sampled_from(keys))
    return re.sub(rf"\b{key}: ([\w.-]+|\[[^\]]*\])", f"{key}: {draw(st.sampled_from(VALID[key]))}", text, count=1)


def damaged(draw, text):
    """One character replaced."""
    place = draw(st.integers(0, len(text) - 1))
    return text[:place] + draw(st.sampled_from(SIGNS)) + text[place + 1 :]


def shuffled(draw, text):
    """A line missing, repeated or indented; the end missing; a line more."""
    lines = text.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    changed = [
        lines[:place] + lines[place + 1 :],
        [*lines, lines[place]],
        [*lines[:place], f"  {lines[place]}", *lines[place + 1 :]],
        lines[:place],
        [*lines, draw(st.sampled_from(MORE_LINES))],
    ]
    return "".join(draw(st.sampled_from(changed)))


CHANGES = st.sampled_from([misspelled, revalued, revalued, revalued, tuned, damaged, shuffled])


@st.composite
def mutants(draw):
    text = RECIPE
    for change in draw(st.sampled_from([1, 1, 2]).flatmap(lambda count: st.tuples(*count * [CHANGES]))):
        if re.search(KEY, text):
            text = change(draw, text)
    return text


def test_300_mutated_recipes(app, tmp_path):
    path = tmp_path / "mutant.yaml"
    refused, good = set(), {}

    @given(mutants().filter(lambda text: text != RECIPE))
    @settings(max_examples=300)
    def check(text):
        path.write_text(text, encoding="utf-8")
        code, answer = app("check", path, cwd=tmp_path, expect=None)
        if code == 0:
            good[text] = None
            return
        assert code == 2 and answer.startswith("error: ") and answer.count("\n") == 1
        assert len(answer) < 800 and re.search(r"mutant.yaml|(model|data|device|output|log)\S*: ", answer)
        refused.add(text)

    check()
    assert len(refused) > 150 and len(good) > 20
    # What was accepted runs; eight of them do.
    short = "train.epochs=1", "data.batch_size=700", "data.size=8", "train.warmup=0"
    for number, text in enumerate(list(good)[:: len(good) // 8]):
        path.write_text(text, encoding="utf-8")
        runs = tmp_path / f"runs{number}"
        app(path, *short, f"output={runs}", "model.stages=[1,1]", "model.growth=[4,8]", cwd=tmp_path)
        assert list(runs.glob("*/last.safetensors"))


@pytest.mark.parametrize("text", [LAUGHS, "name: &a [*a]\n", "x: &x {y: *x}\n"], ids=["laughs", "list", "mapping"])
def test_anchors_that_stand_for_too_much(app, tmp_path, text):
    path = tmp_path / "anchors.yaml"
    path.write_text(RECIPE.replace("name: mutant\n", "") + text)
    assert "anchors.yaml: not a recipe" in app("check", path, expect=2)
