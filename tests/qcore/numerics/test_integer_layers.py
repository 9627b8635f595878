"""Sums of integers against onnx's reference, onnxruntime's kernels and plain loops."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qcore.numerics.integer_layers import Geometry, Stored, conv_sums, lost_in_pairs, matmul_sums, requantize
from qcore.runtime.ort import load


def integers(rng, shape, dtype):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def stored(values, zero=0):
    return Stored(values=values, zero=np.asarray(zero, np.int64))


def pairs_by_hand(a, b):
    """What pmaddubsw and 32-bit sums give, one output at a time."""
    out = np.zeros((len(a), b.shape[1]), np.int64)
    for i, j in np.ndindex(*out.shape):
        products = [int(x) * int(y) for x, y in zip(a[i], b[:, j], strict=True)] + [0] * (a.shape[1] % 2)
        out[i, j] = sum(max(-32768, min(32767, p + q)) for p, q in zip(products[0::2], products[1::2], strict=True))
    return out


def node_model(op_type, arrays, outputs=1, **attributes):
    names = [f"i{k}" for k in range(len(arrays))]
    node = helper.make_node(op_type, names, [f"o{k}" for k in range(outputs)], **attributes)
    ports = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    results = [helper.make_tensor_value_info(o, onnx.TensorProto.INT32, None) for o in node.output]
    graph = helper.make_graph([node], "g", ports, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), dict(
        zip(names, arrays, strict=True)
    )


shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))


@given(shapes, st.sampled_from(["uint8", "int8"]), st.integers(0, 127))
def test_matmul_is_matmul_integer(shape, dtype, zero):
    m, k, n, seed = shape
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (m, k), dtype), integers(rng, (k, n), np.int8)
    zeros = integers(rng, (n,), np.int8)
    model, fed = node_model("MatMulInteger", [a, b, np.array(zero, dtype), zeros])
    (want,) = ReferenceEvaluator(model).run(None, fed)
    np.testing.assert_array_equal(matmul_sums(stored(a, zero), stored(b, zeros)), want)
    few = b >> 1  # seven bits: no kernel saturates
    (theirs,) = (
        load(node_model("MatMulInteger", [a, few])[0].SerializeToString(), threads=1)
        .predict({"i0": a, "i1": few})
        .values()
    )
    np.testing.assert_array_equal(matmul_sums(stored(a), stored(few)), theirs)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    groups, per_group, per_group_out = (draw(st.integers(1, 3)) for _ in range(3))
    axes = [[draw(st.integers(low, high)) for _ in range(rank)] for low, high in ((1, 3), (1, 2), (1, 2), (0, 2))]
    kernel, strides, dilations, _ = axes
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilations, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = integers(rng, (2, groups * per_group, *size), np.uint8)
    w = integers(rng, (groups * per_group_out, per_group, *kernel), np.int8)
    return x, w, groups, kernel, strides, dilations, pads, draw(st.integers(0, 255))


def geometry_of(kernel, strides, dilations, pads):
    rank = len(kernel)
    return Geometry(
        kernel=tuple(kernel),
        strides=tuple(strides),
        dilations=tuple(dilations),
        pads=tuple(zip(pads[:rank], pads[rank:], strict=True)),
    )


@settings(max_examples=60)
@given(convolutions())
def test_every_output_is_the_sum_over_what_its_window_sees(case):
    x, w, groups, kernel, strides, dilations, pads, zero = case
    got = conv_sums(stored(x, zero), stored(w), geometry_of(kernel, strides, dilations, pads), groups)
    np.testing.assert_array_equal(got, by_hand(x, w, groups, strides, dilations, pads, zero, saturate=False))


@settings(max_examples=40)
@given(convolutions())
def test_conv_saturates_neighbouring_channels_of_a_tap(case):
    x, w, groups, kernel, strides, dilations, pads, zero = case
    geometry = geometry_of(kernel, strides, dilations, pads)
    got = conv_sums(stored(x, zero), stored(w), geometry, groups, saturate_pairs=True)
    depthwise = w.shape[1] == 1 and len(w) == groups
    want = by_hand(x, w, groups, strides, dilations, pads, zero, saturate=not depthwise)
    np.testing.assert_array_equal(got, want)


def by_hand(x, w, groups, strides, dilations, pads, zero, *, saturate):
    rank, per_group = x.ndim - 2, w.shape[1]
    around = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(x, around, constant_values=np.uint8(zero))
    reach = [d * (k - 1) + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    size = [(p - r) // s + 1 for p, r, s in zip(padded.shape[2:], reach, strides, strict=True)]
    out = np.zeros((len(x), len(w), *size), np.int64)
    for n, o, *at in np.ndindex(*out.shape):
        first = o // (len(w) // groups) * per_group
        window = tuple(slice(a * s, a * s + r, d) for a, s, r, d in zip(at, strides, reach, dilations, strict=True))
        seen = np.moveaxis(padded[(n, slice(first, first + per_group), *window)], 0, -1).reshape(1, -1)
        weights = np.moveaxis(w[o], 0, -1).reshape(-1, 1)
        total = pairs_by_hand(seen, weights) if saturate else seen.astype(np.int64) @ weights.astype(np.int64)
        out[(n, o, *at)] = total[0, 0] - zero * weights.astype(np.int64).sum()
    return out


@given(shapes)
def test_pairs_are_those_of_pmaddubsw(shape):
    m, k, n, seed = shape
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (m, k), np.uint8), integers(rng, (k, n), np.int8)
    want = pairs_by_hand(a, b)
    np.testing.assert_array_equal(a.astype(np.int64) @ b.astype(np.int64) + lost_in_pairs(a, b), want)
    shifted = (a.astype(np.int16) - 128).astype(np.int8)
    np.testing.assert_array_equal(lost_in_pairs(shifted, b), lost_in_pairs(a, b))


@given(shapes)
def test_weights_of_seven_bits_lose_nothing(shape):
    m, k, n, seed = shape
    rng = np.random.default_rng(seed)
    assert not lost_in_pairs(integers(rng, (m, k), np.uint8), rng.integers(-64, 65, (k, n)).astype(np.int8)).any()


def test_the_largest_pair_loses_half():
    a, b = np.full((1, 2), 255, np.uint8), np.full((2, 1), 127, np.int8)
    assert lost_in_pairs(a, b)[0, 0] == 32767 - 2 * 255 * 127


def test_sums_wrap_at_32_bits_and_16_bit_activations_do_not():
    k = 1 << 17
    a, b = stored(np.full((1, k), 255, np.uint8)), stored(np.full((k, 1), 127, np.int8))
    exact = 255 * 127 * k
    assert matmul_sums(a, b)[0, 0] == np.int64(exact).astype(np.int32) != exact
    wide = stored(np.full((1, k), 255, np.int16))
    assert matmul_sums(wide, b)[0, 0] == exact


@pytest.mark.parametrize(("sums", "want"), [([1, 3, 5, -1, -3], [128, 130, 130, 128, 126]), ([1000, -1000], [255, 0])])
def test_requantization_rounds_half_to_even_and_saturates(sums, want):
    got = requantize(np.array(sums), np.float32(0.5), 128, "uint8")
    assert got.dtype == np.uint8
    assert got.tolist() == want
