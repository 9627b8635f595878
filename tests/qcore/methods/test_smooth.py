"""SmoothQuant: the function stays the same, the outliers leave the activations."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import model_of
from onnx import helper
from transformers import EncoderShape, encoder, encoder_input, exported_encoder

from qcore.errors import CalibrationError, ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.methods.smooth import SmoothStep, smooth, smoothing_scales, tensors_to_smooth
from qcore.numerics.error import sqnr_db
from qcore.target import load_target

SHAPE = EncoderShape(layers=2, width=32, heads=4, hidden=64)


def run(raw, x, fetch=None):
    session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(fetch, {session.get_inputs()[0].name: x})


def measured(model, x):
    """The largest |x| per channel of every tensor that smooth asks for."""
    names = tensors_to_smooth(model)
    proto = ir.serde.serialize_model(model)
    inner = [n for n in names if n not in {i.name for i in proto.graph.input}]
    proto.graph.ClearField("output")
    proto.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in inner)
    values = dict(zip(inner, run(proto.SerializeToString(), x), strict=True)) | {proto.graph.input[0].name: x}
    return {n: np.abs(values[n]).reshape(-1, values[n].shape[-1]).max(axis=0) for n in names}


@pytest.mark.parametrize("build", [encoder, exported_encoder])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_outputs_stay_the_same(build, alpha):
    proto, x = build(0, SHAPE), encoder_input(SHAPE, n=8)
    model = ir.serde.deserialize_model(proto)
    before = serialize_model(model)
    result = smooth(model, measured(model, x), SmoothStep(alpha=alpha, insert=True))
    assert serialize_model(model) == before
    raw = serialize_model(result.model)
    parse_model(raw, "result")
    reference = run(proto.SerializeToString(), x)[0]
    np.testing.assert_allclose(run(raw, x)[0], reference, atol=1e-5 * np.abs(reference).max())
    assert len(result.changed) == 13
    assert {s.reason for s in result.skipped} == {"its weights are not a constant float32 matrix"}


@pytest.mark.parametrize(("build", "per_layer"), [(encoder, 2), (exported_encoder, 1)])
def test_norms_take_the_scales_and_only_the_rest_gets_a_mul(build, per_layer):
    proto, x = build(0, SHAPE), encoder_input(SHAPE, n=8)
    model = ir.serde.deserialize_model(proto)
    result = smooth(model, measured(model, x), SmoothStep(insert=True))
    added = len(list(result.model.graph)) - len(proto.graph.node)
    # q, k, v and up share their norm's, and the head the last one's through ReduceMean; out (behind Reshape) cannot;
    # down stands behind Gelu, which ends in a Mul with a constant where an exporter wrote it
    assert added == 2 * per_layer
    described = {v.name for n in result.model.graph for v in n.outputs if v.shape is not None}
    assert described <= {v.name for n in model.graph for v in n.outputs if v.shape is not None} | {"y"}


def test_dynamic_quantization_gains_from_smoothing():
    proto, x = encoder(0, SHAPE), encoder_input(SHAPE, n=32)
    model, reference = ir.serde.deserialize_model(proto), run(proto.SerializeToString(), x)[0]
    target = load_target("x86-avx2")

    def error(m):
        return sqnr_db(reference, run(serialize_model(quantize_dynamic(m, QuantizeDynamicStep(), target).model), x)[0])

    smoothed = smooth(model, measured(model, x), SmoothStep(insert=True)).model
    assert error(smoothed) > error(model) + 1


def chain(*, relu, extra_reader):
    """Gemm -> (Relu) -> MatMul: the first layer can hold the scales, unless somebody else reads its output."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 6)).astype(np.float32),
        "b1": rng.standard_normal(8).astype(np.float32),
        "w2": rng.standard_normal((8, 4)).astype(np.float32),
    }
    nodes = [helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="one", transB=1)]
    if relu:
        nodes.append(helper.make_node("Relu", ["h"], ["r"], name="relu"))
    inner = "r" if relu else "h"
    nodes.append(helper.make_node("MatMul", [inner, "w2"], ["y"], name="two"))
    outputs = {"y": ["N", 4]} | ({"z": ["N", 8]} if extra_reader else {})
    if extra_reader:
        nodes.append(helper.make_node("Neg", [inner], ["z"], name="neg"))
    return model_of(nodes, weights, inputs={"x": ["N", 6]}, outputs=outputs)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("extra_reader", [True, False])
def test_a_linear_layer_takes_the_scales_unless_others_read_it(relu, extra_reader):
    proto = chain(relu=relu, extra_reader=extra_reader)
    x = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)
    model = ir.serde.deserialize_model(proto)
    result = smooth(model, measured(model, x), SmoothStep(exclude=("one",), insert=True))
    for ours, theirs in zip(run(serialize_model(result.model), x), run(proto.SerializeToString(), x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert [n.op_type for n in result.model.graph].count("Mul") == (1 if extra_reader else 0)
    assert [s.reason for s in result.skipped] == ["excluded by the recipe"]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), min_size=1), st.floats(0, 1))
