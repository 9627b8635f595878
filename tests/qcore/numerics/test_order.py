"""Bounds of medians: exact on small numbers, and sure enough of what is timed on machines that drift and stumble."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from qcore.derived import ratio_of, round_ratios
from qcore.measured import Rounds
from qcore.numerics.order import median_bounds, median_rank, runs_needed


@given(st.integers(1, 400), st.floats(0.55, 0.999))
def test_the_rank_is_the_smallest_that_is_sure_enough(n, confidence):
    sure = [k for k in range(1, n + 1) if binom.cdf(k - 1, n, 0.5) >= confidence]
    assert median_rank(n, confidence) == (sure[0] if sure else None)


def test_five_values_bound_a_median_at_95_percent_and_four_do_not():
    assert median_bounds([3.0, 1.0, 2.0, 5.0, 4.0], 0.95) == (1.0, 5.0)
    assert median_bounds([3.0, 1.0, 2.0, 5.0], 0.95) is None


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=60), st.integers(0, 59), st.floats(0, 5))
def test_a_slower_run_never_lowers_a_bound(values, which, more):
    slower = [v + more * (k == which % len(values)) for k, v in enumerate(values)]
    assert all(a <= b for a, b in zip(median_bounds(values, 0.95), median_bounds(slower, 0.95), strict=True))


@given(st.integers(5, 300), st.integers(0, 300))
def test_as_many_runs_as_are_asked_for_decide(n, inside):
    inside = min(inside, n)
    total = runs_needed(inside, n, 0.95)
    if 2 * inside <= n:
        assert total is None
    elif total is not None:
        rank = median_rank(total, 0.95)
        assert rank is not None
        assert rank <= inside / n * total + 1e-9  # so many values are inside then


def timed(rng, n, ratio):
    """Return rounds on a machine that drifts by a third, changes its pace at times, and stumbles in one call of ten."""
    pace = np.exp(np.cumsum(rng.normal(0, 0.02, n)) + 0.3 * np.sin(np.arange(n) / 40))
    pace *= np.where(rng.random() < 0.5, np.where(np.arange(n) > n * rng.random(), 1.7, 1.0), 1.0)
    columns = []
    for factor in (1.0, ratio):
        stumbles = np.where(rng.random(n) < 0.1, rng.pareto(1.1, n) + 1, 1.0)
        columns.append(factor * pace * rng.gamma(200, 1 / 200, n) * stumbles)
    first = np.arange(n) % 2  # who begins pays for a cold cache
    columns[0] *= 1 + 0.03 * (first == 0)
    columns[1] *= 1 + 0.03 * (first == 1)
    return Rounds(baseline=tuple(columns[0].tolist()), candidate=tuple(columns[1].tolist()))


@pytest.mark.parametrize(("n", "ratio"), [(20, 1.0), (200, 1.0), (200, 0.6), (1000, 1.0)])
def test_bounds_of_a_ratio_are_as_sure_as_they_say(n, ratio):
    rng, times = np.random.default_rng(n), 1500
    seen = [ratio_of(timed(rng, n, ratio)) for _ in range(times)]
    too_low, too_high = (sum(r.high < ratio for r in seen) / times, sum(r.low > ratio for r in seen) / times)
    allowed = 0.05 + 3 * (0.05 * 0.95 / times) ** 0.5
    assert max(too_low, too_high) <= allowed


def test_the_ratio_of_medians_would_not_be():
    """What pairing is for: a machine that changes its pace in the middle."""
    rng = np.random.default_rng(0)
    rounds = [timed(rng, 200, 1.0) for _ in range(300)]
    paired = [float(np.median(round_ratios(r))) for r in rounds]
    alone = [float(np.median(r.candidate) / np.median(r.baseline)) for r in rounds]
    assert np.std(paired) < 0.7 * np.std(alone)
