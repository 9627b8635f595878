import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_head_net, conv_net, model_of
from onnx import helper, numpy_helper

from qcore.calibration import CalibrationTable, calibrate
from qcore.data.dataset import Batch
from qcore.errors import CalibrationError, ModelError
from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.quantize import QuantizeStep, quantize, tensors_to_calibrate, weight_qparams
from qcore.numerics.affine import QScheme, dequantize_array, quantize_array
from qcore.numerics.error import sqnr_db
from qcore.runtime.ort import activations, optimized_ops
from qcore.target import load_target

TARGETS = ["x86-vnni", "x86-avx2", "arm-dotprod", "npu-int8-symmetric", "fixed-point-pow2", "tensorrt"]


def samples(proto: onnx.ModelProto, n: int = 64, seed: int = 5) -> np.ndarray:
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def table_of(proto: onnx.ModelProto) -> CalibrationTable:
    raw = proto.SerializeToString()
    names = tensors_to_calibrate(fold_batchnorm(parse_model(raw, "m")).model)
    batch = Batch(index=np.arange(64), x={"": samples(proto)}, y=None)
    return calibrate(activations(raw, names, [batch]), model_sha256="m" * 64, data_sha256="d" * 64)


def quantized(proto: onnx.ModelProto, target: str, **options):
    model = conv_head_to_gemm(fold_batchnorm(parse_model(proto.SerializeToString(), "m")).model).model
    return quantize(model, QuantizeStep(**options), load_target(target), table_of(proto))


def run(data: bytes, x: np.ndarray, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(3))
def test_every_target_gives_a_valid_close_model(target, seed):
    proto = conv_net(seed)
    rewrite = quantized(proto, target)
    data = serialize_model(rewrite.model)
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    x = samples(proto, seed=9)
    # The written numbers, unfused, are what the file means; 8 bits per tensor and power-of-two scales cost the most.
    result = run(data, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert sqnr_db(run(proto.SerializeToString(), x), result) > (12 if target == "fixed-point-pow2" else 18)


@pytest.mark.parametrize("make", [conv_net, conv_head_net])
def test_on_x86_every_layer_runs_on_integers(make):
    ops = optimized_ops(serialize_model(quantized(make(), "x86-vnni").model))
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "FusedGemm", "GlobalAveragePool"} & set(ops)
    assert ops["QLinearConv"] == sum(n.op_type == "Conv" for n in make().graph.node) - (make is conv_head_net)
    assert ops["QGemm"] == 1


