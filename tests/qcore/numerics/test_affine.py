import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qcore.numerics.affine import QScheme, dequantize_array, qparams_from_range, quantize_array

FINITE = st.floats(-1e4, 1e4, width=32)
SCHEMES = st.builds(QScheme, dtype=st.sampled_from(["uint8", "int8"]), bits=st.integers(2, 8), symmetric=st.booleans())


@given(FINITE, FINITE, SCHEMES)
def test_zero_is_exact_and_scale_positive(a, b, scheme):
    q = qparams_from_range(np.asarray(min(a, b)), np.asarray(max(a, b)), scheme)
    assert q.scale > 0
    assert np.isfinite(q.scale)
    assert dequantize_array(quantize_array(np.zeros(1, np.float32), q), q)[0] == 0.0
    assert q.qmin <= q.zero_point <= q.qmax


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=FINITE), SCHEMES)
def test_error_is_at_most_half_a_step_inside_the_range(x, scheme):
    q = qparams_from_range(x.min(), x.max(), scheme)
    error = np.abs(dequantize_array(quantize_array(x, q), q) - x)
    # Asymmetric zero points are rounded too, which can cost the ends of the range another half step.
    assert (error <= q.scale * (0.5 if scheme.symmetric else 1.0) * (1 + 1e-5) + 1e-30).all()


@settings(deadline=None)  # a session per example
@given(hnp.arrays(np.float32, st.integers(1, 30), elements=FINITE), st.sampled_from(["uint8", "int8"]))
def test_arithmetic_is_that_of_onnx(x, dtype):
    q = qparams_from_range(x.min(), x.max(), QScheme(dtype=dtype))
    kind = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}[dtype]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", kind, []),
        ],
        [
            helper.make_tensor_value_info("q", kind, [None]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [None]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    onnx.checker.check_model(model)
    theirs = ReferenceEvaluator(model).run(None, {"x": x, "s": q.scale, "z": q.zero_point.astype(dtype)})
    ours = quantize_array(x, q)
    assert np.array_equal(ours, theirs[0])
    assert np.array_equal(dequantize_array(ours, q), theirs[1])


@given(FINITE.filter(lambda v: abs(v) > 1e-3), st.sampled_from(["uint8", "int8"]))
def test_power_of_two_scales_cover_the_range(bound, dtype):
    q = qparams_from_range(
        np.asarray(-abs(bound)), np.asarray(abs(bound)), QScheme(dtype=dtype, symmetric=True, power_of_two=True)
    )
    assert np.log2(q.scale) == np.round(np.log2(q.scale))
    assert q.scale * 127 >= abs(bound) * (1 - 1e-6)
    assert q.scale * 127 < 2 * abs(bound) * (1 + 1e-6)


def test_symmetric_uint8_is_int8_shifted_by_128():
    w = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    signed = qparams_from_range(w.min(), w.max(), QScheme(dtype="int8", symmetric=True))
    shifted = qparams_from_range(w.min(), w.max(), QScheme(dtype="uint8", symmetric=True))
    assert np.array_equal(quantize_array(w, signed).astype(int) + 128, quantize_array(w, shifted))
    assert shifted.zero_point == 128


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1), (0, float("inf")), (2, 1)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="range is"):
        qparams_from_range(np.asarray(low), np.asarray(high), QScheme(dtype="int8"))
