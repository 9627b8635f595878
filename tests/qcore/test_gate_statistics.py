"""Of candidates that are exactly as much worse as is allowed, no more pass than the policy's confidence leaves.

Simulated through the checks that the gate makes; that the bounds themselves hold is in `numerics/test_bounds.py`.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import classified, valued, with_champion

from qcore.gate import decide
from qcore.groups import Counts, Family, judge_groups
from qcore.noninferiority import FEWEST_DIFFERENT, loss_check, share_check
from qcore.policy import ErrorLimit, GatePolicy, MetricLimit, ValueLimit

LIMIT = 0.02
SIZES = [200, 1000, 10_000]


def most(rate, runs):
    """Return the share of passes that is still `rate` within three standard errors of the simulation."""
    return rate + 3 * np.sqrt(rate * (1 - rate) / runs)


def three_models(rng, n, shared):
    """Return who is right of candidate, baseline and champion.

    Baseline and champion are wrong on 10 % of samples, the candidate on 12 %; of the 10 % the share `shared` are
    samples that are too hard for all three.
    """
    hard = rng.random(n) < 0.1 * shared
    own = (1 - shared) * 0.1 / (1 - 0.1 * shared)
    worse = (0.1 + LIMIT - 0.1 * shared) / (1 - 0.1 * shared)
    return [~hard & (rng.random(n) >= rate) for rate in (worse, own, own)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_a_drop_equal_to_the_limit_rarely_passes_against_either_rival_or_both(n, shared):
    rng, runs = np.random.default_rng(n), 800
    passed = np.zeros(3)
    for _ in range(runs):
        ours, *rivals = three_models(rng, n, shared)
        counts = [(int((ours & ~r).sum()), int((r & ~ours).sum()), n) for r in rivals]
        found = [share_check("x", c, LIMIT, 0.95).outcome == "pass" for c in counts]
        passed += [*found, all(found)]
    assert (passed / runs <= most(0.05, runs)).all()


@pytest.mark.parametrize("n", [200, 1000])
def test_the_whole_decision_keeps_the_rate_of_its_check_against_the_champion(n):
    rng, runs = np.random.default_rng(n), 200
    policy = GatePolicy(top1=MetricLimit(max_drop_champion=LIMIT), confidence=0.9)
    passed = 0
    for _ in range(runs):
        named = [tuple((~right).astype(int).tolist()) for right in three_models(rng, n, 0.5)]
        found = with_champion(classified((0,) * n, named[1], named[0]), named[2])
        passed += decide(found, policy).outcome == "pass"
    assert passed / runs <= most(0.1, runs)


@pytest.mark.parametrize("n", SIZES)
def test_rare_classes_that_lost_the_limit_are_rarely_all_called_good(n):
    """Class sizes differ by chance and by a factor of a hundred; every class has lost exactly the limit."""
    rng, runs, limit = np.random.default_rng(n), 600, 0.05
    shares = np.array([0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 0.005, 0.005])
    family = Family(name="classes_drop", max_drop=limit, min_support=20, require=False, confidence=0.95, total=n)
    wrong = passed = 0
    for _ in range(runs):
        sizes = rng.multinomial(n, shares)
        counts = [rng.multinomial(size, [0.03, 0.08, 0.89]) for size in sizes]
        counted = {
            str(k): Counts(n=int(size), wins=int(c[0]), losses=int(c[1]))
            for k, (size, c) in enumerate(zip(sizes, counts, strict=True))
            if size
        }
        check = judge_groups(family, counted)
        wrong += any(g.outcome == "pass" for g in check.groups)
        passed += check.outcome == "pass"
    assert wrong / runs <= most(0.05, runs)
    assert passed <= wrong


DIFFERENCES = {
    "equal": (lambda rng, k: np.ones(k), 1.0),
    "exponential": (lambda rng, k: rng.exponential(size=k), 1.0),
    "lognormal": (lambda rng, k: rng.lognormal(0, 1, k), np.exp(0.5)),
    "normal of both signs": (lambda rng, k: rng.normal(size=k) + 0.5, 0.5),
    "exponential of both signs": (
        lambda rng, k: rng.exponential(size=k) * np.where(rng.random(k) < 0.25, -1, 1),
        0.5,
    ),
    "equal of both signs": (lambda rng, k: np.where(rng.random(k) < 0.4, -1.0, 1.0), 0.2),
}


@pytest.mark.parametrize(("n", "expected"), [(n, e) for n in SIZES for e in (2, 10, 30, 100) if e <= n / 4])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_rare_differences_keep_the_stated_error(kind, expected, n):
    draw, mean = DIFFERENCES[kind]
    rng, runs = np.random.default_rng(n + expected), 1000 if n < 10_000 else 300
    passed = 0
    for _ in range(runs):
        losses = np.zeros(n)
        k = rng.binomial(n, expected / n)
        losses[:k] = draw(rng, k)
        passed += loss_check("x", losses, -mean * expected / n, 0.95).outcome == "pass"
    assert passed / runs <= most(0.055, runs)


def test_one_difference_in_a_hundred_used_to_pass_too_often():
    """The case that the rule is for: 200 samples, a true loss equal to the limit, most sets show next to nothing."""
    rng, runs, passed = np.random.default_rng(0), 500, 0
    policy = GatePolicy(mae=ErrorLimit(max_increase=0.01))
    for _ in range(runs):
        base = rng.exponential(size=200)
        ours = base + rng.exponential(size=200) * (rng.random(200) < 0.01)
        passed += decide(valued("regression", absolute_error=(base, ours)), policy).outcome == "pass"
    assert passed == 0  # 23 % with the bound alone


def test_too_few_differences_say_how_many_samples_show_enough():
    losses = np.zeros(1000)
    losses[:5] = 0.01
    check = loss_check("x", losses, -0.5, 0.95)
    assert (check.outcome, check.needs_samples) == ("inconclusive", 1000 * FEWEST_DIFFERENT // 5 - 1000)
    assert f"{FEWEST_DIFFERENT} that differ are needed" in check.reason
    none = loss_check("x", np.zeros(1000), -0.5, 0.95)
    assert (none.outcome, none.needs_samples) == ("inconclusive", None)
    assert loss_check("x", np.zeros(1000), -0.5, 0.95, same=True).outcome == "pass"
    assert loss_check("x", np.zeros(99), -0.5, 0.95, same=True).outcome == "inconclusive"


def hits(base, ours):
    found = valued("none", hit=(base, ours))
    metrics = {"hit": float(np.mean(ours)), "baseline_hit": float(np.mean(base))}
    return replace(found, user_metrics={"hit": "higher"}, metrics={**found.metrics, **metrics})


@pytest.mark.parametrize(("n", "lost", "outcome"), [(400, 0, "pass"), (100, 0, "inconclusive"), (400, 5, "fail")])
def test_a_metric_of_zeros_and_ones_is_a_share(n, lost, outcome):
    base, ours = np.ones(n), np.ones(n)
    ours[:lost] = 0
    (check,) = decide(hits(base, ours), GatePolicy(metrics={"hit": ValueLimit(max_loss=0.01)})).checks
    expected = share_check("hit_change", (0, lost, n), 0.01, 0.95)
    assert check == expected
    assert check.outcome == outcome


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 5), min_size=120, max_size=400), st.integers(1, 6))
def test_more_of_a_loss_everywhere_never_helps(losses, more):
    order = ["fail", "inconclusive", "pass"]
    column = np.array(losses) + 0.25  # never 0, before and after
    before, after = (loss_check("x", c, -0.5, 0.95).outcome for c in (column, column + more / 2))
    assert order.index(after) <= order.index(before)
