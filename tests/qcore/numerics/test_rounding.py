"""Second-order rounding: never worse for the outputs than rounding to nearest, always on the grid."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcore.numerics.rounding import round_second_order

seeds = st.integers(0, 2**32 - 1)


def problem(seed, shape, correlated=True):
    rng = np.random.default_rng(seed)
    groups, _, k = shape
    w = rng.standard_normal(shape)
    x = rng.standard_normal((groups, 3 * k, k))
    if correlated:
        x = x + 2 * rng.standard_normal((groups, 3 * k, 1))
    return w, np.swapaxes(x, 1, 2) @ x / x.shape[1], np.abs(w).max(axis=2) / 7 + 1e-6


def objective(w, q, h, scale):
    """tr (W - Q) H (W - Q)' of each output."""
    d = w - q * scale[:, :, None]
    return np.einsum("goi,gij,goj->go", d, h, d)


def nearest(w, scale, levels):
    return np.clip(np.rint(w / scale[:, :, None]), *levels)


@settings(deadline=None, max_examples=15)
@example(seed=12025540, shape=(1, 4, 5), top=7)
@given(seeds, st.sampled_from([(1, 4, 5), (3, 2, 4), (1, 3, 70), (1, 2, 130)]), st.sampled_from([1, 3, 7]))
def test_the_outputs_are_never_further_away_than_with_nearest_rounding(seed, shape, top):
    w, h, scale = problem(seed, shape)
    q = round_second_order(w, h, scale, (-top, top))
    np.testing.assert_array_equal(q, np.rint(q))
    assert np.abs(q).max() <= top
    ours, theirs = (objective(w, x, h, scale) for x in (q, nearest(w, scale, (-top, top))))
    assert ours.sum() <= theirs.sum() * (1 + 1e-9)


def test_correlated_inputs_gain_a_lot():
    w, h, scale = problem(0, (1, 32, 64))
    q = round_second_order(w, h, scale, (-7, 7))
    assert objective(w, q, h, scale).sum() < 0.5 * objective(w, nearest(w, scale, (-7, 7)), h, scale).sum()


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_inputs_that_do_not_move_together_give_nearest_rounding(seed):
    w, _, scale = problem(seed, (2, 3, 5))
    h = np.stack([np.diag(np.random.default_rng(seed).uniform(0.1, 9, 5))] * 2)
    q = round_second_order(w, h, scale, (-5, 5))
    np.testing.assert_array_equal(q, nearest(w, scale, (-5, 5)))


@pytest.mark.parametrize("at_once", [1, 20, 1 << 22])
def test_groups_and_outputs_do_not_see_each_other(monkeypatch, at_once):
    monkeypatch.setattr("qcore.numerics.rounding._AT_ONCE", at_once)
    w, h, scale = problem(1, (3, 4, 6))
    together = round_second_order(w, h, scale, (-7, 7))
    for g in range(3):
        for o in range(4):
            one = (slice(g, g + 1), slice(o, o + 1))
            alone = round_second_order(w[one], h[g : g + 1], scale[one], (-7, 7))
            np.testing.assert_array_equal(alone, together[one])


@pytest.mark.parametrize("moments", ["zero", "one input dead", "rank one", "indefinite"])
def test_degenerate_inputs_still_give_integers(moments):
    w, h, scale = problem(2, (1, 3, 4))
    if moments == "zero":
        h = np.zeros_like(h)
    elif moments == "rank one":
        h = np.ones_like(h)
    elif moments == "indefinite":
        h = h - 2 * np.eye(4) * np.linalg.eigvalsh(h).mean()
    else:
        h[:, 0, :] = h[:, :, 0] = 0
    q = round_second_order(w, h, scale, (-7, 7))
    assert np.isfinite(q).all()
    assert np.abs(q).max() <= 7
