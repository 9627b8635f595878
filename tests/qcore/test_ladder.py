"""The ladder: cheapest first, up to the first pass; more bits are asked for only where everything fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcore.compression import check_order
from qcore.ladder import Attempt, climb, rungs, with_precisions
from qcore.target import load_target

outcomes = st.sampled_from(["pass", "fail", "inconclusive"])
RUNGS = rungs(load_target("x86-vnni"))
N = len(RUNGS)
results = st.lists(st.tuples(outcomes, st.floats(0, 10)), min_size=N, max_size=N)


def synthetic(outcome, recipe, error):
    return Attempt(recipe=recipe.name, outcome=outcome, reason="top1: why", error=error, size_bytes=1)


def climbed(planned, more=None):
    """Climb the rungs of x86 with `planned` results; `more` is what a recipe with more bits gets, if one is."""
    recipes, tried, asked = RUNGS, [], []

    def attempt(recipe):
        tried.append(recipe)
        outcome, error = planned[recipes.index(recipe)] if recipe in recipes else more
        return synthetic(outcome, recipe, error)

    def more_bits(recipe):
        asked.append(recipe)
        return with_precisions(recipe, {"a": "float"}) if more is not None else None

    return climb(recipes, attempt, more_bits), recipes, tried, asked


@given(results, st.one_of(st.none(), st.tuples(outcomes, st.floats(0, 10))))
def test_it_stops_at_the_first_pass_and_else_takes_the_nearest(planned, more):
    result, recipes, tried, asked = climbed(planned, more)
    first = next((k for k, (outcome, _) in enumerate(planned) if outcome == "pass"), None)
    assert [a.recipe for a in result.attempts] == [r.name for r in tried]
    if first is not None:
        assert result.chosen == first == len(tried) - 1
        assert asked == []
        assert result.why == f"{recipes[first].name} is the first that passes the gate's policy (top1: why)"
        return
    assert tried[:N] == list(recipes)
    all_fail = all(outcome == "fail" for outcome, _ in planned)
    nearest = min(range(N), key=lambda k: planned[k][1])
    assert asked == ([recipes[nearest]] if all_fail else [])
    if all_fail and more is not None and more[0] == "pass":
        assert result.chosen == N
        assert tried[N].name == "auto-mixed-precision"
        return
    errors = [a.error for a in result.attempts]
    assert errors[result.chosen] == min(errors)
    assert result.why.startswith(f"no recipe passes; {result.attempts[result.chosen].recipe} is nearest to float")
    undecided = any(a.outcome == "inconclusive" for a in result.attempts)
    assert ("the samples do not decide: evaluate on more" in result.why) == undecided
    assert ("what needs no training is exhausted" in result.why) != undecided


@pytest.mark.parametrize("target", ["x86-vnni", "npu-int8-symmetric", "fixed-point-pow2", "tensorrt"])
def test_rungs_are_recipes_that_the_target_can_use(target):
    profile = load_target(target)
    recipes = rungs(profile)
    names = [r.name for r in recipes]
    assert len(set(names)) == len(names)
    assert all(n.startswith("auto-") for n in names)
    assert len({r.sha256 for r in recipes}) == len(recipes)
    for recipe in recipes:
        check_order(recipe)
        assert recipe.quantize_step.per_channel is not True or profile.weights_per_channel
    assert names[0] == "auto-per-tensor"
    assert ("auto-per-channel" in names) == profile.weights_per_channel
    cheap = [r.needs_samples for r in recipes]
    assert cheap == sorted(cheap)  # what runs samples comes after what only needs ranges


def test_more_bits_change_only_the_quantize_step():
    recipe = rungs(load_target("npu-int8-symmetric"))[-1]
    wider = with_precisions(recipe, {"a": "int16", "b": "float"})
    assert wider.quantize_step.precision == {"a": "int16", "b": "float"}
    assert [s for s in wider.steps if s.method != "quantize"] == [s for s in recipe.steps if s.method != "quantize"]
    assert wider.quantize_step.model_copy(update={"precision": {}}) == recipe.quantize_step
