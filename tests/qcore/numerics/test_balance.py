"""Balancing channels: true derivatives, never worse than leaving the scales alone, bounds respected."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.balance import (
    LayerTerm,
    P,
    TensorTerm,
    _layer_cost,
    _tensor_cost,
    balance,
)

seeds = st.integers(0, 2**32 - 1)


def layer(rng, shape, into, out, *, per_channel):
    groups, outputs, inputs = shape
    return LayerTerm(
        peak=np.exp(rng.standard_normal(shape)),
        power=np.exp(rng.standard_normal((groups, inputs))),
        importance=np.exp(rng.standard_normal((groups, outputs))),
        into=into,
        out=out,
        per_channel=per_channel,
    )


def tensor(rng, size, scales):
    return TensorTerm(
        peak=np.exp(rng.standard_normal(size)), importance=np.exp(rng.standard_normal(size)), scales=scales
    )


def cost(layers, tensors, t):
    """The sum that is minimized, and its derivatives."""
    slopes = [np.zeros_like(part) for part in t]
    total = 0.0
    for la in layers:
        steep = np.power(la.peak / la.peak.max(), P).astype(np.float32)
        total += _layer_cost(la, steep, t, slopes)
    for x in tensors:
        total += _tensor_cost(x, t[x.scales], slopes[x.scales])
    return total, slopes


@settings(deadline=None, max_examples=25)
@given(seeds, st.booleans(), st.sampled_from([(1, 3, 4), (4, 1, 1), (2, 3, 2)]))
def test_slopes_are_the_derivatives_of_the_cost(seed, per_channel, shape):
    rng = np.random.default_rng(seed)
    groups, outputs, inputs = shape
    la = layer(rng, shape, 0, 1, per_channel=per_channel)
    tensors = [tensor(rng, groups * inputs, 0), tensor(rng, groups * outputs, 1)]
    t = [0.3 * rng.standard_normal(groups * inputs), 0.3 * rng.standard_normal(groups * outputs)]
    _, slopes = cost([la], tensors, t)
    for k, part in enumerate(t):
        for i in range(part.size):
            at = []
            for step in (1e-4, -1e-4):
                moved = [p.copy() for p in t]
                moved[k][i] += step
                at.append(cost([la], tensors, moved)[0])
            assert slopes[k][i] == pytest.approx((at[0] - at[1]) / 2e-4, rel=1e-3, abs=1e-4)


@settings(deadline=None, max_examples=8)
@given(seeds, st.booleans())
def test_the_scales_never_cost_more_than_ones(seed, per_channel):
    rng = np.random.default_rng(seed)
    sizes = [4, 6]
    layers = [
        layer(rng, (1, 4, 3), None, 0, per_channel=per_channel),
        layer(rng, (4, 1, 1), 0, 0, per_channel=per_channel),
        layer(rng, (1, 6, 4), 0, 1, per_channel=per_channel),
        layer(rng, (1, 5, 6), 1, None, per_channel=per_channel),
    ]
    tensors = [tensor(rng, 4, 0), tensor(rng, 6, 1)]
    scales = balance(sizes, layers, tensors, {})
    assert [s.size for s in scales] == sizes
    assert all((s > 0).all() for s in scales)
    before = cost(layers, tensors, [np.zeros(n) for n in sizes])[0]
    assert cost(layers, tensors, [np.log(s) for s in scales])[0] <= before + 1e-9


@settings(deadline=None, max_examples=8)
@given(seeds)
def test_channels_that_are_cut_share_a_scale_and_none_goes_beyond_the_bound(seed):
    rng = np.random.default_rng(seed)
    layers = [layer(rng, (1, 5, 3), None, 0, per_channel=False), layer(rng, (1, 2, 5), 0, None, per_channel=False)]
    reached = np.array([1.0, 1.0, 0.5, 0.1, 0.0])
    (scales,) = balance([5], layers, [tensor(rng, 5, 0)], {0: reached})
    np.testing.assert_allclose(scales[:2], scales[0])
    assert (reached / scales <= 1 / scales[0] * (1 + 1e-9)).all()


def test_two_layers_meet_in_the_middle():
    """Without activation noise the optimum for one scale per tensor evens out the ranges on both sides (eq. 11)."""
    first, second = np.array([1.0, 100.0]), np.array([1.0, 1.0])
    common = {"per_channel": False}
    layers = [
        LayerTerm(peak=first.reshape(1, 2, 1), power=np.ones((1, 1)), importance=np.ones((1, 2)), into=None, out=0,
                  **common),
        LayerTerm(peak=second.reshape(1, 1, 2), power=np.array([[1.0, 1e4]]), importance=np.ones((1, 1)), into=0,
                  out=None, **common),
    ]  # fmt: skip
    (s,) = balance([2], layers, [], {})
    ours, theirs = first / s, second * s
    assert ours[1] / ours[0] < 100**0.75
    assert theirs[1] / theirs[0] > 1


@pytest.mark.filterwarnings("error")
def test_a_net_of_zeros_stays_as_it_is():
    zero = LayerTerm(
        peak=np.zeros((1, 2, 2)), power=np.zeros((1, 2)), importance=np.ones((1, 2)), into=0, out=0, per_channel=False
    )
    (s,) = balance([2], [zero], [TensorTerm(peak=np.zeros(2), importance=np.ones(2), scales=0)], {})
    np.testing.assert_allclose(s, 1, atol=1e-6)
