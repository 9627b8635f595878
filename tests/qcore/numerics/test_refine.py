"""Moments, the bias that follows from them, and weights for inputs that are not the float model's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.refine import (
    GridLayer,
    MomentSums,
    best_scales,
    corrected_bias,
    refined_weights,
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


def output_error(x, y, layer, q):
    made = x @ np.swapaxes(q * layer.scale[:, :, None], 1, 2)
    made = made - made.mean(axis=1, keepdims=True)
    return float(((made - (y - y.mean(axis=1, keepdims=True))) ** 2).sum())


def test_pulled_weights_answer_to_the_inputs_that_come():
    """Inputs arrive distorted (x = 0.5 of what the float layer saw): weights twice as large make up for it."""
    x, y, w = rows(3, groups=1, n=400)
    seen = (0.5 * x).astype(np.float32)
    layer = GridLayer(wanted=w, integers=np.rint(w / 0.01), scale=np.full(w.shape[:2], 0.01))
    m = moments_of(seen, y)
    held, pulled = (refined_weights(layer, m, (-999, 999), 0.01, pull).integers for pull in (None, 1e-4))
    np.testing.assert_allclose(held * 0.01, w, atol=0.02)
    np.testing.assert_allclose(pulled * 0.01, 2 * w, atol=0.05)
    assert output_error(seen, y, layer, pulled) < 0.01 * output_error(seen, y, layer, held)


def test_a_firm_pull_changes_nothing():
    x, y, w = rows(4, groups=1)
    layer = GridLayer(wanted=w, integers=np.rint(w / 0.1), scale=np.full(w.shape[:2], 0.1))
    m = moments_of((0.5 * x).astype(np.float32), y)
    firm, none = (refined_weights(layer, m, (-99, 99), 0.01, pull).integers for pull in (1e9, None))
    np.testing.assert_array_equal(firm, none)


def test_what_hardly_varies_around_a_large_mean_keeps_its_covariance():
    x, y, w = rows(5, groups=1)
    far = (x + 3000).astype(np.float32)
    joint = np.cov(far[0].astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(moments_of(far, y, parts=3).covariance[0], joint, atol=1e-4)
    constant = np.full_like(x, 9.0)
    m = moments_of(constant, y, parts=2)
    np.testing.assert_array_equal(m.covariance, 0)
    layer = GridLayer(wanted=w, integers=np.rint(w / 0.1), scale=np.full(w.shape[:2], 0.1))
    assert np.isfinite(refined_weights(layer, m, (-99, 99), 0.01, None).integers).all()


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


@settings(deadline=None, max_examples=20)
@given(seeds, st.booleans())
def test_the_best_of_several_grids_serves_every_output_best(seed, shared):
    x, y, w = rows(seed)
    m = moments_of(x, y)
    full = np.abs(w).max(axis=2) if not shared else np.full(w.shape[:2], np.abs(w).max())
    tried = []
    for factor in (1.0, 0.8, 0.6):
        layer = GridLayer(wanted=w, integers=0 * w, scale=full / 3 * factor, shared=shared)
        tried.append(refined_weights(layer, m, (-3, 3), 0.01, None))

    def error(layer):
        d = layer.integers * layer.scale[:, :, None] - w
        return np.einsum("goi,gij,goj->go", d, m.covariance, d)

    best = best_scales(tried, m, shared)
    errors = np.stack([error(t) for t in tried])
    if shared:
        assert error(best).sum() == pytest.approx(errors.sum(axis=(1, 2)).min())
        assert np.ptp(best.scale) == 0
    else:
        np.testing.assert_allclose(error(best), errors.min(axis=0))