def test_scales_can_always_be_divided_by(pairs, alpha):
    x, w = (np.array(side) for side in zip(*pairs, strict=True))
    s = smoothing_scales(x, w, alpha)
    assert np.isfinite(s).all()
    assert (s > 0).all()
    assert (s[(x == 0) | (w == 0)] == 1).all()


def test_alpha_one_gives_all_channels_the_same_maximum():
    x = np.array([1.0, 10.0, 100.0])
    np.testing.assert_allclose(x / smoothing_scales(x, np.array([2.0, 3.0, 4.0]), 1.0), 1.0)


def test_what_cannot_be_done_is_said():
    model = ir.serde.deserialize_model(chain(relu=True, extra_reader=False))
    with pytest.raises(CalibrationError, match=r"maxima of r have shape \(3,\); allowed: finite, \(8,\)"):
        smooth(model, {"r": np.ones(3)}, SmoothStep())
    with pytest.raises(ModelError, match="exclude names node 'nobody'"):
        smooth(model, {}, SmoothStep(exclude=("nobody",)))
    assert {s.reason for s in smooth(model, {}, SmoothStep()).skipped} == {
        "no channel maxima of x",
        "no channel maxima of r",
    }


@pytest.mark.parametrize(("op_type", "through"), [("Gather", True), ("Gather last", False), ("ReduceMean", True),
                                                  ("ReduceMean last", False), ("Identity", True)])  # fmt: skip
def test_what_works_on_channels_by_itself_is_gone_through(op_type, through):
    """The first row of a sequence, or its mean, has the channels that the layer in front has scaled."""
    rng, last = np.random.default_rng(0), op_type.endswith("last")
    weights = {
        "w1": rng.standard_normal((6, 5)).astype(np.float32),
        "w2": rng.standard_normal((5, 4)).astype(np.float32),
        "first": np.array(0),
    }
    middle = {
        "Gather": helper.make_node("Gather", ["h", "first"], ["g"], name="middle", axis=1),
        "Gather last": helper.make_node("Gather", ["h", "every"], ["g"], name="middle", axis=-1),
        "ReduceMean": helper.make_node("ReduceMean", ["h"], ["g"], name="middle", axes=[1], keepdims=0),
        "ReduceMean last": helper.make_node("ReduceMean", ["h"], ["g"], name="middle", axes=[1, 2], keepdims=1),
        "Identity": helper.make_node("Identity", ["h"], ["g"], name="middle"),
    }[op_type]
    weights["every"] = np.array([4, 2, 0, 1, 3])
    if op_type == "ReduceMean last":
        weights["w2"] = weights["w2"][:1]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="one"),
        middle,
        helper.make_node("MatMul", ["g", "w2"], ["y"], name="two"),
    ]
    shape = {"Gather": ["N", 4], "ReduceMean": ["N", 4], "ReduceMean last": ["N", 1, 4]}.get(op_type, ["N", 3, 4])
    proto = model_of(nodes, weights, inputs={"x": ["N", 3, 6]}, outputs={"y": shape})
    x = rng.standard_normal((8, 3, 6)).astype(np.float32)
    model = ir.serde.deserialize_model(proto)
    result = smooth(model, measured(model, x), SmoothStep())
    assert ("two" in result.changed) == through == (not last)
    np.testing.assert_allclose(
        run(serialize_model(result.model), x)[0], run(proto.SerializeToString(), x)[0], atol=1e-5
    )
    if not through:
        assert ("two", "what makes g cannot be scaled") in {(s.node, s.reason) for s in result.skipped}


def test_without_insert_what_nothing_can_hold_is_named():
    model = ir.serde.deserialize_model(chain(relu=True, extra_reader=True))
    x = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)
    result = smooth(model, measured(model, x), SmoothStep())
    assert result.changed == ()
    assert [(s.node, s.reason) for s in result.skipped] == [
        ("one", "what makes x cannot be scaled"),
        ("two", "more than layers read r"),
    ]


@pytest.mark.parametrize(("build", "nodes"), [(encoder, 1), (exported_encoder, 2)])
@pytest.mark.parametrize("copy", [True, False])
def test_layers_get_a_copy_of_a_norm_that_the_next_sum_reads_too(build, nodes, copy):
    shape = EncoderShape(layers=2, width=32, heads=4, hidden=64, post_norm=True)
    proto, x = build(0, shape), encoder_input(shape, n=8)
    model = ir.serde.deserialize_model(proto)
    result = smooth(model, measured(model, x), SmoothStep(copy_norms=copy))
    raw, reference = serialize_model(result.model), run(proto.SerializeToString(), x)[0]
    parse_model(raw, "result")
    np.testing.assert_allclose(run(raw, x)[0], reference, atol=1e-5 * np.abs(reference).max())
    added = len(list(result.model.graph)) - len(proto.graph.node)
    shared = {"layer0.up", "layer1.attention.q", "layer1.attention.k", "layer1.attention.v", "layer1.up"}
    if copy:
        assert added == 3 * nodes  # one copy of each norm but the last, whose readers are alone
        assert shared <= set(result.changed)
    else:
        assert added == 0
        assert shared <= {s.node for s in result.skipped if s.reason.startswith("more than layers read layer")}
