"""Where QuantizeLinear / DequantizeLinear pairs go and what they are called; ranges arrive as arguments.

The written form is QDQ (ONNX opset 13): every runtime that knows it fuses `DQ -> op -> Q` into its integer kernel,
and one that does not computes the same numbers in float. Integers of 16 and 4 bits came with opset 21; in older models
they are written with the operators of the same name of the domain com.microsoft, which ONNX Runtime has had since
1.16 (refused by it: the standard operators with such types below opset 21; taken: both forms from opset 21 on).
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, fresh_name
from qcore.graph.traverse import constant_array
from qcore.numerics.affine import Integers, QParams

CONTRIB = "com.microsoft"
STANDARD_16_AND_4_BITS = 21


def insert_activation_qdq(
    graph: ir.Graph, value: ir.Value, q: QParams, readers: Container[ir.Node] | None = None
) -> ir.Value:
    """Put `Q -> DQ` behind `value` and let its readers read the result, which is returned.

    If `value` is a graph output and all readers are meant, the result takes over its name, and `value` is renamed
    `<name>_float`; a graph input that is also an output stays both.

    Args:
        graph: the graph that owns `value`; edited.
        value: a float tensor.
        q: per-tensor parameters of dtype uint8, int8, uint16 or int16.
        readers: the nodes that shall read the result; None for all and the graph's caller.
    """
    name = str(value.name)
    scale, zero = _parameters(graph, name, q)
    domain = _domain(graph, q)
    quantize = ir.node(
        "QuantizeLinear", [value, scale, zero], domain=domain, name=fresh_name(graph, f"{name}_quantize")
    )
    dequantize = ir.node(
        "DequantizeLinear",
        [quantize.outputs[0], scale, zero],
        domain=domain,
        name=fresh_name(graph, f"{name}_dequantize"),
    )
    result = dequantize.outputs[0]
    result.type, result.shape = value.type, value.shape
    was_output = readers is None and value.is_graph_output() and not value.is_graph_input()
    for node, index in list(value.uses()):
        if node is not quantize and (readers is None or node in readers):
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
        graph.insert_before(graph[0], [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    return result


def dequantized_initializer(graph: ir.Graph, name: str, integers: Integers, q: QParams) -> ir.Value:
    """Return a float value that DQ computes from a new integer initializer `<name>_quantized`.

    Args:
        graph: edited; the DQ node goes to its start.
        name: name of the constant; parts are called `<name>_quantized`, `_scale`, `_zero_point`, `_dequantized`.
        integers: the constant, quantized with `q`.
        q: parameters; `q.axis` is the channel axis of `integers` or None. For int32 no zero point is written.
    """
    stored = add_initializer(graph, f"{name}_quantized", _stored(integers, q))
    scale, zero = _parameters(graph, name, q)
    inputs = [stored, scale] if zero is None else [stored, scale, zero]
    attributes = {} if q.axis is None else {"axis": q.axis}
    node = ir.node(
        "DequantizeLinear",
        inputs,
        attributes,
        domain=_domain(graph, q),
        name=fresh_name(graph, f"{name}_dequantize"),
    )
    result = node.outputs[0]
    result.name = fresh_name(graph, f"{name}_dequantized")
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(integers.shape)
    graph.insert_before(graph[0], node)
    return result


def is_quantize(node: ir.Node | None) -> bool:
    """Say whether `node` is a QuantizeLinear of either domain."""
    return node is not None and node.op_type == "QuantizeLinear"


def is_dequantize(node: ir.Node | None) -> bool:
    """Say whether `node` is a DequantizeLinear of either domain."""
    return node is not None and node.op_type == "DequantizeLinear"


def _domain(graph: ir.Graph, q: QParams) -> str:
    if q.dtype not in ("uint16", "int16", "int4") or graph.opset_imports.get("", 0) >= STANDARD_16_AND_4_BITS:
        return ""
    graph.opset_imports.setdefault(CONTRIB, 1)
    return CONTRIB


def _stored(integers: Integers, q: QParams) -> NDArray[np.generic]:
    return integers.astype(ir.DataType.INT4.numpy()) if q.dtype == "int4" else integers


def _parameters(graph: ir.Graph, name: str, q: QParams) -> tuple[ir.Value, ir.Value | None]:
    scale = add_initializer(graph, f"{name}_scale", q.scale)
    if q.dtype == "int32":
        return scale, None
    zero = q.zero_point.astype("int8" if q.dtype == "int4" else q.dtype)
    return scale, add_initializer(graph, f"{name}_zero_point", _stored(zero, q))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRange:
    """The reals that the lowest and highest level of an activation quantizer stand for, and the step between levels."""

    low: float
    high: float
    step: float


def activation_ranges(model: ir.Model) -> dict[str, ActivationRange]:
    """Return the range of every QuantizeLinear with constant parameters for the whole tensor, by its input's name.

    Levels are those of the dtype of the zero point, uint8 without one; activations of 4 bits are left out.
    """
    ranges = {}
    for node in model.graph:
        if not is_quantize(node) or node.inputs[0] is None:
            continue
        scale = constant_array(node.inputs[1])
        given = node.inputs[2] if len(node.inputs) > 2 else None
        zero = np.zeros((), np.uint8) if given is None else constant_array(given)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            continue
        step, middle, dtype = float(scale.reshape(())), int(zero.reshape(())), zero.dtype
        if dtype.kind not in "iu":
            continue
        low, high = (step * (level - middle) for level in (np.iinfo(dtype).min, np.iinfo(dtype).max))
        ranges[str(node.inputs[0].name)] = ActivationRange(low=low, high=high, step=step)
    return ranges
