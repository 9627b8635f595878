import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import conv_head_net, conv_net, model_of
from onnx import helper
from quantizing import constants, profile, quantized, run_plain, samples, written

from qcore.errors import ModelError
from qcore.graph.io import serialize_model
from qcore.graph.qoperator import to_qoperator
from qcore.numerics.error import sqnr_db

TARGETS = ["x86-avx2", "arm-dotprod", "npu-int8-symmetric", "fixed-point-pow2"]


def normal(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.4).astype(np.float32)


def one(op, *operands, inputs=("x",), **attributes):
    """Return a model of one operator; `operands` are constants behind the inputs."""
    weights = {f"k{i}": array for i, array in enumerate(operands)}
    node = helper.make_node(op, [*inputs, *weights], ["y"], name="op", **attributes)
    return model_of([node], weights, inputs={"x": ["N", 4, 6, 6]}, outputs={"y": ["a", "b", "c", "d"]})


def layer():
    """Return a Gemm of integers in and out: (N,8) -> (N,5)."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc")
    return model_of([node], {"w": normal(8, 5), "b": normal(5)}, inputs={"x": ["N", 8]}, outputs={"y": ["N", 5]})


OPERATORS = {
    "conv": lambda: one("Conv", normal(5, 4, 3, 3), normal(5)),
    "plain conv": lambda: one("Conv", normal(5, 4, 3, 3)),
    "depthwise": lambda: one("Conv", normal(4, 1, 3, 3), normal(4), group=4, pads=[1, 1, 1, 1]),
    "gemm": layer,
    "matmul": lambda: one("MatMul", normal(6, 3)),
    "product": lambda: one("MatMul", inputs=("x", "x")),
    "add": lambda: one("Add", normal(4, 1, 1)),
    "sum": lambda: one("Add", inputs=("x", "x")),
    "mul": lambda: one("Mul", normal(4, 1, 1)),
    "concat": lambda: one("Concat", normal(64, 2, 6, 6), axis=1),
    "leaky": lambda: one("LeakyRelu", alpha=0.2),
    "sigmoid": lambda: one("Sigmoid"),
    "softmax": lambda: one("Softmax", axis=1),
    "average": lambda: one("AveragePool", kernel_shape=[2, 2]),
    "global": lambda: one("GlobalAveragePool"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_an_integer_operator_is_at_most_one_quantum_from_its_pair(make, target):
    proto, chosen = make(), profile(target, float_output=False)
    pairs, operators = written(quantized(proto, chosen)), quantized(proto, chosen, form="qoperator")
    ops = [n.op_type for n in operators.model.graph]
    assert len(ops) == 3, ops  # Q, the operator, DQ
    file = onnx.ModelProto.FromString(serialize_model(operators.model))
    onnx.checker.check_model(file)
    x = samples(proto, seed=9)
    want, got = run_plain(pairs, x), run_plain(file, x)
    step = float(constants(pairs)["y_scale"])
    assert np.abs(want - got).max() <= step * 1.001
    # Seldom that; the table of exponentials in QLinearSoftmax is coarse, fused from pairs or not.
    assert np.mean(np.abs(want - got) > step * 0.01) < (0.3 if "QLinearSoftmax" in ops else 0.02)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [conv_net, conv_head_net])
def test_so_is_a_net_of_them_summed_over_its_layers(make, target):
    proto = make()
    x = samples(proto, seed=9)
    file = onnx.ModelProto.FromString(serialize_model(quantized(proto, target, form="qoperator").model))
    assert sqnr_db(run_plain(written(quantized(proto, target)), x), run_plain(file, x)) > 38


@pytest.mark.parametrize("target", TARGETS)
def test_no_float_operator_is_left_but_those_at_the_ends(target):
    file = onnx.ModelProto.FromString(serialize_model(quantized(conv_net(), target, form="qoperator").model))
    ops = [n.op_type for n in file.graph.node]
    assert ops.count("QuantizeLinear") == 1
    assert not {"Conv", "Gemm", "Add", "GlobalAveragePool"} & set(ops)
    assert [n.name for n in file.graph.node if n.op_type == "QLinearConv"] == ["conv1", "depthwise", "pointwise"]


def test_an_operator_without_an_integer_form_keeps_its_pair_and_is_reported():
    proto = one("HardSwish")
    rewrite = quantized(proto, "npu-int8-symmetric", form="qoperator")
    assert [(s.node, s.op_type) for s in rewrite.skipped] == [("op", "HardSwish")]
    assert [n.op_type for n in rewrite.model.graph][1:4] == ["DequantizeLinear", "HardSwish", "QuantizeLinear"]


def test_sixteen_and_four_bits_are_refused():
    wide = profile("npu-int8-symmetric", activations="int16")
    with pytest.raises(ModelError, match="form qoperator cannot hold int16"):
        quantized(conv_net(), wide, form="qoperator")
    with pytest.raises(ModelError, match="form qoperator cannot hold int4"):
        quantized(conv_net(), profile("x86-avx2", weights="int4"), form="qoperator")


def test_a_profile_with_float_biases_is_refused():
    with pytest.raises(ModelError, match="form qoperator has int32 biases, tensorrt wants float ones"):
        quantized(conv_net(), "tensorrt", form="qoperator")


def test_the_argument_is_not_changed_and_the_bytes_are_the_same_twice():
    pairs = quantized(conv_net(), "x86-avx2").model
    before = serialize_model(pairs)
    first, second = to_qoperator(pairs), to_qoperator(pairs)
    assert serialize_model(pairs) == before
    assert serialize_model(first.model) == serialize_model(second.model)


def test_bounds_that_do_not_saturate_clip_the_integers():
    file = onnx.ModelProto.FromString(
        serialize_model(quantized(conv_net(), "npu-int8-symmetric", form="qoperator").model)
    )
    clips = [n for n in file.graph.node if n.op_type == "Clip"]
    assert [n.name for n in clips] == ["relu1", "clip"]
    session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == "tensor(float)"
