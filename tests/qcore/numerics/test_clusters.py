"""Clusters of numbers: no others of that many are better, and what has few values keeps them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.clusters import assign, cluster_centres, clustered

VALUES = hnp.arrays(np.float64, st.integers(1, 9), elements=st.floats(-4, 4, width=32))


def error(w, centres, **how):
    return float(np.sum((w - clustered(w, centres, **how)) ** 2))


def best(w, k):
    """The least error of any `k` runs of the sorted values, by trying all."""
    x = np.sort(w)
    runs = (np.split(x, cut) for cut in itertools.combinations(range(1, len(x)), k - 1))
    return min(sum(float(np.sum((r - r.mean()) ** 2)) for r in run) for run in runs)


@given(VALUES, st.integers(1, 9))
def test_no_other_centres_are_better(w, k):
    centres = cluster_centres(w, k)
    assert len(centres) <= k
    assert np.all(np.diff(centres) > 0)
    assert error(w, centres) == pytest.approx(best(w, min(k, len(w))), abs=1e-9)


@given(VALUES, st.integers(1, 9))
def test_every_value_goes_to_its_nearest_centre(w, k):
    centres = cluster_centres(w, k)
    distance = np.abs(w[:, None] - centres[None, :])
    np.testing.assert_allclose(np.abs(w - centres[assign(w, centres)]), distance.min(axis=1), atol=1e-12)


@given(VALUES)
def test_more_centres_are_never_worse_and_enough_are_exact(w):
    errors = [error(w, cluster_centres(w, k)) for k in range(1, 11)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    distinct = len(np.unique(w))
    assert np.array_equal(clustered(w, cluster_centres(w, distinct)), w)


@given(VALUES, st.integers(2, 6))
def test_zeros_stay_and_no_other_value_joins_them(w, k):
    w = np.append(w, [0.0, 0.0])
    centres = cluster_centres(w, k, keep_zeros=True)
    assert 0 in centres
    assert len(centres) <= k
    few = clustered(w, centres, keep_zeros=True)
    assert np.array_equal(few == 0, w == 0)
    if np.any(w != 0):
        assert error(w, centres, keep_zeros=True) == pytest.approx(
            best(w[w != 0], min(k - 1, np.sum(w != 0))), abs=1e-9
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("law", ["normal", "laplace", "uniform"])
def test_many_values_come_close_to_the_best(law, seed):
    """Twice as many values as the exact search takes: it finds what the search finds on a half, or better for all."""
    w = getattr(np.random.default_rng(seed), law)(size=20000).astype(np.float32)
    for k in (2, 16, 64):
        centres = cluster_centres(w, k)
        part = cluster_centres(w[:1000], k)
        assert error(w, centres) <= error(w, part)
        means = [w[assign(w, centres) == j].mean(dtype=np.float64) for j in range(k)]
        np.testing.assert_allclose(centres, means, atol=2e-3 * np.ptp(w))  # every centre is the mean of its values
    errors = [error(w, cluster_centres(w, k)) for k in (2, 3, 4, 8, 16, 32, 64, 128, 256)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_equal_values_far_from_zero_keep_their_digits():
    w = 1e6 + np.array([0.0, 0.01, 1.0, 1.01])
    np.testing.assert_allclose(cluster_centres(w, 2), [1e6 + 0.005, 1e6 + 1.005], rtol=1e-12)


@pytest.mark.parametrize(("w", "k", "zeros"), [([1.0], 0, False), ([1.0], 1, True), ([], 2, False)])
def test_nothing_to_cluster_is_refused(w, k, zeros):
    with pytest.raises(ValueError, match=r"allowed: \d clusters or more, and a value"):
        cluster_centres(np.array(w), k, keep_zeros=zeros)


def test_nothing_but_zeros():
    w = np.zeros((2, 3))
    assert np.array_equal(cluster_centres(w, 4, keep_zeros=True), [0.0])
    assert np.array_equal(clustered(w, cluster_centres(w, 4, keep_zeros=True), keep_zeros=True), w)