def test_fused_kernels_compute_what_the_file_says():
    proto = conv_net()
    data = serialize_model(quantized(proto, "x86-avx2").model)
    x = samples(proto, seed=9)
    plain = run(data, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    # Kernels may round a few integers the other way: at most one step of the last activation, summed in the Gemm.
    assert sqnr_db(plain, run(data, x)) > 35


def test_same_inputs_same_bytes():
    assert serialize_model(quantized(conv_net(), "x86-vnni").model) == serialize_model(
        quantized(conv_net(), "x86-vnni").model
    )


def test_the_argument_is_not_changed():
    proto = conv_net()
    model = fold_batchnorm(parse_model(proto.SerializeToString(), "m")).model
    before = serialize_model(model)
    quantize(model, QuantizeStep(), load_target("x86-vnni"), table_of(proto))
    assert serialize_model(model) == before


def test_biases_are_int32_with_the_product_scale_and_weights_are_per_channel():
    graph = onnx.ModelProto.FromString(serialize_model(quantized(conv_net(), "x86-vnni").model)).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producers = {n.output[0]: n for n in graph.node}
    convs = [n for n in graph.node if n.op_type == "Conv"]
    assert len(convs) == 3
    for conv in convs:
        data, weight, bias = (producers[name] for name in conv.input)
        input_scale, weight_scale = constants[data.input[1]], constants[weight.input[1]]
        assert input_scale.shape == ()
        assert weight_scale.shape == (6,)
        assert constants[weight.input[0]].dtype == np.int8
        assert np.abs(constants[weight.input[0]]).max() == 127
        assert constants[bias.input[0]].dtype == np.int32
        np.testing.assert_allclose(constants[bias.input[1]], input_scale * weight_scale, rtol=1e-6)


def test_relu_and_clip_are_absorbed_only_where_saturation_equals_them():
    def names(target):
        return {
            n.op_type
            for n in onnx.ModelProto.FromString(serialize_model(quantized(conv_net(), target).model)).graph.node
        }

    assert not {"Relu", "Clip"} & names("x86-vnni")  # zero point 0: below zero saturates
    assert {"Relu", "Clip"} <= names("npu-int8-symmetric")  # symmetric: negative values are representable


def test_excluded_nodes_stay_float_and_are_reported():
    rewrite = quantized(conv_net(), "x86-vnni", exclude=("pointwise",))
    assert "pointwise" not in rewrite.changed
    assert [(s.node, s.reason) for s in rewrite.skipped] == [("pointwise", "excluded by the recipe")]


def test_a_node_that_is_not_there_cannot_be_excluded():
    with pytest.raises(CalibrationError, match="'nope', which does not exist"):
        quantized(conv_net(), "x86-vnni", exclude=("nope",))


def test_a_quantized_model_is_not_quantized_again():
    model = quantized(conv_net(), "x86-vnni").model
    with pytest.raises(ModelError, match="already quantized"):
        quantize(model, QuantizeStep(), load_target("x86-vnni"), table_of(conv_net()))


def test_a_model_without_anything_to_quantize_is_refused_with_the_reason():
    proto = model_of([helper.make_node("Exp", ["x"], ["y"])], {}, inputs={"x": ["N", 4]}, outputs={"y": ["N", 4]})
    with pytest.raises(ModelError, match="no integer kernel for Exp"):
        quantized(proto, "x86-vnni")


def test_unsupported_nodes_between_are_float_islands_with_reasons():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["g"], name="first"),
        helper.make_node("Exp", ["g"], ["e"], name="exp"),
        helper.make_node("Gemm", ["e", "b"], ["y"], name="second"),
    ]
    weights = {k: rng.standard_normal((4, 4)).astype(np.float32) * 0.3 for k in "ab"}
    proto = model_of(nodes, weights, inputs={"x": ["N", 4]}, outputs={"y": ["N", 4]})
    rewrite = quantized(proto, "x86-vnni")
    assert rewrite.changed == ("first", "second")
    assert [(s.node, s.op_type) for s in rewrite.skipped] == [("exp", "Exp")]
    x = samples(proto)  # those of the calibration: the exponential of anything larger would saturate
    plain = run(serialize_model(rewrite.model), x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert sqnr_db(run(proto.SerializeToString(), x), plain) > 25


def test_a_graph_output_that_is_read_inside_keeps_its_name():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["inner"], name="first"),
        helper.make_node("Conv", ["inner", "b"], ["y"], name="second"),
    ]
    weights = {k: rng.standard_normal((3, 3, 1, 1)).astype(np.float32) for k in "ab"}
    shape = ["N", 3, 4, 4]
    proto = model_of(nodes, weights, inputs={"x": shape}, outputs={"y": shape, "inner": shape})
    data = serialize_model(quantized(proto, "x86-avx2").model)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["y", "inner"]
    x = samples(proto, seed=9)
    theirs = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for mine, want in zip(session.run(None, {"x": x}), theirs, strict=True):
        assert sqnr_db(want, mine) > 25


def gemm_with(c: np.ndarray):
    """Return a Gemm of 64 rows and 64 columns, so that a column and a row of C have the same size."""
    nodes = [helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="fc")]
    weights = {"w": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32), "c": c.astype(np.float32)}
    return model_of(nodes, weights, inputs={"x": [64, 4]}, outputs={"y": [64, 64]})


def test_a_column_added_by_gemm_is_no_bias():
    column = gemm_with(np.arange(64.0).reshape(64, 1))
    with pytest.raises(ModelError, match="its bias is not one value per output channel"):
        quantized(column, "x86-vnni")
    row = gemm_with(np.arange(64.0).reshape(1, 64))
    assert quantized(row, "x86-avx2").changed == ("fc",)


