"""Windows: a convolution is their product with the weights, for every geometry that onnxruntime knows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import model_of
from onnx import helper
from onnxruntime import InferenceSession

from qcore.numerics.windows import Window, same_pads, windows_at


def convolved(x, w, window, groups):
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], group=groups, pads=list(window.pads), strides=list(window.strides),
        dilations=list(window.dilations),
    )  # fmt: skip
    proto = model_of([node], {"w": w}, inputs={"x": x.shape}, outputs={"y": ["a", "b", "c", "d"]})
    return InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
)
def test_windows_times_weights_are_the_convolution(kernel, strides, pads, dilations, groups, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 4, 7, 6)).astype(np.float32)
    w = rng.standard_normal((8, 4 // groups, *kernel)).astype(np.float32)
    window = Window(kernel=kernel, strides=strides, pads=pads, dilations=dilations)
    y = convolved(x, w, window, groups)
    height, width = y.shape[2:]
    chosen = np.stack([rng.permutation(height * width)[:5] for _ in x])
    seen = windows_at(x, window, chosen // width, chosen % width, groups)
    assert seen.flags.c_contiguous
    ours = seen @ np.swapaxes(w.reshape(groups, 8 // groups, -1), 1, 2)  # (groups, rows, outputs)
    ours = ours.transpose(1, 0, 2).reshape(2, -1, 8)
    theirs = np.take_along_axis(y.reshape(2, 8, -1), chosen[:, None, :], axis=2).transpose(0, 2, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_lies_outside_is_zero():
    x = np.ones((1, 1, 2, 2), np.float32)
    corner = windows_at(x, Window(kernel=(3, 3), pads=(1, 1, 1, 1)), np.zeros((1, 1), int), np.zeros((1, 1), int), 1)
    assert corner.sum() == pytest.approx(4)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    upper=st.booleans(),
)
def test_same_pads_are_those_of_the_runtime(size, kernel, strides, upper):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, *size)).astype(np.float32)
    w = rng.standard_normal((3, 2, *kernel)).astype(np.float32)
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=strides, auto_pad=f"SAME_{'UPPER' if upper else 'LOWER'}"
    )
    proto = model_of([node], {"w": w}, inputs={"x": x.shape}, outputs={"y": ["a", "b", "c", "d"]})
    wanted = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    (top, bottom), (left, right) = (
        same_pads(n, k, s, 1, upper=upper) for n, k, s in zip(size, kernel, strides, strict=True)
    )
    window = Window(kernel=kernel, strides=strides, pads=(top, left, bottom, right))
    np.testing.assert_allclose(convolved(x, w, window, 1), wanted, atol=1e-5)
