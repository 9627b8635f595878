import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_head_net, conv_net, model_of
from onnx import helper, numpy_helper
from quantizing import TARGETS, constants, profile, quantized, run, run_plain, samples, table_of, written

from qcore.calibration import calibrate
from qcore.data.dataset import Batch
from qcore.errors import CalibrationError, ModelError
from qcore.graph.fold import fold_batchnorm
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.quantize import QuantizeStep, quantize, tensors_to_calibrate, weight_qparams
from qcore.numerics.affine import QScheme, dequantize_array, quantize_array
from qcore.numerics.error import sqnr_db
from qcore.runtime.ort import activations, optimized_ops
from qcore.target import load_target


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


def small(nodes, weights=None, *, shape=("N", 4, 6, 6), out=None, opset=17):
    """Return a model of one input `x` and one output `y`."""
    return model_of(nodes, weights or {}, inputs={"x": shape}, outputs={"y": out or shape}, opset=opset)


def normal(*shape, scale=0.4, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("opset", [None, 21])
@pytest.mark.parametrize("target", ["x86-vnni", "arm-dotprod", "npu-int8-symmetric", "fixed-point-pow2"])
def test_sixteen_bits_are_finer_than_eight_in_either_dialect(target, opset):
    proto = conv_net()
    x, wide = samples(proto), profile(target).wide_activations
    file = written(quantized(proto, profile(target, activations=wide, opset=opset)))
    zeros = {v.dtype.name for k, v in constants(file).items() if k.startswith(("x_", "r1_", "s_")) and "zero" in k}
    assert zeros == {wide}
    domains = {n.domain for n in file.graph.node if n.op_type == "QuantizeLinear"}
    assert domains == ({"com.microsoft"} if opset is None else {""})
    assert next(o.version for o in file.opset_import if o.domain == "") == (opset or 17)
    eight = run_plain(written(quantized(proto, target)), x)
    want = run(proto.SerializeToString(), x)
    assert sqnr_db(want, run_plain(file, x)) > sqnr_db(want, eight)


@pytest.mark.parametrize("opset", [None, 21])
def test_int4_weights_take_half_a_byte(opset):
    target = profile("x86-vnni", weights="int4", opset=opset)
    file = written(quantized(conv_net(), target))
    stored = {i.name: i for i in file.graph.initializer}
    assert stored["w3_quantized"].data_type == onnx.TensorProto.INT4
    assert len(stored["w3_quantized"].raw_data) == 18  # 36 weights
    narrow = written(quantized(conv_net(), "x86-vnni", weight_bits=4))
    x = samples(conv_net())
    np.testing.assert_array_equal(run_plain(file, x), run_plain(narrow, x))  # int8 containers hold the same numbers


@pytest.mark.parametrize("target", ["x86-vnni", "x86-avx2", "npu-int8-symmetric"])
def test_reduced_range_leaves_out_one_bit_of_weights(target):
    stored = constants(written(quantized(conv_net(), profile(target, reduce_range=True))))
    for name in ("conv1.weight_folded", "w2", "w3", "wf"):
        middle = int(stored[f"{name}_zero_point"].reshape(-1)[0])
        assert np.abs(stored[f"{name}_quantized"].astype(int) - middle).max() == 63


def test_nodes_of_sixteen_bits_are_converted_to_and_from():
    proto = conv_net()
    options = {"precision": {"depthwise": "int16", "pointwise": "int16"}}
    file = written(quantized(proto, "npu-int8-symmetric", **options))
    stored, made = constants(file), {n.output[0]: n for n in file.graph.node}

    def dtype(node, index=0):
        return stored[made[node.input[index]].input[2]].dtype

    by_name = {n.name: n for n in file.graph.node}
    assert dtype(by_name["conv1"]) == np.int8
    assert dtype(by_name["depthwise"]) == dtype(by_name["pointwise"]) == np.int16
    assert {dtype(by_name["add"]), dtype(by_name["add"], 1)} == {np.dtype(np.int8)}
    kinds = [stored[n.input[2]].dtype.name for n in file.graph.node if n.op_type == "QuantizeLinear"]
    assert kinds.count("int16") == 3  # relu1 converted, clip, pointwise; the latter is converted back for the sum
    x = samples(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run_plain(file, x)) > 30


def test_a_node_in_float16_stands_between_casts():
    proto = conv_net()
    rewrite = quantized(proto, "x86-avx2", precision={"pointwise": "float16", "pool": "float"})
    file = written(rewrite)
    by_name = {n.name: n for n in file.graph.node}
    made = {n.output[0]: n for n in file.graph.node}
    assert made[by_name["pointwise"].input[0]].op_type == "Cast"
    assert constants(file)[by_name["pointwise"].input[1]].dtype == np.float16
    assert [s.node for s in rewrite.skipped] == ["pool"]
    x = samples(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run_plain(file, x)) > 30


def test_precision_of_a_node_that_is_not_there_is_refused():
    with pytest.raises(CalibrationError, match="precision names node 'nope'"):
        quantized(conv_net(), "x86-vnni", precision={"nope": "int16"})


UNARY = [
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("HardSigmoid", {}),
    ("HardSwish", {}),
    ("LeakyRelu", {"alpha": 0.1}),
    ("Elu", {}),
    ("Erf", {}),
    ("Softmax", {"axis": 1}),
    ("ReduceMean", {"axes": [2, 3], "keepdims": 1}),
    ("GlobalAveragePool", {}),
    ("AveragePool", {"kernel_shape": [2, 2]}),
    ("MaxPool", {"kernel_shape": [2, 2]}),
    ("DepthToSpace", {"blocksize": 2}),
    ("Transpose", {"perm": [0, 2, 3, 1]}),
]


@pytest.mark.parametrize(("op", "attributes"), UNARY, ids=[u[0] for u in UNARY])
def test_on_an_npu_every_operator_stands_between_integers(op, attributes):
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv")]
    nodes.append(helper.make_node(op, ["c"], ["y"], name="op", **attributes))
    proto = small(nodes, {"w": normal(4, 4, 1, 1)}, out=["a", "b", "c", "d"])
    rewrite = quantized(proto, "npu-int8-symmetric")
    file = written(rewrite)
    made = {n.output[0]: n for n in file.graph.node}
    node = next(n for n in file.graph.node if n.name == "op")
    assert rewrite.skipped == ()
    assert made[node.input[0]].op_type == "DequantizeLinear"
    assert {n.op_type for n in file.graph.node if node.output[0] in n.input} == {"QuantizeLinear"}
    x = samples(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run_plain(file, x)) > 20


BINARY = {"Add": 0.0, "Sub": 0.0, "Mul": 0.0, "Div": 1.0, "PRelu": 0.0, "Max": 0.0, "Min": 0.0}


@pytest.mark.parametrize("op", BINARY)
def test_constant_operands_become_integers(op):
    c = normal(4, 1, 1) + np.float32(4 * BINARY[op])
    nodes = [helper.make_node(op, ["x", "c"], ["y"], name="op")]
    proto = small(nodes, {"c": c})
    file = written(quantized(proto, "npu-int8-symmetric"))
    assert [i.data_type for i in file.graph.initializer if i.name == "c_quantized"] == [onnx.TensorProto.INT8]
    x = samples(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run_plain(file, x)) > 20


def test_a_divisor_that_could_round_to_zero_stays_float():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Div", ["c", "d"], ["e"], name="by_constant"),
        helper.make_node("Div", ["e", "x"], ["y"], name="by_data"),
    ]
    tiny = np.array([1e-4, 1, 1, 1], np.float32).reshape(4, 1, 1)
    rewrite = quantized(small(nodes, {"w": normal(4, 4, 1, 1), "d": tiny}), "npu-int8-symmetric")
    assert rewrite.changed == ("conv",)
    assert {s.node: s.reason for s in rewrite.skipped} == {
        "by_constant": "its divisor would round to zero",
        "by_data": "its divisor is not a constant, and could round to zero",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_all_outputs_of_a_split_are_integers_with_the_scale_of_its_input(target):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Split", ["c"], ["a", "b"], name="split", axis=1),
        helper.make_node("Add", ["a", "b"], ["y"], name="add"),
    ]
    proto = small(nodes, {"w": normal(4, 4, 1, 1)}, out=["N", 2, 6, 6])
    file = written(quantized(proto, target))
    stored = constants(file)
    x = samples(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run_plain(file, x)) > 20
    if target != "tensorrt":  # which leaves Split alone
        assert len({stored[f"{name}_scale"].tobytes() for name in "cab"}) == 1


