"""One node in float16: Casts before and behind it, its constants rounded once and stored in half the bytes."""

import numpy as np
import onnx_ir as ir

from qcore.graph.edit import add_initializer, fresh_name
from qcore.graph.traverse import constant_array, node_name

_LARGEST = float(np.finfo(np.float16).max)
# Operators whose every float input and output has the one type T; Resize and Upsample keep float32 scales.
_OPERATORS = (
    *(
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Relu",
        "LeakyRelu",
        "PRelu",
    ),
    *(
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "Clip",
        "Softmax",
        "LogSoftmax",
        "Gelu",
        "Erf",
        "Exp",
        "Elu",
        "Abs",
    ),
    *("Neg", "ReduceMean", "ReduceMax", "GlobalAveragePool", "AveragePool", "MaxPool", "Concat"),
    *("LayerNormalization", "InstanceNormalization"),
)


def compute_in_half(graph: ir.Graph, node: ir.Node) -> str | None:
    """Let `node` compute in float16, or return why it stays float32.

    Args:
        graph: the graph that owns `node` (of `editable_copy`); edited.
        node: its float inputs and first output are float32.
    """
    if node.op_type not in _OPERATORS or node.domain != "":
        return f"{node.op_type} is not computed in float16"
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return "more than its first output is used"
    arrays = [constant_array(v) for v in node.inputs]
    if any(a is not None and a.dtype == np.float32 and not _fits(a) for a in arrays):
        return f"a constant of it is beyond {_LARGEST:g}, the largest float16"
    for index, (value, array) in enumerate(zip(node.inputs, arrays, strict=True)):
        if value is None or (array is not None and array.dtype != np.float32):
            continue
        if array is not None:
            half = add_initializer(graph, f"{value.name}_float16", array.astype(np.float16))
        else:
            half = _cast(graph, value, ir.DataType.FLOAT16, f"{node_name(node)}_input{index}_float16")
            half_node = half.producer()
            assert half_node is not None  # noqa: S101 - it has just been made
            graph.insert_before(node, half_node)
        node.replace_input_with(index, half)
    _cast_back(graph, node)
    return None


def _fits(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    return array.size == 0 or bool(np.abs(array).max() <= _LARGEST)


def _cast_back(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    name, kind = output.name, output.type
    full = _cast(graph, output, ir.DataType.FLOAT, f"{node_name(node)}_float32")
    cast = full.producer()
    assert cast is not None  # noqa: S101 - it has just been made
    for reader, index in list(output.uses()):
        if reader is not cast:
            reader.replace_input_with(index, full)
    for i, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[i] = full
    full.type, full.shape = kind, output.shape
    output.type = ir.TensorType(ir.DataType.FLOAT16)
    output.name, full.name = full.name, name
    graph.insert_after(node, cast)


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """Return `value` cast to `to` by a node that is not yet in the graph."""
    node = ir.node("Cast", [value], {"to": int(to)}, name=fresh_name(graph, name))
    result = node.outputs[0]
    result.name = fresh_name(graph, f"{name}_value")
    result.type, result.shape = ir.TensorType(to), value.shape
    return result
