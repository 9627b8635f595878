"""The ladder: cheapest first, up to the first pass; more bits are asked for only where the model is at fault."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcore.ladder import Attempt, climb, obstacle_of, out_of_reach, rungs, with_precisions
from qcore.numerics.bounds import paired_lower_bound
from qcore.recipe import check_order
from qcore.report import Check, GateDecision
from qcore.target import load_target

states = st.sampled_from([("pass", None), ("fail", "model"), ("fail", "samples"), ("inconclusive", "samples")])
states |= st.sampled_from([("inconclusive", "model"), ("fail", "budget")])
RUNGS = rungs(load_target("x86-vnni"))
N = len(RUNGS)
results = st.lists(st.tuples(states, st.floats(0, 10)), min_size=N, max_size=N)
reachable = st.sampled_from([None, "top1_drop: too few"])
TRAIN = "hand over to training: qcore finetune --method qat"


def synthetic(state, recipe, error):
    return Attempt(
        recipe=recipe.name, outcome=state[0], reason="top1: why", error=error, size_bytes=1, obstacle=state[1]
    )


def wider(recipe, precisions):
    return with_precisions(recipe, precisions, ["a", "b", "c"], "wider")


def climbed(planned, more=None, unreachable=None):
    """Climb the rungs of x86 with `planned` results; `more` is what a recipe with more bits gets, if one is."""
    recipes, tried, asked = RUNGS, [], []

    def attempt(recipe):
        tried.append(recipe)
        state, error = planned[recipes.index(recipe)] if recipe in recipes else more
        return synthetic(state, recipe, error)

    def more_bits(recipe):
        asked.append(recipe)
        return (wider(recipe, {"a": "float"}) if more is not None else None), "searched"

    return climb(recipes, attempt, more_bits, unreachable), recipes, tried, asked


@given(results, st.one_of(st.none(), st.tuples(states, st.floats(0, 10))), reachable)
def test_it_stops_at_the_first_pass_and_else_takes_the_nearest(planned, more, unreachable):
    result, recipes, tried, asked = climbed(planned, more, unreachable)
    first = next((k for k, (state, _) in enumerate(planned) if state[0] == "pass"), None)
    assert [a.recipe for a in result.attempts] == [r.name for r in tried]
    if first is not None:
        assert result.chosen == first == len(tried) - 1
        assert asked == []
        assert result.why == f"{recipes[first].name} is the first that passes the gate's policy (top1: why)"
        return
    assert tried[:N] == list(recipes)
    nearest = min(range(N), key=lambda k: planned[k][1])
    blamed = planned[nearest][0][1] == "model"
    assert asked == ([recipes[nearest]] if blamed else [])  # not where samples or a size limit are the obstacle
    if blamed and more is not None and more[0][0] == "pass":
        assert result.chosen == N
        assert tried[N].name == "wider"
        return
    errors = [a.error for a in result.attempts]
    assert errors[result.chosen] == min(errors)  # never one that is worse on held-out samples
    best = result.attempts[result.chosen]
    assert result.why.startswith(f"no recipe passes; {best.recipe} is nearest to float")
    assert ("mixed precision: searched" in result.why) == blamed
    if unreachable:
        assert result.why.endswith("not even the float model would pass (top1_drop: too few): evaluate on more")
    elif best.obstacle == "samples":
        assert result.why.endswith(f"the samples do not decide: evaluate on more, or {TRAIN}")
    elif best.obstacle == "budget":
        assert "bits do not help against a limit of size or latency" in result.why
    else:
        assert result.why.endswith(f"what needs no training is exhausted: {TRAIN}")


def test_the_climb_knows_its_pareto_front():
    planned = [(("fail", "samples"), float(N - k)) for k in range(N)]
    assert climbed(planned)[0].pareto == (N - 1,)


def decided(*checks):
    outcomes = {c.outcome for c in checks}
    outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    d = "0" * 64
    return GateDecision(
        outcome=outcome,
        checks=checks,
        confidence=0.95,
        n=1,
        model_sha256=d,
        baseline_sha256=d,
        data_sha256=d,
        policy_sha256=d,
        report_sha256=d,
        qcore_version="0",
    )


def drop(lost, won, n, limit=0.01):
    bound, observed = paired_lower_bound(won, lost, n, 0.95), (won - lost) / n
    outcome = "pass" if bound >= -limit else "fail" if observed < -limit else "inconclusive"
    return decided(
        Check(name="top1_drop", outcome=outcome, observed=observed, bound=bound, limit=-limit, reason="counted")
    )


@pytest.mark.parametrize(
    ("lost", "won", "n", "outcome", "obstacle"),
    [
        (0, 0, 400, "pass", None),
        (4, 5, 400, "inconclusive", "samples"),  # MobileNetV2 after rounding, on 400 images
        (5, 0, 400, "fail", "samples"),  # one image too many: no reason for 16-bit layers
        (51, 7, 400, "fail", "model"),
        (315, 1, 400, "fail", "model"),
        (130, 50, 10_000, "inconclusive", "model"),  # 0.8 points, known to 0.2: more samples would hardly help
        (170, 60, 10_000, "fail", "model"),
        (40, 30, 10_000, "pass", None),
    ],
)
def test_bits_are_asked_for_where_the_model_is_at_fault_and_not_the_number_of_samples(lost, won, n, outcome, obstacle):
    decision = drop(lost, won, n)
    assert decision.outcome == outcome
    assert obstacle_of(decision, drop(0, 0, n)) == obstacle


def test_a_policy_that_float_itself_cannot_pass_is_out_of_reach():
    assert out_of_reach(drop(0, 0, 400)) is None
    assert "top1_drop: counted" in out_of_reach(drop(0, 0, 100))


def check(name, observed, limit, at_most=False):
    holds = observed <= limit if at_most else observed >= limit
    return Check(
        name=name,
        outcome="pass" if holds else "fail",
        observed=observed,
        bound=observed,
        limit=limit,
        reason="measured",
    )


def test_limits_of_size_and_what_float_fails_are_not_mended_by_bits():
    large = check("size_ratio", 0.5, 0.3, at_most=True)
    itself = decided(check("output_sqnr_db", 300.0, 20.0), check("size_ratio", 1.0, 0.3, at_most=True))
    assert out_of_reach(itself) is None  # the float model may be too large
    assert obstacle_of(decided(check("output_sqnr_db", 10.0, 20.0), large), itself) == "budget"
    small = check("size_ratio", 0.25, 0.3, at_most=True)
    assert obstacle_of(decided(check("output_sqnr_db", 10.0, 20.0), small), itself) == "model"
    poor = decided(check("top1_min", 0.7, 0.8))
    assert "top1_min: measured" in out_of_reach(poor)
    assert obstacle_of(decided(check("top1_min", 0.5, 0.8)), poor) == "samples"


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
    wide = wider(recipe, {"a": "int16", "b": "float"})
    assert wide.quantize_step.precision == {"a": "int16", "b": "float"}
    assert [s for s in wide.steps if s.method != "quantize"] == [s for s in recipe.steps if s.method != "quantize"]
    assert wide.quantize_step.model_copy(update={"precision": {}}) == recipe.quantize_step
    assert wider(recipe, {}) is recipe
    floats = wider(recipe, dict.fromkeys("abc", "float"))  # nothing is left to quantize or to mend
    assert [s.method for s in floats.steps] == ["fold-batchnorm", "gemm-head"]
