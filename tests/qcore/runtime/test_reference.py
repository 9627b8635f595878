"""The reference executor against onnxruntime's integer kernels, to the bit, and against onnx's own cases."""

import warnings

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_head_net, conv_net, model_of
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from quantizing import TARGETS, profile, quantized, samples, written

from qcore.errors import ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.runtime.ort import load, load_as_written, load_exact, on_samples
from qcore.runtime.reference import integer_layers, load_reference
from qcore.target import load_target

ROUNDED_ELSEWHERE = {"tensorrt"}
"""Profiles whose float biases onnxruntime makes integers of its own."""
SHIPPED = [(t, f) for t in TARGETS for f in ("qdq", "qoperator") if (t, f) != ("tensorrt", "qoperator")]


def answers(loaded, x):
    return on_samples(loaded)({"x": x})["y"]


@pytest.mark.parametrize("net", [conv_net, conv_head_net])
@pytest.mark.parametrize(("target", "form"), SHIPPED)
def test_every_profile_gives_onnxruntimes_integers(net, target, form):
    proto, x = written(quantized(net(), target, ranges="min-max", form=form)), samples(net())
    ours = [layer.node.op_type for layer in integer_layers(proto)]
    assert len(ours) == (4 if net is conv_net else 2)
    raw = proto.SerializeToString()
    got = answers(load_reference(raw), x)
    if target not in ROUNDED_ELSEWHERE:
        np.testing.assert_array_equal(got, answers(load_exact(raw), x))
    np.testing.assert_allclose(got, answers(load_as_written(raw), x), atol=1e-5)


@st.composite
def one_layer(draw):
    """A float net of one Conv: groups, strides, pads and dilations as they come."""
    groups, per_group, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, strides, dilations = (draw(st.tuples(*[st.integers(1, high)] * 2)) for high in (3, 2, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = {
        "w": rng.standard_normal((groups * out, per_group, *kernel)).astype(np.float32),
        "b": rng.standard_normal(groups * out).astype(np.float32),
    }
    pads = [draw(st.integers(0, 1)) for _ in range(4)]
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"][: draw(st.integers(2, 3))],
            ["y"],
            name="conv",
            group=groups,
            strides=strides,
            dilations=dilations,
            pads=pads,
        )
    ]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilations, strict=True)]
    return model_of(
        nodes, weights, inputs={"x": ["N", groups * per_group, *size]}, outputs={"y": ["N", groups * out, "H", "W"]}
    )


@settings(max_examples=40, deadline=None)
@given(one_layer(), st.sampled_from(["x86-vnni", "x86-avx2"]))
def test_one_convolution_gives_onnxruntimes_integers(net, target):
    proto = written(quantized(net, profile(target, integer_io=True), ranges="min-max"))
    assert [layer.node.op_type for layer in integer_layers(proto)] == ["Conv"]
    raw = proto.SerializeToString()
    info = np.iinfo(load(raw).inputs[0].dtype)
    shape = [d.dim_value for d in net.graph.input[0].type.tensor_type.shape.dim][1:]
    x = np.random.default_rng(3).integers(info.min, info.max, (4, *shape), dtype=info.dtype, endpoint=True)
    got, want = (next(iter(m.predict({"x": x}).values())) for m in (load_reference(raw), load_exact(raw)))
    assert got.dtype == want.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_model_tests(kind="node")
    wanted = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
    return [c for c in loaded if [n.op_type for n in c.model.graph.node] in [[w] for w in wanted]]


