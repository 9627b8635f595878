import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.sparsity import magnitude_mask, pattern_mask


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(-3, 3, width=32)),
    st.floats(0, 0.999),
)
def test_exactly_k_go_and_none_of_them_is_larger_than_one_that_stays(w, sparsity):
    mask = magnitude_mask(w, sparsity)
    assert np.sum(~mask) == round(sparsity * w.size)
    if mask.any() and (~mask).any():
        assert np.abs(w[~mask]).max() <= np.abs(w[mask]).min()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0])
def test_impossible_fractions_are_refused(sparsity):
    with pytest.raises(ValueError, match="allowed: 0 <= sparsity < 1"):
        magnitude_mask(np.ones(4), sparsity)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=9), elements=st.floats(-3, 3, width=32)),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]),
    st.data(),
)
def test_a_pattern_keeps_the_largest_of_every_run(w, pattern, data):
    kept, of = pattern
    axis = data.draw(st.integers(0, w.ndim - 1))
    mask = np.moveaxis(pattern_mask(w, kept, of, axis), axis, -1)
    rows = np.moveaxis(np.abs(w), axis, -1)
    for start in range(0, rows.shape[-1], of):
        run, stays = rows[..., start : start + of], mask[..., start : start + of]
        assert np.all(stays.sum(axis=-1) == min(kept, run.shape[-1]))
        smallest = np.where(stays, run, np.inf).min(axis=-1)
        assert np.all(np.where(stays, -np.inf, run).max(axis=-1) <= smallest)


@pytest.mark.parametrize("pattern", [(0, 4), (4, 4), (3, 2)])
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(ValueError, match="allowed: N:M with 1 <= N < M"):
        pattern_mask(np.ones((4, 4)), *pattern, axis=0)
