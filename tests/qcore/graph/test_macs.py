import numpy as np
import onnx
import pytest
from models import conv_net, model_of
from onnx import helper

from qcore.graph.io import parse_model, serialize_model
from qcore.graph.macs import node_macs


def parsed(proto):
    return parse_model(proto.SerializeToString(), "m")


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
