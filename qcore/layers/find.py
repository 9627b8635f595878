"""What the layers of a QDQ graph are: a node, what its kernel absorbs, and the pair that quantizes the result."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.traverse import constant_array, int_attribute, node_name, only_consumer

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FUSED = ("Relu", "Clip", "Cast")
"""What a layer's integer kernel does on the way out: it belongs to the layer before it."""
MOVERS = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Slice", "Split", "Gather")
"""They only move values: their error is that of the layer before them."""
GRAPH_INPUT = "(input)"

Pair = tuple[ir.Node, ir.Node]
"""A QuantizeLinear and the DequantizeLinear behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a QDQ graph.

    `nodes` are the layer's node and what is fused behind it (none for a graph input); `result` is the value that they
    end in, `pair` what quantizes that, or None where it stays float. `tensor` is the name that the result has in the
    float model: a pair at a graph output takes the name over.
    """

    name: str
    op_type: str
    tensor: str
    nodes: tuple[ir.Node, ...]
    result: ir.Value
    pair: Pair | None

    @property
    def is_quantized(self) -> bool:
        """Whether anything in the layer is rounded: its operands, its weights or its result."""
        return self.pair is not None or any(
            (p := v.producer()) is not None and p.op_type == DEQUANTIZE for v in self.nodes[0].inputs if v is not None
        )


def find_layers(graph: ir.Graph) -> tuple[Layer, ...]:
    """Return the layers of `graph` in its order, quantized graph inputs first."""
    layers: list[Layer] = []
    for value in graph.inputs:
        pair = quantizing_pair(value)
        if pair is not None:
            layers.append(_layer(str(value.name), GRAPH_INPUT, (), value, pair))
    fused: set[ir.Node] = set()
    for node in graph:
        if node in fused or node.op_type in (QUANTIZE, DEQUANTIZE, *MOVERS) or not node.outputs[0].name:
            continue
        if all(v is None or is_constant(v) for v in node.inputs) or node.outputs[0].dtype not in (None, *_FLOATS):
            continue
        nodes = (node, *_fused_behind(node))
        fused.update(nodes)
        result = nodes[-1].outputs[0]
        layers.append(_layer(node_name(node), node.op_type, nodes, result, quantizing_pair(result)))
    return tuple(layers)


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def quantizing_pair(value: ir.Value) -> Pair | None:
    """Return the first Q/DQ pair that reads `value`, or None."""
    for node, index in value.uses():
        if node.op_type == QUANTIZE and index == 0:
            for behind, at in node.outputs[0].uses():
                if behind.op_type == DEQUANTIZE and at == 0:
                    return node, behind
    return None


def is_constant(value: ir.Value) -> bool:
    """Say whether `value` is an initializer or computed from initializers alone."""
    stack = [value]
    while stack:
        current = stack.pop()
        producer = current.producer()
        if producer is None:
            if constant_array(current) is None:
                return False
        else:
            stack += [v for v in producer.inputs if v is not None]
    return True


def layers_before(layers: tuple[Layer, ...]) -> dict[str, tuple[str, ...]]:
    """Return, by the name of each layer, the names of those whose results it reads, directly or through movers."""
    owner = {layer.result: layer.name for layer in layers}
    known: dict[ir.Value, tuple[str, ...]] = {}

    def sources(value: ir.Value) -> tuple[str, ...]:
        if value in owner:
            return (owner[value],)
        if value not in known:
            producer = value.producer()
            inputs = [] if producer is None else [v for v in producer.inputs if v is not None]
            known[value] = tuple(dict.fromkeys(name for v in inputs for name in sources(v)))
        return known[value]

    result = {}
    for layer in layers:
        read = [v for node in layer.nodes[:1] for v in node.inputs if v is not None]
        result[layer.name] = tuple(dict.fromkeys(name for v in read for name in sources(v)))
    return result


def dequantized_constant(node: ir.Node) -> NDArray[np.float32] | None:
    """Return what DequantizeLinear `node` computes from constants: per tensor, per axis or per block; else None."""
    arrays = [constant_array(v) for v in node.inputs]
    if node.op_type != DEQUANTIZE or any(a is None for a in arrays):
        return None
    stored, scale, *rest = [np.asarray(a) for a in arrays]
    zero = rest[0] if rest else np.zeros_like(scale)
    axis = int_attribute(node, "axis", 1)
    block = int_attribute(node, "block_size", 0)
    if block:
        scale, zero = (np.repeat(a, block, axis=axis).take(range(stored.shape[axis]), axis) for a in (scale, zero))
    elif scale.ndim == 1 and stored.ndim > 1:
        shape = [1] * stored.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (stored.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)


def _layer(name: str, op_type: str, nodes: tuple[ir.Node, ...], result: ir.Value, pair: Pair | None) -> Layer:
    carrier = result
    if pair is not None and pair[1].outputs[0].is_graph_output():
        carrier = pair[1].outputs[0]
    return Layer(name=name, op_type=op_type, tensor=str(carrier.name), nodes=nodes, result=result, pair=pair)


def _fused_behind(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes behind `node` that belong to it."""
    value = node.outputs[0]
    while quantizing_pair(value) is None:
        reader = only_consumer(value)
        if reader is None or reader.op_type not in FUSED or reader.inputs[0] is not value:
            return
        yield reader
        value = reader.outputs[0]
