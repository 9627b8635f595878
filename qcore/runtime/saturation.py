"""Do the integer kernels of this machine add pairs of u8s8 products in 16 bits? Asked of the kernels themselves.

x86 without VNNI has them (`pmaddubsw`); there a file is judged with kernels that do not, at up to twice the time.
"""

import functools

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[np.generic]

_RIGHT = 200
"""What every output is if nothing saturates; if pairs do, about half of it."""
_DEEP, _FEW = 64, 3
_CONVOLUTIONS = ((_DEEP, _DEEP, 1, 1), (16, 16, 3, 1), (16, _FEW, 3, 1), (16, 1, 3, 16))
"""Filters (out, in per group, size, groups) that reach the kernels for deep, shallow and depthwise layers."""


@functools.cache
def pairs_saturate() -> bool:
    """Say whether the runtime as it comes computes other integers than it should on this CPU.

    Every activation is 255 and every weight 127, so two products are more than 16 bits hold.
    """
    return any(_saturates(*shape) for shape in _CONVOLUTIONS) or _product_saturates()


def _saturates(out: int, per_group: int, size: int, groups: int) -> bool:
    channels = per_group * groups
    scale = per_group * size * size * 255 * 127 / _RIGHT
    constants: dict[str, Array] = {
        "w": np.full((out, per_group, size, size), 127, np.int8),
        "one": np.array(1, np.float32),
        "scale": np.array(scale, np.float32),
        "zero": np.array(0, np.uint8),
        "weight_zero": np.array(0, np.int8),
    }
    inputs = ["x", "one", "zero", "w", "one", "weight_zero", "scale", "zero"]
    node = helper.make_node("QLinearConv", inputs, ["y"], group=groups)
    x = np.full((1, channels, 8, 8), 255, np.uint8)
    return bool(np.any(_answer(node, constants, x, TensorProto.UINT8) != _RIGHT))


def _product_saturates() -> bool:
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x, w = np.full((8, _DEEP), 255, np.uint8), np.full((_DEEP, _DEEP), 127, np.int8)
    return bool(np.any(_answer(node, {"w": w}, x, TensorProto.INT32) != _DEEP * 255 * 127))


def _answer(node: NodeProto, constants: dict[str, Array], x: Array, kind: int) -> Array:
    shape = list(x.shape)
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", kind, [None] * len(shape))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, {"x": x})[0]
    return answer


def only_signed(model: bytes) -> bool:
    """Say whether all activations of the quantized file `model` are int8, so that no u8s8 kernel takes part in it.

    For signed activations x86 has kernels of their own, which add in 32 bits.
    """
    graph = ModelProto.FromString(model).graph
    signed = {i.name for i in graph.initializer if i.data_type == TensorProto.INT8}
    zero_points = {"QuantizeLinear": 2, "QLinearConv": 2, "QLinearMatMul": 2, "QGemm": 2}
    for node in graph.node:
        if node.op_type in ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"):
            return False  # of uint8 activations, or none that a constant tells
        place = zero_points.get(node.op_type)
        if place is not None and (len(node.input) <= place or node.input[place] not in signed):
            return False
    return True
