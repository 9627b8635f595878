"""Multiply-accumulates against figures computed by hand."""

import numpy as np
import onnx
import pytest
from models import conv_net, model_of
from onnx import helper

from qcore.errors import ModelError
from qcore.graph.cost import layer_costs, model_macs, node_macs
from qcore.graph.io import load_model, parse_model, serialize_model


def parsed(proto):
    return parse_model(proto.SerializeToString(), "m")


@pytest.mark.parametrize("batch", ["N", 1])
def test_layers_of_a_small_net(batch):
    found = {c.node: c.macs for c in layer_costs(parsed(conv_net(batch=batch)))}
    assert found == {"conv1": 6 * 3 * 9 * 36 + 6 * 3 * 9 * 28, "depthwise": 6 * 9 * 64, "pointwise": 36 * 64, "fc": 24}


def test_matrix_products_and_transposed_convolutions():
    nodes = [
        helper.make_node("ConvTranspose", ["x", "t"], ["up"], name="up", strides=[2, 2]),
        helper.make_node("Transpose", ["up"], ["flipped"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["up", "flipped"], ["product"], name="product"),
        helper.make_node("MatMul", ["product", "w"], ["y"], name="linear"),
    ]
    weights = {"t": np.ones((3, 5, 2, 2), np.float32), "w": np.ones((8, 7), np.float32)}
    proto = model_of(nodes, weights, inputs={"x": ["N", 3, 4, 6]}, outputs={"y": ["N", 5, 8, 7]})
    found = {c.node: (c.macs, c.weight) for c in layer_costs(parsed(proto))}
    assert found == {
        "up": (3 * 5 * 4 * 24, "t"),
        "product": (5 * 8 * 8 * 12, None),
        "linear": (5 * 8 * 8 * 7, "w"),
    }


def test_a_size_that_is_not_known_is_refused():
    proto = model_of(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="c")],
        {"w": np.ones((2, 3, 1, 1), np.float32)},
        inputs={"x": ["N", 3, "H", 4]},
        outputs={"y": ["N", 2, "H", 4]},
    )
    with pytest.raises(ModelError, match=r"cost of c cannot be counted: .* allowed: only the batch symbolic"):
        model_macs(parsed(proto))


@pytest.mark.parametrize(
    ("name", "macs"),
    [("resnet8_cifar10", 12_501_632), ("mobilenetv2_100_224", 300_774_272)],  # MLPerf Tiny: 12.5 M; the paper: 300 M
)
def test_published_nets(name, macs, bench):
    assert model_macs(load_model(bench / "models" / f"{name}.onnx")) == macs


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_one_sample_is_counted_whatever_the_batch(batch):
    model = parsed(conv_net(batch=batch))
    before = serialize_model(model)
    assert node_macs(model) == {
        "conv1": 8 * 8 * 6 * 3 * 9,
        "depthwise": 8 * 8 * 6 * 9,
        "pointwise": 8 * 8 * 6 * 6,
        "fc": 6 * 4,
    }
    assert serialize_model(model) == before


def test_transposed_convolutions_matrices_and_transposed_inputs():
    weights = {
        "wt": np.zeros((4, 3, 2, 2), np.float32),  # 2 groups: 4 in, 6 out
        "wg": np.zeros((5, 6), np.float32),
        "wm": np.zeros((8, 5), np.float32),
    }
    nodes = [
        helper.make_node("ConvTranspose", ["x", "wt"], ["t"], name="up", group=2, strides=[2, 2]),
        helper.make_node("MatMul", ["t", "wm"], ["m"], name="product"),
        helper.make_node("Gemm", ["s", "wg"], ["g"], name="turned", transA=1),
    ]
    proto = model_of(
        nodes, weights, inputs={"x": ["N", 4, 4, 4], "s": [5, 1]}, outputs={"m": list("abcd"), "g": list("ef")}
    )
    assert node_macs(parsed(proto)) == {
        "up": 4 * 4 * 4 * 3 * 4,  # every input value to 3 outputs of its group, at 4 taps
        "product": 6 * 8 * 8 * 5,
        "turned": 6 * 5,  # five rows are no batch: one sample of them would not fit the weights
    }


def test_what_has_no_known_shape_is_left_out():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    proto = model_of(
        nodes, {"w": np.zeros((4, 2), np.float32)}, inputs={"x": ["N", "tokens", 4]}, outputs={"z": list("abc")}
    )
    assert node_macs(parsed(proto)) == {}
    onnx.checker.check_model(proto)
