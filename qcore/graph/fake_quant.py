"""A QDQ graph as a float graph with quantizers beside it: what can be trained, and the way back to integers.

`Q -> DQ` becomes an Identity, and integer weights and biases become float ones, so that every number has one float
tensor that may move. What rounds those tensors is a list of quantizers by value name; whoever runs the graph applies
them. Behind training `with_trained` puts integers and scales back into the very initializers of the QDQ graph.

Source: Jacob et al. 2018 (arXiv 1712.05877) section 3; Esser et al. 2020 (arXiv 1902.08153) for scales that move.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, remove_in_favour_of
from qcore.graph.grid import LAYERS
from qcore.graph.qdq import is_dequantize, is_quantize
from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.numerics.affine import Levels, QParams, QScheme, quantize_array

_INT32 = np.iinfo(np.int32)
_INSIDE = 0.499  # of a level: how far from its middle a weight may start; float32 must not round it outside


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """What rounds one tensor: `value` is its name in the float graph, `scale` the name that its scale has there.

    Quantizers of tensors that share a scale (in and out of a MaxPool, all of a Concat) have the same `scale`.
    """

    value: str
    scale: str
    q: QParams


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBias:
    """A bias that is stored as integers of scale `input_scale * weight scale`."""

    value: str
    stored: str
    stored_scale: str
    input_scale: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedLayer:
    """A layer: the quantizer of its weights, where their integers are stored, and its bias if that is integers too."""

    node: str
    weight: Quantizer
    stored: str
    bias: TrainedBias | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeQuantized:
    """`model` is float; `activations` and the `weight` of each layer say what is rounded in it.

    `scales` holds the scales at the start by name; `copies` the initializers of the QDQ graph that hold each. Those of
    integer graph inputs and outputs are `fixed`: the caller knows them. The float graph takes and gives real numbers.
    """

    model: ir.Model
    activations: tuple[Quantizer, ...]
    layers: tuple[TrainedLayer, ...]
    scales: Mapping[str, NDArray[np.float32]]
    copies: Mapping[str, tuple[str, ...]]
    fixed: frozenset[str]
    skipped: tuple[Skipped, ...]

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """All of them."""
        return (*self.activations, *(layer.weight for layer in self.layers))


Scheme = Callable[[ir.Node], QScheme]
"""From a layer to how its weights are quantized."""


def fake_quantized(
    quantized: ir.Model, floats: Mapping[str, NDArray[np.floating]], scheme: Scheme, tied: Collection[str]
) -> FakeQuantized:
    """Return the float graph of `quantized`, which computes the same numbers once its quantizers are applied.

    Args:
        quantized: QDQ model; not changed.
        floats: the weights of layers by node name, as they were before quantization. A layer's weights start there,
            but inside the level that `quantized` gave them.
        scheme: what `quantized` was made with.
        tied: operators whose inputs and outputs share one scale.
    """
    out = editable_copy(quantized)
    draft = _Draft(scales=_Scales())
    _release_pairs(out.graph, draft)
    _tie(out.graph, draft, tied)
    for node in [n for n in out.graph if n.op_type in LAYERS]:
        reason = _release_layer(out.graph, node, floats.get(node_name(node)), draft, scheme)
        if reason is not None:
            draft.skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
    drop_unused_initializers(out.graph)
    scales = draft.scales
    layers = tuple(_named(layer, scales) for layer in draft.layers)
    return FakeQuantized(
        model=out,
        activations=tuple(replace(a, scale=scales.first(a.scale)) for a in draft.activations),
        layers=layers,
        scales={name: array for name, array in scales.arrays.items() if scales.first(name) == name},
        copies=scales.copies(),
        fixed=frozenset(map(scales.first, draft.fixed)),
        skipped=tuple(draft.skipped),
    )


def with_trained(quantized: ir.Model, fake: FakeQuantized, trained: Mapping[str, NDArray[np.floating]]) -> ir.Model:
    """Return `quantized` with the integers and scales that follow from trained numbers; no other byte changes.

    Args:
        quantized: what `fake` was made from; not changed.
        fake: of `fake_quantized`.
        trained: new values by name: those of the float graph's initializers and of `fake.scales`. Others stay.
    """
    out = quantized.clone()
    scales = {name: np.asarray(trained.get(name, start), np.float32) for name, start in fake.scales.items()}
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, copies in fake.copies.items():
        arrays.update({copy: scales[name] for copy in copies if name in trained})
    for layer in fake.layers:
        q = replace(layer.weight.q, scale=scales[layer.weight.scale])
        if layer.weight.value in trained or layer.weight.scale in trained:
            start = _initial(fake.model.graph, layer.weight.value)
            arrays[layer.stored] = quantize_array(trained.get(layer.weight.value, start), q)
        if layer.bias is not None:
            start = _initial(fake.model.graph, layer.bias.value)
            bias, scale = trained.get(layer.bias.value, start), q.scale * scales[layer.bias.input_scale]
            integers = np.rint(np.asarray(bias, np.float64) / np.asarray(scale, np.float64))
            arrays[layer.bias.stored] = np.clip(integers, _INT32.min, _INT32.max).astype(np.int32)
            arrays[layer.bias.stored_scale] = np.asarray(scale, np.float32)
    mapped = {a.value for a in fake.activations} | set(arrays) | set(fake.scales)
    layered = {x for la in fake.layers for x in (la.weight.value, la.bias.value if la.bias else None)}
    arrays.update({k: v for k, v in trained.items() if k not in mapped and k not in layered})
    for name, array in arrays.items():
        _put(out.graph, name, array)
    return out


@dataclass(slots=True)
class _Scales:
    """Scales while they are found to be one."""

    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    parent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, array: NDArray[np.float32]) -> None:
        self.arrays[name] = array

    def first(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def tie(self, a: str, b: str) -> None:
        a, b = self.first(a), self.first(b)
        if a != b and np.array_equal(self.arrays[a], self.arrays[b]):
            self.parent[max(a, b)] = min(a, b)

    def copies(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name in self.arrays:
            found.setdefault(self.first(name), []).append(name)
        return {name: tuple(names) for name, names in found.items()}


@dataclass(slots=True)
class _Draft:
    scales: _Scales
    activations: list[Quantizer] = field(default_factory=list)
    layers: list[TrainedLayer] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    of_value: dict[ir.Value, str] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)


def _release_pairs(graph: ir.Graph, draft: _Draft) -> None:
    """Put an Identity in place of every pair Q -> DQ, and of those that the graph's caller does the other half of."""
    for node in [n for n in graph if is_dequantize(n)]:
        source = node.inputs[0]
        quantize = source.producer() if source is not None else None
        if quantize is not None and is_quantize(quantize):
            _release(graph, node, quantize.inputs[0], draft)
            if not quantize.outputs[0].uses() and not quantize.outputs[0].is_graph_output():
                graph.remove(quantize, safe=True)
        elif source is not None and source.is_graph_input() and not source.is_initializer():
            source.type = ir.TensorType(ir.DataType.FLOAT)
            _release(graph, node, source, draft, fixed=True)
    for node in [n for n in graph if is_quantize(n) and n.outputs[0].is_graph_output()]:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        _release(graph, node, node.inputs[0], draft, fixed=True)


