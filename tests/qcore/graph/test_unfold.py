"""Batch norms back into a graph: nothing changes, and folding gives the graph back."""

import numpy as np
import onnx
import pytest
from models import conv_net, model_of
from onnx import helper
from quantizing import constants, run_plain

from qcore.graph.edit import editable_copy
from qcore.graph.fold import fold_batchnorm
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.unfold import folded_back, outputs_to_normalize, unfold_batchnorm


def parsed(proto: onnx.ModelProto):
    return parse_model(proto.SerializeToString(), "m")


def statistics(names, proto: onnx.ModelProto):
    rng = np.random.default_rng(1)
    sizes = {n.output[0]: constants(proto)[n.input[1]].shape[0] for n in proto.graph.node if n.op_type == "Conv"}
    return {name: (rng.standard_normal(sizes[name]), rng.random(sizes[name]) * 4) for name in names}


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_way_there_and_back_changes_nothing(scale: float) -> None:
    proto = conv_net()
    folded = fold_batchnorm(parsed(proto)).model
    raw = serialize_model(folded)
    proto = onnx.ModelProto.FromString(raw)
    names = outputs_to_normalize(editable_copy(folded))
    assert names == tuple(n.output[0] for n in proto.graph.node if n.op_type == "Conv")
    opened = unfold_batchnorm(folded, statistics(names, proto))
    assert serialize_model(folded) == raw
    there = onnx.ModelProto.FromString(serialize_model(opened))
    onnx.checker.check_model(there, full_check=True)
    assert [n.op_type for n in there.graph.node].count("BatchNormalization") == len(names)
    back = onnx.ModelProto.FromString(serialize_model(folded_back(opened, folded)))
    shape = [d.dim_value or 3 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = (np.random.default_rng(2).standard_normal(shape) * scale).astype(np.float32)
    wanted = run_plain(proto, x)
    for made in (there, back):
        np.testing.assert_allclose(run_plain(made, x), wanted, rtol=1e-4, atol=1e-4 * scale)
    assert [(n.op_type, list(n.input), list(n.output)) for n in back.graph.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in proto.graph.node
    ]
    for name, w in constants(proto).items():
        np.testing.assert_allclose(constants(back)[name], w, rtol=1e-4, atol=1e-5)


def test_a_convolution_without_bias_gets_one_and_zeros_stay_zeros() -> None:
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    w[w < 0] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 3, 5, 5]}, outputs={"y": ["N", 4, 3, 3]})
    model = parsed(proto)
    opened = unfold_batchnorm(model, {"c": (np.ones(4), np.full(4, 2.0))})
    opened.graph.initializers["c.gamma"].const_value = type(model.graph.initializers["w"].const_value)(
        onnx.numpy_helper.from_array(np.full(4, -1.0, np.float32), "c.gamma")
    )
    back = onnx.ModelProto.FromString(serialize_model(folded_back(opened, model)))
    got = constants(back)
    assert (np.signbit(got["w"]) == (w > 0)).all()  # turned around, and no -0.0 where a zero was
    assert [len(n.input) for n in back.graph.node] == [3, 1]


def test_what_cannot_be_folded_again_is_left_alone() -> None:
    w = {k: np.ones((4, 4, 1, 1), np.float32) for k in ("shared", "last", "before")}
    ones = {k: np.ones(4, np.float32) for k in "abcd"}
    nodes = [
        helper.make_node("Conv", ["x", "shared"], ["p"]),
        helper.make_node("Conv", ["p", "shared"], ["q"]),
        helper.make_node("Conv", ["q", "before"], ["r"]),
        helper.make_node("BatchNormalization", ["r", *"abcd"], ["s"]),
        helper.make_node("Conv", ["s", "last"], ["y"]),
    ]
    proto = model_of(nodes, {**w, **ones}, inputs={"x": ["N", 4, 2, 2]}, outputs={"y": ["N", 4, 2, 2]})
    assert outputs_to_normalize(editable_copy(parsed(proto))) == ()