def test_names_that_are_taken_are_left_alone():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["x_scale"], name="first"),
        helper.make_node("Conv", ["x_scale", "w_quantized"], ["x_quantized"], name="second"),
        helper.make_node("Conv", ["x_quantized", "w"], ["y_float"], name="third"),
        helper.make_node("Conv", ["y_float", "w"], ["y"], name="fourth"),
    ]
    weights = {k: rng.standard_normal((3, 3, 1, 1)).astype(np.float32) for k in ("w", "w_quantized")}
    shape = ["N", 3, 4, 4]
    proto = model_of(nodes, weights, inputs={"x": shape}, outputs={"y": shape})
    data = serialize_model(quantized(proto, "x86-avx2").model)
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    x = samples(proto)
    plain = run(data, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert sqnr_db(run(proto.SerializeToString(), x), plain) > 20


@pytest.mark.parametrize("target", TARGETS)
def test_an_absorbed_output_without_type_information_keeps_the_file_valid(target):
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"], name="r")]
    w = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 3, 4, 4]})
    onnx.checker.check_model(onnx.ModelProto.FromString(serialize_model(quantized(proto, target).model)))


def test_weights_that_are_not_finite_stay_float_with_the_reason():
    w = np.ones((3, 3, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="good"),
        helper.make_node("Conv", ["c", "v"], ["y"], name="bad"),
    ]
    shape = ["N", 3, 4, 4]
    proto = model_of(nodes, {"w": w, "v": np.where(w > 0, 1e-3, w)}, inputs={"x": shape}, outputs={"y": shape})
    table = table_of(proto)
    broken = np.ones((3, 3, 1, 1), np.float32)
    broken[0] = -np.inf
    infinite = model_of(nodes, {"w": w, "v": broken}, inputs={"x": shape}, outputs={"y": shape})
    rewrite = quantize(parse_model(infinite.SerializeToString(), "m"), QuantizeStep(), load_target("x86-vnni"), table)
    assert [(s.node, s.reason) for s in rewrite.skipped] == [("bad", "a constant of it holds NaN or infinity")]


def test_a_classifier_that_ends_in_softmax_keeps_float_logits():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["logits"], name="fc"),
        helper.make_node("Softmax", ["logits"], ["y"], name="softmax"),
    ]
    w = rng.standard_normal((4, 4)).astype(np.float32)
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 4]}, outputs={"y": ["N", 4]})
    graph = onnx.ModelProto.FromString(serialize_model(quantized(proto, "x86-vnni").model)).graph
    assert [n.op_type for n in graph.node].count("QuantizeLinear") == 1


@pytest.mark.filterwarnings("error")
def test_weights_too_small_for_a_scale_become_zero_without_noise():
    tiny = np.full((3, 3), 1e-30, np.float32)
    q = weight_qparams(tiny, QScheme(dtype="int8", symmetric=True, axis=0), np.ones(3, np.float32), np.float32(1e-20))
    assert (q.scale * np.float32(1e-20) > 0).all()
    assert np.isfinite(np.float32(1.0) / (q.scale * np.float32(1e-20))).all()


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3), st.booleans())
def test_no_bias_saturates_and_dead_channels_keep_theirs(seed, input_scale, pow2):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((5, 3)) * 10.0 ** rng.uniform(-6, 1, (5, 1))).astype(np.float32)
    w[0] = 0
    b = (rng.standard_normal(5) * 10.0 ** rng.uniform(-3, 3, 5)).astype(np.float32)
    scale = np.float32(input_scale)
    q = weight_qparams(w, QScheme(dtype="int8", symmetric=True, axis=0, power_of_two=pow2), b, np.asarray(scale))
    steps = np.rint(b.astype(np.float64) / (q.scale * scale))
    assert (np.abs(steps) <= np.iinfo(np.int32).max).all()
    assert abs(steps[0] * q.scale[0] * scale - b[0]) <= 1e-5 * abs(b[0]) + 1e-12
    error = np.abs(dequantize_array(quantize_array(w, q), q) - w)
    assert (error <= q.scale[:, None] * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_use_fewer_levels(bits):
    graph = onnx.ModelProto.FromString(serialize_model(quantized(conv_net(), "x86-vnni", weight_bits=bits).model)).graph
    weights = [
        numpy_helper.to_array(i)
        for i in graph.initializer
        if i.name.startswith(("w", "conv1.weight")) and i.name.endswith("_quantized")
    ]
    assert len(weights) == 4
    assert max(int(np.abs(w).max()) for w in weights) == 2 ** (bits - 1) - 1