def test_onnx_cases_of_integer_operators():
    ran = []
    for case in cases():
        proto = onnx.ModelProto.FromString(case.model.SerializeToString())
        try:
            loaded = load_reference(proto.SerializeToString())
        except ModelError as e:
            assert "cannot be loaded by onnxruntime" in str(e)  # noqa: PT017 - float16 scales and float8
            continue
        for given_arrays, expected in case.data_sets:
            fed = dict(zip([i.name for i in proto.graph.input], given_arrays, strict=True))
            (got,) = loaded.predict(fed).values()
            np.testing.assert_array_equal(got, expected[0], err_msg=case.name)
            assert got.dtype == expected[0].dtype
        ran.append(case.model.graph.node[0].op_type)
    assert set(ran) == {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    assert len(ran) >= 6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_qlinearconv_is_that_of_onnx(channels, taps, zero, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, channels, 5, 4), dtype=np.uint8)
    w = rng.integers(-127, 128, (3, channels, taps, taps)).astype(np.int8)
    constants = {
        "xs": np.float32(0.02),
        "xz": np.uint8(zero),
        "w": w,
        "ws": rng.uniform(0.01, 0.05, 3).astype(np.float32),
        "wz": np.zeros(3, np.int8),
        "ys": np.float32(0.17),
        "yz": np.uint8(120),
        "b": rng.integers(-3000, 3000, 3).astype(np.int32),
    }
    node = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], pads=[1] * 4)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    got = load_reference(proto.SerializeToString()).predict({"x": x})["y"]
    (want,) = ReferenceEvaluator(proto).run(None, {"x": x})
    # Its products are in float64: where they end on a half the last bit of float32 decides.
    assert np.abs(got.astype(int) - want).max() <= 1
    assert np.mean(got != want) < 0.02
    np.testing.assert_array_equal(got, load_exact(proto.SerializeToString()).predict({"x": x})["y"])


def test_dynamic_quantization_runs_on_integers_and_saturates():
    rng = np.random.default_rng(0)
    weights = {"w": rng.choice([-1.0, 1.0], (16, 3)).astype(np.float32)}
    net = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        weights,
        inputs={"x": ["N", 16]},
        outputs={"y": ["N", 3]},
    )
    model = parse_model(net.SerializeToString(), "m")
    raw = serialize_model(quantize_dynamic(model, QuantizeDynamicStep(), load_target("x86-vnni")).model)
    x = rng.uniform(0.8, 1.0, (5, 16)).astype(np.float32)
    plain, pairs = (load_reference(raw, saturate_pairs=s) for s in (False, True))
    np.testing.assert_allclose(answers(plain, x), answers(load_as_written(raw), x), rtol=1e-5, atol=1e-5)
    assert np.abs(answers(pairs, x) - answers(plain, x)).max() > 1


@pytest.mark.parametrize("weight", [(2, 4, 3), (4,), (4, 3)])
def test_weights_of_any_rank_are_multiplied(weight):
    rng = np.random.default_rng(0)
    constants = {
        "as": np.float32(0.1),
        "az": np.uint8(9),
        "b": rng.integers(-127, 128, weight).astype(np.int8),
        "bs": np.float32(0.02),
        "bz": np.int8(0),
        "ys": np.float32(0.5),
        "yz": np.uint8(100),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "as", "az"], ["a"]),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["w"]),
        helper.make_node("MatMul", ["a", "w"], ["m"], name="mm"),
        helper.make_node("QuantizeLinear", ["m", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [2, 5, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw, x = proto.SerializeToString(), {"x": rng.integers(0, 256, (2, 5, 4), dtype=np.uint8)}
    assert len(integer_layers(proto)) == 1
    want = load_as_written(raw).predict(x)["y"]
    np.testing.assert_array_equal(load_reference(raw).predict(x)["y"], want)
    assert load_reference(raw, saturate_pairs=True).predict(x)["y"].shape == want.shape


def test_uint8_weights_and_signed_operators_do_not_saturate():
    x = samples(conv_net())
    for target, form in (("x86-avx2", "qdq"), ("npu-int8-symmetric", "qoperator")):
        raw = written(quantized(conv_net(), target, ranges="min-max", form=form)).SerializeToString()
        np.testing.assert_array_equal(*(answers(load_reference(raw, saturate_pairs=s), x) for s in (False, True)))
    raw = written(quantized(conv_net(), "x86-vnni", ranges="min-max")).SerializeToString()
    plain, pairs = (answers(load_reference(raw, saturate_pairs=s), x) for s in (False, True))
    assert (plain != pairs).any()


def test_a_float_model_runs_node_by_node():
    raw, x = conv_net().SerializeToString(), samples(conv_net())
    assert integer_layers(conv_net()) == ()
    np.testing.assert_array_equal(
        answers(load_reference(raw, saturate_pairs=True), x), answers(load_as_written(raw), x)
    )


def test_a_node_that_holds_a_graph_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)]
    net = model_of(nodes, {"c": np.array(True)}, inputs={"x": ["N", 2]}, outputs={"y": ["N", 2]})
    with pytest.raises(ModelError, match=r"node choice \(If\), which holds a graph of its own; allowed here: plain"):
        load_reference(net.SerializeToString())
