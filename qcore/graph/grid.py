"""Quantized layers in a QDQ graph: where their integers, scales and biases are, and how to replace them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.added_bias import AddedBias, added_bias, own_constant, replace_added_bias
from qcore.graph.edit import add_initializer
from qcore.graph.qdq import dequantized_initializer, is_dequantize
from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, node_name
from qcore.numerics.affine import QParams
from qcore.numerics.refine import GridLayer

Array = NDArray[np.float64]
LAYERS = ("Conv", "Gemm", "MatMul")
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridNode:
    """A quantized layer: its node, the initializer of its integers, and its bias where it has one.

    The bias is `bias`, an initializer with `bias_scale` (None: it is float), or what the Add behind a MatMul adds,
    `added`. `unbiased` says why there is neither. `wanted` is the float tensor that the layer with its bias makes.
    """

    node: ir.Node
    weight: ir.Value
    scale: NDArray[np.float32]
    zero: int
    bias: ir.Value | None
    bias_scale: NDArray[np.float32] | None
    added: AddedBias | None
    unbiased: str
    wanted: ir.Value

    @property
    def has_bias(self) -> bool:
        """Whether the means of the outputs can be corrected."""
        return self.bias is not None or self.added is not None

    @property
    def groups(self) -> int:
        """The groups of a convolution, else 1."""
        return int_attribute(self.node, "group", 1) if self.node.op_type == "Conv" else 1

    @property
    def by_input(self) -> bool:
        """Whether the stored matrix has inputs first."""
        return self.node.op_type == "MatMul" or (
            self.node.op_type == "Gemm" and not int_attribute(self.node, "transB", 0)
        )


def grid_nodes(
    graph: ir.Graph, floats: Mapping[str, ir.Node], *, float_biases: bool = False
) -> tuple[list[GridNode], list[Skipped]]:
    """Return the layers of a QDQ graph in graph order, and those that cannot be refined, with reasons.

    Convolutions and Gemms without a bias get one of zero (edited into `graph`).

    Args:
        graph: of `editable_copy`.
        floats: the float layers by node name.
        float_biases: whether the target keeps biases as float; else new ones are int32.
    """
    layers: list[GridNode] = []
    skipped: list[Skipped] = []
    for node in list(graph):
        name = node_name(node)
        if node.op_type not in LAYERS or name not in floats:
            continue
        reason = _refusal(node, floats[name])
        if reason is None:
            layers.append(_layer(graph, node, floats[name], float_biases))
        else:
            skipped.append(Skipped(node=name, op_type=node.op_type, reason=reason))
    return layers, skipped


def _refusal(node: ir.Node, reference: ir.Node) -> str | None:
    weight, wanted = _stored_behind(node, 1), constant_array(reference.inputs[1])
    if wanted is None:
        first = constant_array(reference.inputs[0])
        return "both its inputs are activations" if first is None else "its first input is the constant one"
    if weight is None or weight.shape is None or tuple(weight.shape) != wanted.shape:
        return "its weights are not integers"
    if node.op_type == "Conv" and wanted.ndim not in (3, 4):
        return "it is not a convolution in one or two dimensions"
    if node.op_type == "MatMul" and wanted.ndim != 2:
        return "it multiplies a stack of matrices"
    if node.op_type == "Gemm" and (float_attribute(node, "alpha", 1.0) != 1.0 or int_attribute(node, "transA", 0)):
        return "Gemm with alpha or transA"
    return None


def _stored_behind(node: ir.Node, index: int) -> ir.Value | None:
    """Return the initializer that input `index` of `node` is dequantized from, or None."""
    value = node.inputs[index] if len(node.inputs) > index else None
    source = value.producer() if value is not None else None
    if source is None or not is_dequantize(source) or constant_array(source.inputs[0]) is None:
        return None
    return source.inputs[0]


def _layer(graph: ir.Graph, node: ir.Node, reference: ir.Node, float_biases: bool) -> GridNode:
    weight = _stored_behind(node, 1)
    assert weight is not None and node.inputs[1] is not None  # noqa: S101, PT018 - _refusal has looked
    dequantize = node.inputs[1].producer()
    assert dequantize is not None  # noqa: S101
    scale = np.asarray(constant_array(dequantize.inputs[1]), np.float32)
    zero = constant_array(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    bias, bias_scale = _bias(graph, node, scale, float_biases)
    added, unbiased = _added(node, reference) if node.op_type == "MatMul" else (None, "it has no constant bias")
    if added is not None:
        own_constant(graph, added.node, added.index)
    return GridNode(
        node=node,
        weight=weight,
        scale=scale,
        zero=0 if zero is None else int(zero.reshape(-1)[0]),
        bias=bias,
        bias_scale=bias_scale,
        added=added,
        unbiased=unbiased,
        wanted=reference.outputs[0] if added is None else _float_added(reference).node.outputs[0],
    )


def _added(node: ir.Node, reference: ir.Node) -> tuple[AddedBias | None, str]:
    """Return the bias behind a MatMul, if both graphs have it in the same Add, or why it has none."""
    weight = constant_array(reference.inputs[1])
    assert weight is not None  # noqa: S101 - _refusal has looked
    here, there = (added_bias(n, weight.shape[1]) for n in (node, reference))
    if isinstance(here, str) or isinstance(there, str):
        return None, there if isinstance(there, str) else str(here)
    return (here, "") if node_name(here.node) == node_name(there.node) else (None, "the float model adds it elsewhere")


def _float_added(reference: ir.Node) -> AddedBias:
    weight = constant_array(reference.inputs[1])
    assert weight is not None  # noqa: S101 - _refusal has looked
    found = added_bias(reference, weight.shape[1])
    assert not isinstance(found, str)  # noqa: S101 - _added has looked
    return found


def float_bias(layer: GridNode, reference: ir.Node, shape: tuple[int, ...]) -> Array:
    """Return the bias that the float layer `reference` adds, of `shape` (groups, outputs); zeros where it adds none."""
    if layer.added is not None:
        return _float_added(reference).array.astype(np.float64).reshape(shape)
    bias = constant_array(reference.inputs[2]) if len(reference.inputs) > 2 else None
    return np.zeros(shape) if bias is None else bias.astype(np.float64).reshape(shape)


def _bias(
    graph: ir.Graph, node: ir.Node, scale: NDArray[np.float32], float_biases: bool
) -> tuple[ir.Value | None, NDArray[np.float32] | None]:
    """Return the initializer of the bias and its scale (None: it is float); a layer without one gets a bias of 0."""
    stored = _stored_behind(node, 2)
    if stored is not None and node.inputs[2] is not None and (source := node.inputs[2].producer()) is not None:
        return stored, np.asarray(constant_array(source.inputs[1]), np.float32)
    if node.op_type == "MatMul":
        return None, None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        own_constant(graph, node, 2)
        return (node.inputs[2], None) if constant_array(node.inputs[2]) is not None else (None, None)
    data = node.inputs[0].producer() if node.inputs[0] is not None else None
    if data is None or not is_dequantize(data):
        return None, None
    weight = constant_array(_stored_behind(node, 1))
    assert weight is not None  # noqa: S101 - _refusal has looked
    outputs = weight.shape[1] if node.op_type == "Gemm" and not int_attribute(node, "transB", 0) else weight.shape[0]
    if float_biases:
        node.resize_inputs(3)
        node.replace_input_with(2, add_initializer(graph, f"{node_name(node)}.bias", np.zeros(outputs, np.float32)))
        return node.inputs[2], None
    product = (scale * np.asarray(constant_array(data.inputs[1]), np.float32)).astype(np.float32)
    q = QParams(
        scale=product,
        zero_point=np.zeros((), np.int32),
        dtype="int32",
        qmin=_INT32.min,
        qmax=_INT32.max,
        axis=0 if product.ndim else None,
    )
    node.resize_inputs(3)
    node.replace_input_with(
        2, dequantized_initializer(graph, f"{node_name(node)}.bias", np.zeros(outputs, np.int32), q)
    )
    return _stored_behind(node, 2), product


def matrix_of(layer: GridNode, stored: NDArray[np.generic] | None) -> Array:
    """Return an array of the shape of the weights of `layer` as float64 (groups, outputs, inputs)."""
    assert stored is not None  # noqa: S101 - _refusal has looked
    w = stored.astype(np.float64)
    w = w.T if layer.by_input else w
    return np.ascontiguousarray(w).reshape(layer.groups, w.shape[0] // layer.groups, -1)


def replace_layer(layer: GridNode, refined: GridLayer, bias: Array) -> dict[str, NDArray[np.generic]]:
    """Give `layer` the integers and scales of `refined` and a bias (groups, outputs); return what changed by name."""
    old = constant_array(layer.weight)
    assert old is not None  # noqa: S101 - an initializer
    integers = refined.integers
    w = integers.reshape(old.shape[::-1]).T if layer.by_input else integers.reshape(old.shape)
    arrays = {layer.weight: np.ascontiguousarray(w + layer.zero).astype(old.dtype)}
    moved = np.asarray(refined.scale.reshape(-1)[: layer.scale.size].reshape(layer.scale.shape), np.float32)
    source = layer.node.inputs[1].producer() if layer.node.inputs[1] is not None else None
    if source is not None and source.inputs[1] is not None and (moved != layer.scale).any():
        arrays[source.inputs[1]] = moved
    if layer.added is not None:
        arrays |= replace_added_bias(layer.added, bias.reshape(-1))
    elif layer.bias is not None and (stored := constant_array(layer.bias)) is not None:
        flat = bias.reshape(-1)
        if layer.bias_scale is not None:
            bias_scale = (layer.bias_scale * (moved / layer.scale)).astype(np.float32)
            flat = np.clip(np.rint(flat / bias_scale.astype(np.float64)), _INT32.min, _INT32.max)
            maker = layer.node.inputs[2].producer() if layer.node.inputs[2] is not None else None
            if maker is not None and maker.inputs[1] is not None and (moved != layer.scale).any():
                arrays[maker.inputs[1]] = bias_scale
        arrays[layer.bias] = flat.reshape(stored.shape).astype(stored.dtype)
    arrays = {v: a for v, a in arrays.items() if not np.array_equal(a, np.asarray(constant_array(v)))}
    for value, array in arrays.items():
        value.const_value = ir.tensor(array, name=value.name)
    return {str(value.name): array for value, array in arrays.items()}


def scale_of(layer: GridNode, shape: tuple[int, ...]) -> Array:
    """Return the scale of every output channel, (groups, outputs): the first two of `shape`."""
    return np.resize(layer.scale.astype(np.float64), shape[:2])  # a single one is repeated
