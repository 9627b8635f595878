"""Where QuantizeLinear / DequantizeLinear pairs go and what they are called; ranges arrive as arguments.

The written form is QDQ (ONNX opset 13): every runtime that knows it fuses `DQ -> op -> Q` into its integer kernel,
and one that does not computes the same numbers in float.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, fresh_name
from qcore.numerics.affine import QParams


def insert_activation_qdq(graph: ir.Graph, value: ir.Value, q: QParams) -> ir.Value:
    """Put `Q -> DQ` behind `value` and let all its readers read the result, which is returned.

    If `value` is a graph output, the result takes over its name, and `value` is renamed `<name>_float`; a graph input
    that is also an output stays both.

    Args:
        graph: the graph that owns `value`; edited.
        value: a float tensor.
        q: per-tensor parameters of dtype uint8 or int8.
    """
    name = str(value.name)
    scale, zero = _parameters(graph, name, q)
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=fresh_name(graph, f"{name}_quantize"))
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale, zero], name=fresh_name(graph, f"{name}_dequantize")
    )
    result = dequantize.outputs[0]
    result.type, result.shape = value.type, value.shape
    was_output = value.is_graph_output() and not value.is_graph_input()
    for node, index in list(value.uses()):
        if node is not quantize:
            node.replace_input_with(index, result)
    if was_output:
        value.name = fresh_name(graph, f"{name}_float")
        for i, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[i] = result
    quantize.outputs[0].name = fresh_name(graph, f"{name}_quantized")
    result.name = name if was_output else fresh_name(graph, f"{name}_dequantized")
    producer = value.producer()
    if producer is None:
        first = next(iter(graph))
        graph.insert_before(first, [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    return result


def dequantized_initializer(
    graph: ir.Graph, name: str, integers: NDArray[np.signedinteger | np.unsignedinteger], q: QParams
) -> ir.Value:
    """Return a float value that DQ computes from a new integer initializer `<name>_quantized`.

    Args:
        graph: edited; the DQ node goes to its start.
        name: name of the constant; parts are called `<name>_quantized`, `_scale`, `_zero_point`, `_dequantized`.
        integers: the constant, quantized with `q`.
        q: parameters; `q.axis` is the channel axis of `integers` or None. For int32 no zero point is written.
    """
    stored = add_initializer(graph, f"{name}_quantized", integers)
    scale, zero = _parameters(graph, name, q)
    inputs = [stored, scale] if zero is None else [stored, scale, zero]
    attributes = {} if q.axis is None else {"axis": q.axis}
    node = ir.node("DequantizeLinear", inputs, attributes, name=fresh_name(graph, f"{name}_dequantize"))
    result = node.outputs[0]
    result.name = fresh_name(graph, f"{name}_dequantized")
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(integers.shape)
    graph.insert_before(next(iter(graph)), node)
    return result


def _parameters(graph: ir.Graph, name: str, q: QParams) -> tuple[ir.Value, ir.Value | None]:
    scale = add_initializer(graph, f"{name}_scale", q.scale)
    if q.dtype == "int32":
        return scale, None
    return scale, add_initializer(graph, f"{name}_zero_point", q.zero_point.astype(q.dtype))