def _release(graph: ir.Graph, node: ir.Node, real: ir.Value | None, draft: _Draft, *, fixed: bool = False) -> None:
    """Let the readers of `node` read `real` through an Identity, and note the quantizer; not if it is per channel."""
    scale, zero = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    if real is None or scale is None or zero is None or scale.ndim or node.inputs[1] is None:
        return
    name = str(node.inputs[1].name)
    draft.scales.add(name, scale.astype(np.float32))
    draft.fixed |= {name} if fixed else set()
    identity = ir.node("Identity", [real], name=f"{node_name(node)}_identity")
    result = identity.outputs[0]
    graph.insert_before(node, identity)
    remove_in_favour_of(node, result)
    low, high = QScheme(dtype=_dtype(zero)).levels
    q = QParams(
        scale=scale.astype(np.float32), zero_point=zero.astype(np.int32), dtype=_dtype(zero), qmin=low, qmax=high
    )
    draft.activations.append(Quantizer(value=str(result.name), scale=name, q=q))
    draft.of_value[result] = name


def _dtype(zero: NDArray[np.generic]) -> Levels:
    return zero.dtype.name  # type: ignore[return-value]  # QuantizeLinear has no others


def _tie(graph: ir.Graph, draft: _Draft, tied: Collection[str]) -> None:
    """Let the quantizers around every node of an operator in `tied` share one scale."""
    for node in graph:
        if node.op_type not in tied:
            continue
        around = [draft.of_value[v] for v in node.inputs if v in draft.of_value]
        for output in node.outputs:
            around += [draft.of_value[u.node.outputs[0]] for u in output.uses() if u.node.outputs[0] in draft.of_value]
        for a in around[1:]:
            draft.scales.tie(around[0], a)


