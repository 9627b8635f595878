"""Weight scales: cutting the largest weights is done only where the square error falls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.affine import QScheme, dequantize_array, quantize_array
from qcore.numerics.cover import covering_scale, least_error_scale


def square_error(w, q):
    others = None if q.axis is None else tuple(i for i in range(w.ndim) if i != q.axis)
    return ((dequantize_array(quantize_array(w, q), q).astype(np.float64) - w) ** 2).sum(axis=others)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
    st.sampled_from([True, False]),
)
def test_the_error_is_at_most_that_of_covering(seed, bits, axis, power_of_two, symmetric):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (4, 3, 3, 3)).astype(np.float32)
    scheme = QScheme(dtype="int8", bits=bits, symmetric=symmetric, axis=axis, power_of_two=power_of_two)
    least, cover = least_error_scale(w, scheme), covering_scale(w, scheme)
    assert (square_error(w, least) <= square_error(w, cover)).all()
    assert least.scale.shape == cover.scale.shape
    assert least.scale.dtype == np.float32
    assert (least.scale <= cover.scale).all()
    if power_of_two:
        mantissa, _ = np.frexp(least.scale)
        np.testing.assert_array_equal(mantissa, 0.5)


def test_few_bits_gain_much():
    w = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    scheme = QScheme(dtype="int8", bits=3, symmetric=True, axis=0)
    assert square_error(w, least_error_scale(w, scheme)).sum() < 0.8 * square_error(w, covering_scale(w, scheme)).sum()


@pytest.mark.parametrize("axis", [None, 0])
def test_a_channel_of_zeros_keeps_a_scale(axis):
    w = np.zeros((2, 3), np.float32)
    q = least_error_scale(w, QScheme(dtype="int8", symmetric=True, axis=axis))
    assert (q.scale > 0).all()
    np.testing.assert_array_equal(quantize_array(w, q), 0)
