"""What a run says of itself at its end."""

import pytest

from dgc_fastai import load_recipe
from dgc_fastai.training.diagnosis import Findings, problems
from helpers import QUICKSTART

NAN, INF = float("nan"), float("inf")
CLASSES = ["cat", "dog", "owl"]
FINDINGS = Findings(images=[20, 50, 30])


def rows(top_1, valid=None, train=None):
    count = len(top_1)
    valid, train = valid or [1.0] * count, train or [1 - epoch / 10 for epoch in range(count)]
    columns = zip(top_1, valid, train)
    return [
        {"epoch": number, "top_1": accuracy, "valid_loss": loss, "train_loss": own}
        for number, (accuracy, loss, own) in enumerate(columns, 1)
    ]


def told(rows, findings=FINDINGS, *overrides):
    return problems(rows, findings, load_recipe(QUICKSTART, overrides), CLASSES)


def test_a_run_that_learned_has_no_problems():
    assert told(rows([0.5, 0.7, 0.9, 0.9], train=[1, 0.5, 0.4, 0.39])) == []


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_validation_loss_that_is_not_finite(loss):
    (line,) = told(rows([0.5, 0.9, 0.9], valid=[1, loss, 1]), Findings(FINDINGS.images, overflowed="stem.conv"))
    assert "NaN or Inf in 1 of 3 epochs, from epoch 2 on" in line
    assert "stem.conv overflowed first" in line


@pytest.mark.parametrize(
    "overrides, hint",
    [
        (["model.zero_init_gates=false"], "model.zero_init_gates=true."),
        ([], "train the dense network first"),
        (["model.arch=dgc_densenet86_dense"], "a smaller train.lr, or train.clip"),
    ],
)
def test_the_hint_at_an_overflow_names_what_the_network_does_not_have_yet(overrides, hint):
    assert hint in told(rows([0.9], valid=[NAN]), FINDINGS, *overrides)[0]


def test_accuracy_no_better_than_the_most_frequent_class():
    (line,) = told(rows([0.3, 0.52, 0.5]))
    assert "52.0 %" in line and "'dog' gives 50.0 % of the 100 validation images" in line
    assert "model.arch=dgc_densenet86_dense" in line


def test_accuracy_is_compared_with_chance_where_classes_have_no_images():
    assert told(rows([0.4]), Findings(images=[100, 0, 0])) != []


def test_with_many_images_a_little_above_the_most_frequent_class_is_better():
    accuracy = rows([0.52])
    assert told(accuracy, Findings(images=[2_000, 5_000, 3_000])) == []
    assert told(accuracy, Findings(images=[20, 50, 30])) != []


def test_perfect_accuracy_on_few_images_is_no_guess():
    assert told(rows([1.0]), Findings(images=[18, 2, 0])) == []


def test_gates_that_are_all_zero():
    (line,) = told(rows([0.9]), Findings(FINDINGS.images, closed=["a", "b", "c", "d"]))
    assert line.startswith("All gates of 4 layers are zero") and "a, b, c, ..." in line


@pytest.mark.parametrize(
    "losses, stopped",
    [
        ([1, 0.7, 0.5, 0.6], False),  # the lowest loss in the third epoch of four
        ([1, 0.5, 0.6, 0.7, 0.7, 0.7], True),
        ([1, 0.5, 0.6, 0.49], False),
        ([0.1, 2, 2], False),  # too short to tell
        ([0.1, 2, 2, 2], True),
    ],
)
def test_a_training_loss_that_stopped_falling(losses, stopped):
    found = told(rows([0.9] * len(losses), train=losses))
    assert any("has not fallen since epoch" in line for line in found) == stopped