def _release_layer(
    graph: ir.Graph, node: ir.Node, wanted: NDArray[np.floating] | None, draft: _Draft, scheme: Scheme
) -> str | None:
    """Put float weights and a float bias in place of the integers of a layer, or return why they stay."""
    value = node.inputs[1]
    dequantize = value.producer() if value is not None else None
    if value is None or dequantize is None or not is_dequantize(dequantize):
        return "its weights are not integers"
    stored, scale_value = dequantize.inputs[0], dequantize.inputs[1]
    integers, scale = constant_array(stored), constant_array(scale_value)
    if stored is None or scale_value is None or integers is None or scale is None:
        return "its weights are not constants"
    if wanted is None or wanted.shape != integers.shape:
        return "the float model has no such layer"
    if scale.ndim and int_attribute(dequantize, "block_size", 0):
        return "its weights have a scale per block"
    zero = constant_array(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    levels = scheme(node).levels
    q = QParams(
        scale=scale.astype(np.float32),
        zero_point=np.zeros(scale.shape, np.int32) if zero is None else zero.astype(np.int32),
        dtype=scheme(node).dtype,
        qmin=min(levels[0], int(integers.min())),  # rounding to second order uses the level that symmetry leaves out
        qmax=max(levels[1], int(integers.max())),
        axis=int_attribute(dequantize, "axis", 1) if scale.ndim else None,
    )
    draft.scales.add(str(scale_value.name), q.scale)
    master = add_initializer(graph, f"{node_name(node)}.weight", _inside(wanted, integers, q))
    node.replace_input_with(1, master)
    weight = Quantizer(value=str(master.name), scale=str(scale_value.name), q=q)
    bias = _release_bias(graph, node, draft)
    draft.layers.append(TrainedLayer(node=node_name(node), weight=weight, stored=str(stored.name), bias=bias))
    if not dequantize.outputs[0].uses():
        graph.remove(dequantize, safe=True)
    return None


def _inside(wanted: NDArray[np.floating], integers: NDArray[np.generic], q: QParams) -> NDArray[np.float32]:
    """Return weights that round to `integers`: `wanted` where it does, else the middle of the level.

    Not its edge: what `round-weights` moved to another level would fall back with the first step of training.
    """
    shape = [1] * wanted.ndim
    if q.axis is not None:
        shape[q.axis] = -1
    scale = q.scale.astype(np.float64).reshape(shape if q.axis is not None else ())
    zero = q.zero_point.astype(np.float64).reshape(shape if q.axis is not None else ())
    middle = integers.astype(np.float64) - zero
    level = wanted.astype(np.float64) / scale
    within = np.abs(level - middle) <= _INSIDE
    beyond = ((integers.astype(np.int64) <= q.qmin) & (level < middle)) | (
        (integers.astype(np.int64) >= q.qmax) & (level > middle)
    )
    return np.asarray(np.where(within | beyond, level, middle) * scale, np.float32)


def _release_bias(graph: ir.Graph, node: ir.Node, draft: _Draft) -> TrainedBias | None:
    """Put a float bias in place of an int32 one; None where there is none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    dequantize = value.producer() if value is not None else None
    data = node.inputs[0]
    if value is None or dequantize is None or not is_dequantize(dequantize):
        return None
    input_scale = draft.of_value.get(data) if data is not None else None
    stored, scale_value = dequantize.inputs[0], dequantize.inputs[1]
    integers, scale = constant_array(stored), constant_array(scale_value)
    if stored is None or scale_value is None or integers is None or scale is None or input_scale is None:
        return None
    float_bias = np.asarray(integers.astype(np.float64) * scale.astype(np.float64), np.float32)
    master = add_initializer(graph, f"{node_name(node)}.bias", float_bias)
    node.replace_input_with(2, master)
    if not dequantize.outputs[0].uses():
        graph.remove(dequantize, safe=True)
    return TrainedBias(
        value=str(master.name),
        stored=str(stored.name),
        stored_scale=str(scale_value.name),
        input_scale=input_scale,
    )


def _named(layer: TrainedLayer, scales: _Scales) -> TrainedLayer:
    """Return `layer` with the names that tied scales have in the end."""
    bias = layer.bias and replace(layer.bias, input_scale=scales.first(layer.bias.input_scale))
    return replace(layer, weight=replace(layer.weight, scale=scales.first(layer.weight.scale)), bias=bias)


def _initial(graph: ir.Graph, name: str) -> NDArray[np.floating]:
    array = constant_array(graph.initializers[name])
    assert array is not None  # noqa: S101 - an initializer
    return array


def _put(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> None:
    """Give an initializer new values of its own dtype and shape."""
    value = graph.initializers[name]
    old = value.const_value
    assert old is not None  # noqa: S101 - an initializer
    was = old.numpy()
    value.const_value = ir.Tensor(np.asarray(array).astype(was.dtype).reshape(was.shape), name=name)
