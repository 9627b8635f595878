"""Moments, the bias that follows from them, and weights for inputs that are not the float model's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.refine import (
    GridLayer,
    MomentSums,
    best_grid,
    corrected_bias,
    restored_gain,
)

seeds = st.integers(0, 2**32 - 1)


def rows(seed, groups=2, inputs=3, outputs=4, n=50):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((groups, n, inputs)) + rng.standard_normal((groups, 1, inputs))).astype(np.float32)
    w = rng.standard_normal((groups, outputs, inputs))
    y = x @ np.swapaxes(w, 1, 2) + rng.standard_normal((groups, 1, outputs))
    return x, y.astype(np.float32), w


def moments_of(x, y, parts=1):
    sums = MomentSums(x.shape[0], y.shape[2], x.shape[2])
    for a, b in zip(np.array_split(x, parts, axis=1), np.array_split(y, parts, axis=1), strict=True):
        sums.add(a, b)
    return sums.moments()


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 4))
def test_moments_are_means_and_covariances_however_they_were_added(seed, parts):
    x, y, _ = rows(seed)
    m = moments_of(x, y, parts)
    for g in range(2):
        joint = np.cov(np.hstack([y[g], x[g]]).astype(np.float64), rowvar=False, bias=True)
        np.testing.assert_allclose(m.covariance[g], joint[4:, 4:], atol=1e-4)
        np.testing.assert_allclose(m.cross[g], joint[:4, 4:], atol=1e-4)
    np.testing.assert_allclose(m.mean_in, x.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(m.mean_out, y.mean(axis=1), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_the_corrected_bias_restores_the_means(seed):
    x, y, w = rows(seed)
    scale = np.abs(w).max(axis=2) / 3
    integers = np.rint(w / scale[:, :, None])
    bias = corrected_bias(integers, scale, moments_of(x, y))
    made = x @ np.swapaxes(integers * scale[:, :, None], 1, 2) + bias[:, None, :]
    np.testing.assert_allclose(made.mean(axis=1), y.mean(axis=1), atol=1e-4)


def test_the_halves_are_the_moments_of_every_other_sample():
    x, y, _ = rows(9, n=60)
    sample = np.repeat(np.arange(20), 3)
    sums = MomentSums(2, 4, 3)
    sums.add(x[:, :33], y[:, :33], sample[:33])
    sums.add(x[:, 33:], y[:, 33:], sample[33:])
    m = sums.moments()
    assert m.halves is not None
    for parity, half in enumerate(m.halves):
        chosen = sample % 2 == parity
        alone = moments_of(x[:, chosen], y[:, chosen])
        np.testing.assert_allclose(half.covariance, alone.covariance, atol=1e-5)
        np.testing.assert_allclose(half.cross, alone.cross, atol=1e-5)
        np.testing.assert_allclose(half.mean_out, alone.mean_out, atol=1e-5)
    np.testing.assert_allclose(m.covariance, moments_of(x, y).covariance, atol=1e-5)


def test_one_sample_has_no_halves():
    x, y, _ = rows(9)
    sums = MomentSums(2, 4, 3)
    sums.add(x, y, np.zeros(x.shape[1], np.int64))
    assert sums.moments().halves is None
    assert moments_of(x, y).halves is None


def test_what_hardly_varies_around_a_large_mean_keeps_its_covariance():
    x, y, _ = rows(5, groups=1)
    far = (x + 3000).astype(np.float32)
    joint = np.cov(far[0].astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(moments_of(far, y, parts=3).covariance[0], joint, atol=1e-4)
    constant = np.full_like(x, 9.0)
    m = moments_of(constant, y, parts=2)
    np.testing.assert_array_equal(m.covariance, 0)


def test_without_a_bias_moments_are_about_zero():
    x, y, _ = rows(6)
    sums = MomentSums(2, 4, 3)
    sums.add(x, y)
    m = sums.moments(centred=False)
    np.testing.assert_allclose(m.covariance, np.swapaxes(x, 1, 2) @ x / 50, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(m.cross, np.swapaxes(y, 1, 2) @ x / 50, rtol=1e-4, atol=1e-4)
    assert not m.mean_in.any()
    assert not m.mean_out.any()


def test_a_restored_gain_makes_the_slope_one():
    x, y, w = rows(7, groups=1, n=400)
    scale = np.abs(w).max(axis=2) / 5
    faded = GridLayer(wanted=w, integers=np.rint(0.9 * w / scale[:, :, None]), scale=scale)
    mended = restored_gain(faded, moments_of(x, y))
    np.testing.assert_array_equal(mended.integers, faded.integers)
    made = x @ np.swapaxes(mended.integers * mended.scale[:, :, None], 1, 2)
    for wanted, ours in zip(y[0].T, made[0].T, strict=True):
        assert np.polyfit(wanted, ours, 1)[0] == pytest.approx(1, abs=1e-3)


def test_a_shared_scale_stays_shared_and_a_dead_layer_keeps_its_own():
    x, y, w = rows(8, groups=1)
    shared = GridLayer(wanted=w, integers=np.rint(w / 0.3), scale=np.full((1, 4), 0.3), shared=True)
    assert np.ptp(restored_gain(shared, moments_of(x, y)).scale) == 0
    dead = GridLayer(wanted=w, integers=0 * w, scale=np.full((1, 4), 0.3))
    np.testing.assert_array_equal(restored_gain(dead, moments_of(x, y)).scale, dead.scale)


def test_half_a_gain_is_its_root():
    x, y, w = rows(7, groups=1, n=400)
    scale = np.abs(w).max(axis=2) / 5
    faded = GridLayer(wanted=w, integers=np.rint(0.8 * w / scale[:, :, None]), scale=scale)
    m = moments_of(x, y)
    whole, half, none = (restored_gain(faded, m, share).scale for share in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(half**2, whole * none)
    np.testing.assert_array_equal(none, scale)


@settings(deadline=None, max_examples=20)
@given(seeds, st.booleans())
def test_the_best_grid_serves_every_output_best(seed, shared):
    x, y, w = rows(seed)
    metric = moments_of(x, y).covariance + 0.01 * np.eye(3)
    full = np.abs(w).max(axis=2) if not shared else np.full(w.shape[:2], np.abs(w).max())
    layer = GridLayer(wanted=w, integers=0 * w, scale=full, shared=shared)
    scales = [full / 3 * factor for factor in (1.0, 0.8, 0.6)]

    def error(made):
        d = made.integers * made.scale[:, :, None] - w
        return np.einsum("goi,gij,goj->go", d, metric, d)

    errors = np.stack([error(best_grid(layer, w, metric, [s], (-3, 3))) for s in scales])
    best = best_grid(layer, w, metric, scales, (-3, 3))
    np.testing.assert_array_equal(best.integers, np.rint(best.integers))
    assert np.abs(best.integers).max() <= 3
    if shared:
        assert error(best).sum() == pytest.approx(errors.sum(axis=(1, 2)).min())
        assert np.ptp(best.scale) == 0
    else:
        np.testing.assert_allclose(error(best), errors.min(axis=0))
