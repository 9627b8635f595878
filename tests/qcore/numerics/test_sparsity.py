import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.sparsity import magnitude_mask


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
