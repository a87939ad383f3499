"""300 recipes with mistakes in them: each is answered in one line, or is a recipe after all and runs."""

import random
import re

import pytest

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


def misspell(chance, text):
    key = chance.choice(re.findall(r"\w+(?=: )", text))
    place = chance.randrange(len(key))
    wrong = chance.choice([key[:place] + key[place + 1 :], key[:place] + "x" + key[place:], key.upper(), key + "é", ""])
    return text.replace(f"{key}: ", f"{wrong}: ", 1)


def revalue(chance, text):
    key = chance.choice(re.findall(r"\w+(?=: )", text))
    value = chance.choice(VALUES)
    return re.sub(rf"\b{key}: ([^,\n\[{{}}]+|\[[^\]]*\])", lambda _: f"{key}: {value}", text, count=1)


def damage(chance, text):
    place = chance.randrange(len(text))
    sign = chance.choice(
        ["", "\t", "[", "}", ":", "'", '"', "#", "\n", "- ", "&x ", "*x", "\ufeff", "\x07", ": :", ","]
    )
    return text[:place] + sign + text[place + 1 :]


def shuffle(chance, text):
    lines = text.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    return "".join(
        chance.choice(
            [
                lines[:place] + lines[place + 1 :],
                [*lines, lines[place]],
                lines[:place] + [f"  {lines[place]}"] + lines[place + 1 :],
                lines[:place],
                [*lines, f"{chance.choice(['extra', 'Train', 'modle'])}: {{a: 1}}\n"],
                [
                    *lines,
                    chance.choice([LAUGHS, "x: " + 3000 * "[" + "\n", "---\nname: two\n", "<<: &m {name: merged}\n"]),
                ],
            ]
        )
    )


def test_300_mutated_recipes(app, tmp_path):  # noqa: F811
    chance = random.Random(0)
    path = tmp_path / "mutant.yaml"
    answers, good = [], []
    while len(answers) + len(good) < 300:
        text = RECIPE
        for _ in range(chance.choice([1, 1, 2])):
            text = chance.choice([misspell, revalue, revalue, revalue, damage, shuffle])(chance, text)
        if text == RECIPE:
            continue
        path.write_bytes(text.encode("utf-8", chance.choice(["strict", "strict", "surrogatepass"])))
        code, answer = app("check", path, cwd=tmp_path, expect=None)
        if code == 0:
            good.append(text)
            continue
        assert code == 2 and answer.startswith("error: ") and answer.count("\n") == 1, (text, answer)
        assert len(answer) < 800 and re.search(r"mutant.yaml|(model|data|device|output|log)\S*: ", answer), (
            text,
            answer,
        )
        answers.append(answer)
    assert len(answers) > 150 and len(good) > 20
    # What was called good runs, as far as a test has time for it.
    for number, text in enumerate(good[:: len(good) // 8]):
        path.write_text(text)
        short = (
            "train.epochs=1",
            "data.batch_size=700",
            "data.size=8",
            f"output={tmp_path}/runs{number}",
            "train.warmup=0",
        )
        app(path, *short, "model.stages=[1,1]", "model.growth=[4,8]", cwd=tmp_path)
        assert list((tmp_path / f"runs{number}").glob("*/last.safetensors"))


@pytest.mark.parametrize("text", [LAUGHS, "name: &a [*a]\n", "x: &x {y: *x}\n"], ids=["laughs", "list", "mapping"])
def test_anchors_that_stand_for_too_much(app, tmp_path, text):  # noqa: F811
    path = tmp_path / "anchors.yaml"
    path.write_text(RECIPE.replace("name: mutant\n", "") + text)
    assert "anchors.yaml: not a recipe" in app("check", path, expect=2)
