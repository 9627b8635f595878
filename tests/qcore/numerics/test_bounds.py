"""The bounds keep the error rates that they state: exactly where counts can be summed over, else by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from qcore.numerics.bounds import (
    mean_of,
    paired_lower_bound,
    paired_p_value,
    rate_lower_bound,
    roc_area,
    roc_areas,
    upper_bound,
)


# Tango 1998, table 3 (two-sided 95 % intervals of (b - c) / n): the limits are the one-sided ones at 97.5 %.
@pytest.mark.parametrize(
    ("b", "c", "n", "lower"),
    [(12, 2, 50, 0.0565), (0, 0, 44, -0.0803), (5, 0, 30, 0.0309)],
)
def test_the_bound_is_tangos_less_half_a_sample(b, c, n, lower):
    bound = paired_lower_bound(b, c, n, 0.975)
    assert lower - 1.6 / n <= bound <= lower


def exact_error(n, drop, discordant, alpha):
    """Return the probability that a test of `drop` at `alpha` passes where that is the true drop."""
    p_win, p_loss = (discordant - drop) / 2, (discordant + drop) / 2
    wins = np.arange(int(binom.ppf(1e-9, n, p_win)), int(binom.isf(1e-9, n, p_win)) + 1)
    most = []  # losses that pass, for each number of wins
    for w in wins.tolist():
        low, high = -1, n - w + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if paired_p_value(w, middle, n, drop) <= alpha else (low, middle)
        most.append(low)
    losses = np.array(most)
    given_wins = np.where(losses >= 0, binom.cdf(losses, n - wins, p_loss / (1 - p_win)), 0.0)
    return float(np.sum(binom.pmf(wins, n, p_win) * given_wins))


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01, 0.0005])
@pytest.mark.parametrize("n", [60, 200, 268, 299, 364, 1000, 10_000])
def test_the_exact_error_of_the_paired_test_is_at_most_the_stated_one(n, alpha):
    for drop in (0.005, 0.01, 0.05, 0.2):
        for discordant in (drop, drop + 0.002, drop + 0.02, drop + 0.1):
            assert exact_error(n, drop, discordant, alpha) <= alpha


@pytest.mark.parametrize("n", [200, 1000, 10_000])
@pytest.mark.parametrize("discordant", [0.01, 0.02, 0.06])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_at_a_true_drop_equal_to_the_limit_at_most_the_stated_share_passes(n, discordant, confidence):
    rng = np.random.default_rng(n)
    p_win, p_loss = (discordant - 0.01) / 2, (discordant + 0.01) / 2
    counts = rng.multinomial(n, [p_win, p_loss, 1 - p_win - p_loss], size=3000)
    passed = np.mean([paired_lower_bound(w, k, n, confidence) >= -0.01 for w, k in counts[:, :2].tolist()])
    assert passed <= 1 - confidence + 3 * np.sqrt(confidence * (1 - confidence) / 3000)


@pytest.mark.parametrize("n", [200, 1000, 10_000])
@pytest.mark.parametrize("shared", [0.0, 0.9])  # of the baseline's errors, how many come from hard samples of both
@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_whether_errors_are_correlated_does_not_matter(n, shared, rate):
    rng, limit, runs = np.random.default_rng(n), 0.01, 2000
    hard, own = shared * rate, (1 - shared) * rate / (1 - shared * rate)  # P(wrong) = hard + (1 - hard) own
    worse = own + limit / (1 - hard)
    easy = rng.binomial(n, 1 - hard, size=runs)
    losses = rng.binomial(easy, worse * (1 - own))
    wins = rng.binomial(easy - losses, own * (1 - worse) / (1 - worse * (1 - own)))
    counts = zip(wins.tolist(), losses.tolist(), strict=True)
    passed = np.mean([paired_p_value(w, k, n, limit) <= 0.05 for w, k in counts])
    assert passed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(100, 3000), st.floats(0.86, 0.99))
def test_more_losses_never_help(wins, losses, n, confidence):
    bound = paired_lower_bound(wins, losses, n, confidence)
    assert paired_lower_bound(wins, losses + 1, n, confidence) <= bound + 1e-12
    assert paired_lower_bound(wins + 1, losses, n, confidence) >= bound - 1e-12
    assert bound <= (wins - losses) / n
    assert paired_lower_bound(wins, losses, n, min(0.999, confidence + 0.005)) <= bound + 1e-12


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(100, 3000), st.floats(0.002, 0.3))
def test_bound_and_p_value_agree(wins, losses, n, drop):
    p = paired_p_value(wins, losses, n, drop)
    for confidence in (0.86, 0.95, 0.999):
        if abs(p - (1 - confidence)) > 1e-9:
            assert (paired_lower_bound(wins, losses, n, confidence) >= -drop) == (p <= 1 - confidence)


@given(st.integers(1, 2000), st.floats(0.6, 0.999))
def test_a_rate_bound_lies_below_the_rate(n, confidence):
    for hits in {0, 1, n // 2, n}:
        assert 0 <= rate_lower_bound(hits, n, confidence) <= hits / n + 1e-12


@pytest.mark.parametrize("n", [50, 500, 5000])
@pytest.mark.parametrize("rate", [0.8, 0.97, 0.999])
def test_the_exact_error_of_a_rate_bound_is_at_most_the_stated_one(n, rate):
    hits = np.arange(n + 1)
    passes = np.array([rate_lower_bound(h, n, 0.95) >= rate for h in hits.tolist()])
    assert binom.pmf(hits, n, rate)[passes].sum() <= 0.05


COLUMNS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    "skewed to the other side": lambda rng, size: 1 - rng.exponential(size=size),
    "a tenth exponential": lambda rng, size: (rng.random(size) < 0.1) * rng.exponential(size=size) - 0.1,
    "rare and large": lambda rng, size: rng.normal(size=size) * 0.3 + (rng.random(size) < 0.05) * 5 - 0.25,
    "of errors": lambda rng, size: (
        np.abs(1.1 * rng.normal(size=size)) - np.abs(rng.normal(size=size)) - 0.1 * np.sqrt(2 / np.pi)
    ),
}


@pytest.mark.parametrize("n", [200, 1000, 10_000])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_bound_of_a_mean_covers_it_as_often_as_stated(name, n):
    runs = 2000 if n < 10_000 else 300
    rng = np.random.default_rng(n)
    missed = sum(upper_bound(mean_of(COLUMNS[name](rng, n)), 1, 0.95) < 0 for _ in range(runs))
    assert missed / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_students_bound_would_not():
    rng = np.random.default_rng(200)
    columns = COLUMNS["a tenth exponential"](rng, (2000, 200))
    student = columns.mean(axis=1) + 1.6525 * columns.std(axis=1, ddof=1) / np.sqrt(200)  # t of 199 degrees
    assert np.mean(student < 0) > 0.09


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=60), st.floats(0.8, 0.999))
def test_the_bound_of_a_mean_lies_above_it_and_nears_it_with_more_samples(values, confidence):
    estimate = mean_of(np.array(values))
    bounds = [upper_bound(estimate, f, confidence) for f in (1, 10**8)]
    assert estimate.value <= bounds[1] <= bounds[0] + 1e-9
    assert bounds[1] - estimate.value <= 0.05 + 1e-9


def test_equal_values_are_their_mean():
    assert upper_bound(mean_of(np.full(100, 0.1)), 1, 0.95) == pytest.approx(0.1, abs=1e-15)


def test_areas_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    positive, scores = rng.random(60) < 0.3, rng.integers(0, 9, 60).astype(float)  # with ties
    high, low = scores[positive], scores[~positive]
    pairs = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
    assert roc_area(positive, scores) == pytest.approx(pairs, abs=1e-12)
    areas = roc_areas(positive, scores, -scores)
    assert (areas.baseline, areas.candidate) == pytest.approx((pairs, 1 - pairs))


def test_the_variance_is_delongs():
    """The jackknife over samples of either kind estimates the same and is made in another way."""
    rng = np.random.default_rng(1)
    positive = np.arange(900) < 300
    base = rng.normal(size=900) + positive
    ours = base + rng.normal(size=900)
    areas = roc_areas(positive, base, ours)
    spread = 0.0
    for kind in (positive, ~positive):
        left = []
        for k in np.flatnonzero(kind):
            keep = np.arange(900) != k
            left.append(roc_area(positive[keep], base[keep]) - roc_area(positive[keep], ours[keep]))
        spread += (len(left) - 1) / len(left) * np.sum((np.array(left) - np.mean(left)) ** 2)
    assert areas.drop.variance == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize(("positives", "negatives"), [(20, 200), (50, 50), (200, 1000)])
@pytest.mark.parametrize("apart", [1.0, 3.0])
def test_the_bounds_of_areas_cover_them_as_often_as_stated(positives, negatives, apart):
    rng, runs = np.random.default_rng(positives), 1000
    positive = np.arange(positives + negatives) < positives
    huge = np.arange(400_000) < 200_000
    z = rng.normal(size=400_000) + apart * huge
    truth = roc_areas(huge, z + 0.3 * rng.normal(size=z.size), z + 0.6 * rng.normal(size=z.size))
    missed = np.zeros(2)
    for _ in range(runs):
        z = rng.normal(size=positive.size) + apart * positive
        a = roc_areas(positive, z + 0.3 * rng.normal(size=z.size), z + 0.6 * rng.normal(size=z.size))
        missed += (
            upper_bound(a.drop, 1, 0.95) < truth.baseline - truth.candidate,
            upper_bound(a.missing, 1, 0.95) < 1 - truth.candidate,
        )
    assert (missed / runs <= 0.055 + 3 * np.sqrt(0.05 * 0.95 / runs)).all()