def test_one_scale_for_a_concat_where_the_device_wants_it():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Conv", ["x", "v"], ["d"], name="conv2"),
        helper.make_node("Concat", ["c", "d", "k"], ["y"], name="concat", axis=0),
    ]
    weights = {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1, scale=4), "k": normal(1, 4, 6, 6, scale=9)}
    proto = small(nodes, weights)
    one = constants(written(quantized(proto, "npu-int8-symmetric")))
    own = constants(written(quantized(proto, "x86-vnni")))
    assert len({one[f"{name}_scale"].tobytes() for name in ("c", "d", "k", "y")}) == 1
    assert one["c_scale"] == np.float32(max(np.abs(weights["k"]).max(), one["c_scale"] * 127) / 127)
    assert own["c_scale"] < own["d_scale"] / 2


def test_an_embedding_that_is_looked_up_is_stored_in_integers():
    table = normal(50, 8, scale=1.0)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["e"], name="lookup"),
            helper.make_node("MatMul", ["e", "w"], ["y"], name="product"),
        ],
        "g",
        [
            helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["N", 3]),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3, 4])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(normal(8, 4), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw, ids = proto.SerializeToString(), np.arange(48, dtype=np.int64).reshape(16, 3)
    model = parse_model(raw, "m")
    batch = Batch(index=np.arange(16), x={"ids": ids}, y=None)
    names = tensors_to_calibrate(model)
    table_ = calibrate(activations(raw, names, [batch]), model_sha256="m" * 64, data_sha256="d" * 64)
    file = written(quantize(model, QuantizeStep(), load_target("npu-int8-symmetric"), table_))
    assert constants(file)["table_quantized"].dtype == np.int8
    last = np.full((1, 3), 49)  # a row that the calibration has not seen
    want, got = run(raw, last), run_plain(file, last)
    assert sqnr_db(want, got) > 20


def test_two_activations_are_multiplied_as_integers():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Transpose", ["c"], ["t"], name="transpose", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["c", "t"], ["m"], name="product"),
        helper.make_node("Softmax", ["m"], ["s"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["s", "c"], ["o"], name="attend"),
        helper.make_node("Conv", ["o", "w"], ["y"], name="last"),
    ]
    proto = small(nodes, {"w": normal(4, 4, 1, 1)})
    ops = optimized_ops(serialize_model(quantized(proto, "x86-vnni").model))
    assert ops["QLinearMatMul"] == 2
    assert ops["QLinearSoftmax"] == 1
    assert not {"MatMul", "Softmax", "Conv"} & set(ops)


def test_interpolation_keeps_a_scale_of_its_own_and_copies_do_not():
    def resize(mode):
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("Resize", ["c", "", "s"], ["r"], name="resize", mode=mode),
            helper.make_node("Conv", ["r", "w"], ["y"], name="last"),
        ]
        sizes = np.array([1, 1, 2, 2], np.float32)
        proto = small(nodes, {"w": normal(4, 4, 1, 1), "s": sizes}, out=["N", 4, 12, 12])
        return quantized(proto, "x86-vnni"), quantized(proto, "npu-int8-symmetric")

    nearest, linear = resize("nearest"), resize("linear")
    assert nearest[0].skipped == nearest[1].skipped == linear[1].skipped == ()
    assert [(s.node, s.reason) for s in linear[0].skipped] == [("resize", "x86-vnni has no integer kernel for Resize")]
    assert "resize" in linear[1].changed
    assert "resize" not in nearest[1].changed  # it only hands the scale on


@pytest.mark.parametrize("op", ["LayerNormalization", "InstanceNormalization"])
def test_normalizations_of_an_npu_have_integer_weights_and_biases(op):
    channels = 6 if op == "LayerNormalization" else 4
    nodes = [helper.make_node(op, ["x", "g", "b"], ["y"], name="norm")]
    proto = small(nodes, {"g": normal(channels) + 1, "b": normal(channels)})
    stored = constants(written(quantized(proto, "npu-int8-symmetric")))
    assert stored["g_quantized"].dtype == np.int8
    assert stored["b_quantized"].dtype == np.int32


def test_an_opset_whose_operators_the_runtime_lacks_is_refused():
    proto = conv_net()
    model = parse_model(proto.SerializeToString(), "m")
    model.opset_imports[""] = 28
    with pytest.raises(ModelError, match="opset 28, whose QuantizeLinear"):
        quantize(model, QuantizeStep(), load_target("x86-vnni"), table_of(proto))
