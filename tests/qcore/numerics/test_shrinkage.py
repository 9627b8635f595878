"""Few samples are believed little and many a lot, and what is chosen serves samples that nobody has seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.refine import MomentSums
from qcore.numerics.rounding import round_second_order
from qcore.numerics.shrinkage import (
    MOST_INPUTS,
    RIDGES,
    SHRINKAGES,
    USUAL_SHRINKAGE,
    choose_ridge,
    choose_shrinkage,
    pulled,
    shrunk,
)

seeds = st.integers(0, 2**32 - 1)
INPUTS = 24


def inputs(seed, n):
    """Correlated inputs, (1, n, INPUTS), of a law that the seed fixes for all n."""
    mixing = np.random.default_rng(seed).standard_normal((INPUTS, INPUTS)) / 5 + np.eye(INPUTS)
    return (np.random.default_rng([seed, n]).standard_normal((1, n, INPUTS)) @ mixing).astype(np.float32)


def moments(x, y):
    sums = MomentSums(1, y.shape[2], x.shape[2])
    sums.add(x, y.astype(np.float32), np.arange(x.shape[1]))
    return sums.moments()


def weights(seed, outputs=8):
    return np.random.default_rng([seed, 1]).standard_normal((1, outputs, INPUTS))


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0, 1))
def test_a_shrunk_covariance_can_be_inverted_and_keeps_its_diagonal(seed, share):
    x = inputs(seed, 5)
    x[:, :, 3] = 1.0  # an input that never varies
    covariance = moments(x, np.zeros((1, 5, 1))).covariance
    made = shrunk(covariance, share)
    assert np.linalg.eigvalsh(made[0]).min() > 0
    grown = np.diagonal(made[0]) - np.diagonal(covariance[0])
    np.testing.assert_allclose(grown, 1e-3 * np.diagonal(covariance[0]).mean(), rtol=1e-6, atol=1e-11)
    off = ~np.eye(INPUTS, dtype=bool)
    np.testing.assert_allclose(made[0][off], (1 - share) * covariance[0][off])


def test_many_samples_that_are_all_distorted_pull_the_weights_to_what_undoes_it():
    x, w = inputs(0, 2000), weights(0)
    m = moments(0.5 * x, x @ np.swapaxes(w, 1, 2))
    ridge = choose_ridge(w, m)
    assert ridge == min(RIDGES)
    np.testing.assert_allclose(pulled(w, m, ridge), 2 * w, atol=0.25)


def test_a_few_noisy_samples_move_nothing():
    x, w = inputs(1, 30), weights(1)
    noise = np.random.default_rng(2).standard_normal((1, 30, 8)) * 3
    assert choose_ridge(w, moments(x, x @ np.swapaxes(w, 1, 2) + noise)) in (None, max(RIDGES))


def test_no_ridge_means_the_weights_themselves():
    x, w = inputs(1, 30), weights(1)
    assert pulled(w, moments(x, x @ np.swapaxes(w, 1, 2)), None) is w


def rounding_error(w, scale, covariance, share, truth):
    d = round_second_order(w, shrunk(covariance, share), scale, (-7, 7)) * scale[:, :, None] - w
    return float(((d @ truth) * d).sum())


@pytest.mark.parametrize("n", [12, 40, 4000])
def test_the_chosen_share_rounds_well_for_samples_that_nobody_saw(n):
    x, w = inputs(3, n), weights(3, 32)
    scale = np.abs(w).max(axis=2) / 7
    truth = moments(inputs(3, 50_000), np.zeros((1, 50_000, 1))).covariance
    m = moments(x, np.zeros((1, n, 32)))
    chosen = choose_shrinkage(w, m, scale, (-7, 7))
    errors = {share: rounding_error(w, scale, m.covariance, share, truth) for share in SHRINKAGES}
    assert errors[chosen] < 1.1 * min(errors.values())


def test_the_fewer_samples_the_less_they_are_believed():
    w = weights(4, 32)
    scale = np.abs(w).max(axis=2) / 7
    few, many = (choose_shrinkage(w, moments(inputs(4, n), np.zeros((1, n, 32))), scale, (-7, 7)) for n in (10, 4000))
    assert many < few


def test_without_halves_and_for_wide_layers_the_usual_shares_are_taken():
    x, w = inputs(5, 30), weights(5)
    sums = MomentSums(1, 8, INPUTS)
    sums.add(x, (x @ np.swapaxes(w, 1, 2)).astype(np.float32))
    assert choose_ridge(w, sums.moments()) is None
    assert choose_shrinkage(w, sums.moments(), np.ones((1, 8)), (-7, 7)) == USUAL_SHRINKAGE
    wide = np.zeros((1, 1, MOST_INPUTS + 1))
    assert choose_ridge(wide, moments(x, x @ np.swapaxes(w, 1, 2))) is None
