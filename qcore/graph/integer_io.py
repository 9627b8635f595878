"""Integer graph inputs and outputs: the Q at the front and the DQ at the end become the caller's.

What the caller must compute is kept in the model's metadata, since a plain ONNX input has no scale.
"""

import json

import onnx_ir as ir

from qcore.graph.qdq import is_dequantize, is_quantize
from qcore.graph.traverse import constant_array, only_consumer
from qcore.numerics.integer_io import INTEGER_IO_KEY


def to_integer_io(model: ir.Model) -> None:
    """Make integers of every graph input that only a Q reads and every graph output that a DQ gives; edits `model`.

    Inputs and outputs keep their names. Scales and zero points go to the metadata, key `INTEGER_IO_KEY`.
    """
    graph = model.graph
    found: dict[str, dict[str, object]] = {"inputs": {}, "outputs": {}}
    for value in graph.inputs:
        node = only_consumer(value)
        if node is not None and is_quantize(node):
            found["inputs"][str(value.name)] = _parameters(node)
            _take_over_input(graph, value, node)
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if producer is not None and is_dequantize(producer) and _is_float_of_quantized(producer):
            found["outputs"][str(value.name)] = _parameters(producer)
            _hand_out(graph, index, producer)
    model.metadata_props[INTEGER_IO_KEY] = json.dumps(found, sort_keys=True, separators=(",", ":"))


def _parameters(node: ir.Node) -> dict[str, object]:
    scale, zero = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    assert scale is not None and zero is not None  # noqa: S101, PT018 - insert_activation_qdq writes both
    return {"dtype": zero.dtype.name, "scale": float(scale), "zero_point": int(zero)}


def _take_over_input(graph: ir.Graph, value: ir.Value, quantize: ir.Node) -> None:
    zero = quantize.inputs[2]
    assert zero is not None  # noqa: S101 - insert_activation_qdq writes it
    value.type = ir.TensorType(zero.dtype or ir.DataType.UINT8)
    quantize.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(quantize, safe=True)


def _is_float_of_quantized(dequantize: ir.Node) -> bool:
    source = dequantize.inputs[0]
    return source is not None and source.producer() is not None and is_quantize(source.producer())


def _hand_out(graph: ir.Graph, index: int, dequantize: ir.Node) -> None:
    real, integers, zero = dequantize.outputs[0], dequantize.inputs[0], dequantize.inputs[2]
    assert integers is not None and zero is not None  # noqa: S101, PT018 - insert_activation_qdq writes them
    integers.type, integers.shape = ir.TensorType(zero.dtype or ir.DataType.UINT8), real.shape
    graph.outputs[index] = integers
    if real.uses():
        real.name, integers.name = integers.name, real.name
    else:
        name = real.name
        graph.remove(dequantize, safe=True)
        real.name = None
        integers.name = name
