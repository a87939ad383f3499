"""The section model.convert: gate factors by name, and targets."""

import inspect

import pytest

from dgc_fastai import convert
from dgc_fastai.recipe.loading import parse_recipe
from dgc_fastai.utils.errors import RecipeError

TEXT = """
name: foreign
model: {arch: resnet18, convert: {heads: 2}}
data: {name: digits}
train: {epochs: 1}
"""
CHOSEN = {"*.conv1": 1, "*": 0.5}


def recipe(*overrides):
    return parse_recipe(TEXT, "foreign.yaml", overrides)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.convert.gate_factor=0", ": use a share in (0, 1], or one for each name"),
        ("model.convert.gate_factor={a: 2}", ": use a share in (0, 1], or one for each name"),
        ("model.convert.gate_factor={}", ": give a gate factor to each name, such as {'layer1.*'"),
        ("model.convert.gate_factor=[1]", ": use a share in (0, 1], or one for each name"),
        ("model.convert.target=1", "model.convert.target=1: input should be less than 1, not 1"),
        ("model.convert={target: 0.5, target_ms: 3}", "target and target_ms exclude each other"),
    ],
)
def test_a_mistake_in_an_override_names_it(override, message):
    with pytest.raises(RecipeError) as error:
        recipe(override)
    assert message in str(error.value) and str(error.value).startswith(override) and "\n" not in str(error.value)


def test_the_resolved_recipe_loads_as_the_same():
    one = recipe(f"model.convert.gate_factor={CHOSEN}", "model.convert.target=0.5")
    assert parse_recipe(one.to_yaml(), "again") == one
    assert one.model.convert.gate_factor == CHOSEN and not one.model.convert.has_to_choose
    assert list(one.model.convert.gate_factor) == list(CHOSEN), "the order counts"
    keywords = one.model.convert.keywords()
    assert (keywords["heads"], keywords["gate_factor"]) == (2, CHOSEN)
    assert keywords.keys() == inspect.signature(convert).parameters.keys() - {"model", "input_size"}


def test_what_was_chosen_for_a_target_is_taken_for_this_target_only():
    begun = recipe("model.convert.target=0.5").with_gate_factor(CHOSEN)
    assert recipe("model.convert.target=0.5").model.convert.has_to_choose
    assert recipe("model.convert.target=0.5").with_choice_of(begun) == begun
    own = recipe("model.convert.target=0.5").with_gate_factor({"*": 0.3})
    others = [recipe(), own, recipe("model.convert.target=0.4"), recipe("model.convert.target_ms=0.5")]
    for one in (*others, recipe("model.convert=null")):
        assert one.with_choice_of(begun) == one
    for one in (None, recipe(), recipe("model.convert.target=0.5"), recipe("model.convert=null")):
        assert recipe("model.convert.target=0.5").with_choice_of(one) == recipe("model.convert.target=0.5")


def test_a_recipe_without_its_choice_is_that_before():
    planned = recipe("model.convert.target=0.5")
    assert planned.with_gate_factor(CHOSEN).without_choice() == planned == planned.without_choice()
    for one in (recipe(), recipe(f"model.convert.gate_factor={CHOSEN}"), recipe("model.convert=null")):
        assert one.without_choice() == one


def test_another_target_for_a_run_s_recipe_is_chosen_for_anew():
    text = recipe("model.convert.target=0.5").with_gate_factor(CHOSEN).to_yaml()
    assert not parse_recipe(text, "run").model.convert.has_to_choose
    other = parse_recipe(text, "run", ["model.convert.target=0.4"]).model.convert
    assert other.target == 0.4 and other.has_to_choose
