"""Float16: the same answers to half precision on onnx's own node cases, one Cast per tensor and direction."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import conv_head_net, conv_net, model_of
from onnx import helper
from onnx.backend.test.case.node import collect_testcases
from transformers import EncoderShape, encoder, encoder_input, exported_encoder

from qcore.errors import ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.half import Float16Step, to_float16
from qcore.numerics.error import sqnr_db

LARGEST = float(np.finfo(np.float16).max)


def run(proto, inputs):
    raw = proto if isinstance(proto, bytes) else proto.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=False)))


def halved(proto, **options):
    model = ir.serde.deserialize_model(proto)
    before = ir.serde.serialize_model(model).SerializeToString()
    result = to_float16(model, Float16Step(**options))
    assert ir.serde.serialize_model(model).SerializeToString() == before
    raw = serialize_model(result.model)
    parse_model(raw, "result")
    onnx.checker.check_model(onnx.ModelProto.FromString(raw), full_check=True)
    assert raw == serialize_model(to_float16(model, Float16Step(**options)).model)
    return result, raw


def net_and_input(name):
    rng = np.random.default_rng(0)
    match name:
        case "conv":
            return conv_net(), rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
        case "head":
            return conv_head_net(), rng.standard_normal((4, 3, 6, 6)).astype(np.float32)
        case "encoder":
            return encoder(0, EncoderShape(layers=2)), encoder_input()
        case _:
            return exported_encoder(0, EncoderShape(layers=2)), encoder_input()


@pytest.mark.parametrize("name", ["conv", "head", "encoder", "exported"])
@pytest.mark.parametrize("keep_io", [True, False])
def test_whole_nets_in_half_precision(name, keep_io):
    proto, x = net_and_input(name)
    result, raw = halved(proto, keep_io=keep_io)
    y = run(raw, [x if keep_io else x.astype(np.float16)])[0]
    assert y.dtype == (np.float32 if keep_io else np.float16)
    assert sqnr_db(run(proto, [x])[0], y) > 45
    assert result.skipped == ()
    assert len(result.changed) == len(proto.graph.node)
    casts = [n for n in result.model.graph if n.op_type == "Cast"]
    assert len(casts) == (2 if keep_io else 0)  # one in, one out
    floats = [
        i.name for i in onnx.ModelProto.FromString(raw).graph.initializer if i.data_type == onnx.TensorProto.FLOAT
    ]
    assert floats == []


def test_the_file_is_half_as_large():
    proto = encoder(0, EncoderShape(width=64, hidden=256, heads=4))
    assert len(halved(proto)[1]) < 0.55 * proto.ByteSize()


def test_casts_are_shared():
    """Nodes that stay float32 between others get one Cast per tensor and direction, however many read it."""
    proto = encoder(0, EncoderShape(layers=2))
    result, raw = halved(proto, exclude_operators=("LayerNormalization", "Softmax"))
    seen = Counter((n.inputs[0].name, n.attributes["to"].as_int()) for n in result.model.graph if n.op_type == "Cast")
    assert max(seen.values()) == 1
    x = encoder_input()
    assert sqnr_db(run(proto, [x])[0], run(raw, [x])[0]) > 45
    assert {s.op_type for s in result.skipped} == {"LayerNormalization", "Softmax"}


def test_resize_keeps_its_scales_float32():
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["r"], name="resize", mode="nearest"),
        helper.make_node("Relu", ["r"], ["y"], name="relu"),
    ]
    scales = np.array([1, 1, 2, 2], np.float32)
    proto = model_of(nodes, {"scales": scales}, inputs={"x": [1, 2, 3, 3]}, outputs={"y": [1, 2, 6, 6]})
    result, raw = halved(proto)
    assert result.changed == ("resize", "relu")
    kinds = {i.name: i.data_type for i in onnx.ModelProto.FromString(raw).graph.initializer}
    assert kinds == {"scales": onnx.TensorProto.FLOAT}
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(run(raw, [x])[0], run(proto, [x])[0], rtol=2e-3)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e5, "constant c holds 1e+05; float16 ends at 65504"), (1e-12, "constant c holds 1e-12, of which float16 keeps")],
)
def test_constants_that_do_not_fit_keep_their_node_float32(value, reason):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Add", ["r", "c"], ["s"], name="add"),
        helper.make_node("Sigmoid", ["s"], ["y"], name="sigmoid"),
    ]
    weights = {"c": np.array([value], np.float32)}
    proto = model_of(nodes, weights, inputs={"x": ["N", 3]}, outputs={"y": ["N", 3]})
    result, raw = halved(proto)
    assert [(s.node, reason in s.reason) for s in result.skipped] == [("add", True)]
    assert result.changed == ("relu", "sigmoid")
    x = np.array([[0.5, -1, 3]], np.float32)
    np.testing.assert_allclose(run(raw, [x])[0], run(proto, [x])[0], rtol=2e-3)


def test_clip_bounds_beyond_float16_end_where_it_ends():
    node = helper.make_node("Clip", ["x", "", "high"], ["y"], name="clip")
    proto = model_of([node], {"high": np.float32(3e38).reshape(())}, inputs={"x": [3]}, outputs={"y": [3]})
    result, raw = halved(proto)
    assert result.changed == ("clip",)
    np.testing.assert_array_equal(run(raw, [np.array([1, 2, 3], np.float32)])[0], [1, 2, 3])


def test_subgraphs_stay_float32_and_see_float32():
    def branch(op):
        out = helper.make_tensor_value_info(f"{op}_y", 1, [2])
        return helper.make_graph([helper.make_node(op, ["r"], [f"{op}_y"])], op, [], [out])

    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("ReduceSum", ["r"], ["total"], name="sum", keepdims=0),
        helper.make_node("Cast", ["total"], ["positive"], name="cast", to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["positive"], ["i"], name="if", then_branch=branch("Neg"), else_branch=branch("Exp")),
        helper.make_node("Sigmoid", ["i"], ["y"], name="sigmoid"),
    ]
    proto = model_of(nodes, {}, inputs={"x": [2]}, outputs={"y": [2]})
    result, raw = halved(proto)
    assert {s.node: s.reason for s in result.skipped} == {"if": "it has a subgraph, which stays float32"}
    for x in ([1, 2], [-1, -2]):
        np.testing.assert_allclose(run(raw, [np.float32(x)])[0], run(proto, [np.float32(x)])[0], rtol=2e-3)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ModelError, match="exclude names node 'nobody'"):
        halved(conv_net(), exclude=("nobody",))
    names = tuple(n.name for n in conv_net().graph.node)
    with pytest.raises(ModelError, match="no node can be float16: excluded by the recipe"):
        halved(conv_net(), exclude=names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_node_cases_of_onnx_give_the_same_answers():
    """Every node case that the runtime runs: refused with a reason, or equal to half precision and checker-clean."""
    outcome: Counter[str] = Counter()
    for case in collect_testcases(None):
        opset = {o.domain: o.version for o in case.model.opset_import}.get("", 0)
        inputs = case.data_sets[0][0]
        try:
            expected = run(case.model, inputs) if opset >= 13 else None
        except Exception:  # noqa: BLE001 - the runtime lacks the operator: nothing to compare with
            expected = None
        if expected is None:
            continue
        try:
            result = to_float16(ir.serde.deserialize_model(case.model), Float16Step())
        except ModelError:
            outcome["refused"] += 1
            continue
        proto = ir.serde.serialize_model(result.model)
        onnx.checker.check_model(proto, full_check=True)
        for want, got in zip(expected, run(proto, inputs), strict=True):
            if isinstance(want, np.ndarray) and want.dtype.kind == "f":
                want, got = np.clip(want, -LARGEST, LARGEST), np.clip(got, -LARGEST, LARGEST)  # masks of -3e38
                np.testing.assert_allclose(got, want, rtol=5e-3, atol=5e-3, err_msg=case.name)
            elif isinstance(want, np.ndarray):
                np.testing.assert_array_equal(got, want, err_msg=case.name)
        outcome["same"] += 1
    assert outcome["same"] > 1000
