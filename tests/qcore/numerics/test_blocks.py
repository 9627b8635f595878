"""Block-wise scales: the search never loses to min-max, zeros stay zeros, packing is the runtime's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.blocks import BlockScheme, dequantize_blocks, pack_nibbles, quantize_blocks, unpack_nibbles

schemes = st.builds(
    BlockScheme,
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([1, 3, 16]),
    symmetric=st.booleans(),
    signed_scales=st.booleans(),
)
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


def squared_error(w, scheme):
    restored = dequantize_blocks(quantize_blocks(w, scheme), w.shape[1])
    return float(np.sum((restored.astype(np.float64) - w) ** 2))


@settings(deadline=None)  # the machine may be busy
@given(matrices, schemes)
def test_search_is_never_worse_than_min_max(w, scheme):
    plain = BlockScheme(
        bits=scheme.bits,
        block_size=scheme.block_size,
        symmetric=scheme.symmetric,
        signed_scales=scheme.signed_scales,
        search=False,
    )
    assert squared_error(w, scheme) <= squared_error(w, plain) * (1 + 1e-5) + 1e-9


@settings(deadline=None)  # the machine may be busy
@given(matrices, schemes)
def test_zeros_stay_zeros_and_scales_can_be_used(w, scheme):
    w = np.where(np.abs(w) < 50, 0, w).astype(np.float32)
    b = quantize_blocks(w, scheme)
    assert (dequantize_blocks(b, w.shape[1])[w == 0] == 0).all()
    assert np.isfinite(b.scale).all()
    assert (b.scale != 0).all()
    assert scheme.signed_scales or (b.scale > 0).all()
    assert int(b.integers.max()) < 1 << scheme.bits


@settings(deadline=None)  # the machine may be busy
@given(matrices, st.sampled_from([4, 8]))
def test_without_search_every_value_is_within_a_step_of_its_block(w, bits):
    b = quantize_blocks(w, BlockScheme(bits=bits, block_size=5, symmetric=False, search=False))
    step = np.repeat(b.scale, 5, axis=1)[:, : w.shape[1]]
    # half a step of rounding, and half a step of the rounded zero point at the ends of the range
    assert (np.abs(dequantize_blocks(b, w.shape[1]) - w) <= step * 1.001 + 1e-6).all()


@settings(deadline=None)  # the machine may be busy
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_nibbles_come_back(x):
    packed = pack_nibbles(x)
    assert packed.shape == (len(x), -(-x.shape[1] // 2))
    np.testing.assert_array_equal(unpack_nibbles(packed, x.shape[1]), x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [128, 100])
def test_min_max_is_as_close_as_the_runtimes_own_kernel_and_search_is_closer(bits, symmetric, columns):
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    rows, size = 24, 32
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    count = -(-columns // size)
    packed = np.zeros((rows, count, size * bits // 8), np.uint8)
    scale, zero = np.zeros((rows, count), np.float32), np.zeros((rows, -(-count * bits // 8)), np.uint8)
    kernel = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    padded = np.zeros((count * size, rows), np.float32)
    padded[:columns] = w.T
    kernel(packed, padded, scale, zero, size, rows, columns, symmetric)
    integers = unpack_nibbles(packed, size) if bits == 4 else packed
    points = (unpack_nibbles(zero, count) if bits == 4 else zero) if not symmetric else 1 << (bits - 1)
    points = np.broadcast_to(np.asarray(points), scale.shape).astype(np.float32)
    theirs = ((integers.astype(np.float32) - points[..., None]) * scale[..., None]).reshape(rows, -1)[:, :columns]
    their_error = float(np.sum((theirs - w) ** 2))
    common = {"bits": bits, "block_size": size, "symmetric": symmetric, "signed_scales": True}
    assert squared_error(w, BlockScheme(**common, search=False)) == pytest.approx(their_error, rel=0.02)
    assert squared_error(w, BlockScheme(**common)) <= their_error * 1.0001


@pytest.mark.parametrize("w", [np.zeros((2, 0), np.float32), np.zeros(3, np.float32), np.array([[np.nan]], np.float32)])
def test_what_is_not_a_finite_matrix_is_refused(w):
    with pytest.raises(ValueError, match="finite matrix"):
        quantize_blocks(w, BlockScheme())


def test_unusable_schemes_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits"):
        BlockScheme(bits=3)
