"""Cross-layer equalization: the same function, with channels that are alike in magnitude.

One scale per tensor serves a layer badly when one of its channels is a hundred times another. A channel of an activation
may be divided by any s > 0 if every layer that makes it is divided by s and every layer that reads it is multiplied by
s. Tensors that must share their scales (the two sides of a residual Add, the two ends of a ReLU or a pooling) form a
set; the scales of a set are chosen to even out the weights of all layers around it.

A Clip (ReLU6) cuts at one bound for all channels, so it is not homogeneous. With `clips: keep`, channels that reach the
bound share one scale (the bound moves with it) and the others are scaled up to the bound at most: the function stays
what it was on the calibration data. With `clips: lift` the bound is dropped, and values that were cut are not any more.

Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.1, eq. 11; Meller et al. 2019 (arXiv 1902.01917).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.config import Config
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, remove_in_favour_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, is_vector, node_name
from qcore.numerics.balance import Cut, LayerTerm, TensorTerm, balance
from qcore.numerics.channels import ChannelStats

Vector = NDArray[np.float64]
HOMOGENEOUS = (
    "Relu",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Identity",
    "Dropout",
)
POOLS = ("GlobalAveragePool", "GlobalMaxPool")
GATES = ("Sigmoid", "HardSigmoid", "Softmax")
SWEEPS = 40
SETTLED = 1e-3
REACHED = 0.999  # of the bound: rounding in the runtime must not hide that a channel was cut


class EqualizeStep(Config):
    """Options of the recipe step `equalize`: what becomes of the bound of a Clip between equalized layers."""

    method: Literal["equalize"] = "equalize"
    clips: Literal["keep", "lift"] = "keep"


@dataclass(slots=True)
class _Layer:
    """A layer with constant weights as a matrix of magnitudes, and the sets on its two sides."""

    node: ir.Node
    weight: NDArray[np.float64]  # (groups, out per group, in per group, taps)
    out_set: int
    in_set: int


@dataclass(slots=True)
class _Sets:
    """Which tensors share their channel scales: a forest over tensors, and the sets that must keep scale 1."""

    parent: dict[ir.Value, ir.Value] = field(default_factory=dict)
    frozen: set[ir.Value] = field(default_factory=set)

    def root(self, value: ir.Value) -> ir.Value:
        """Return the tensor that stands for the set of `value`."""
        while (up := self.parent.setdefault(value, value)) is not value:
            value = up
        return value

    def tie(self, a: ir.Value, b: ir.Value) -> None:
        """Let `a` and `b` share their scales."""
        self.parent[self.root(a)] = self.root(b)


def equalize(
    model: ir.Model, step: EqualizeStep, channels: Mapping[str, ChannelStats], *, per_channel=False
) -> Rewrite:
    """Return `model` with the channel scales of its layers evened out; `changed` names the layers.

    Args:
        model: float model, batch norms folded.
        step: options.
        channels: per tensor the statistics of its channels (axis 1), at least of the outputs of Clip nodes.
    """
    out = editable_copy(model)
    sets, layers, skipped = _survey(out.graph)
    clips = [n for n in out.graph if n.op_type == "Clip" and n.domain == ""]
    cuts = _cuts(clips, sets, channels) if step.clips == "keep" else {}
    scales = _solve(layers, sets, cuts, channels, out.graph, per_channel)
    for clip in clips:
        root = sets.root(clip.outputs[0])
        _move_bound(clip, scales.get(root), cuts.get(root), lift=step.clips == "lift")
    for layer in layers:
        _scale_layer(out.graph, layer, scales)
    drop_unused_initializers(out.graph)
    touched = [la for la in layers if la.out_set in scales or la.in_set in scales]
    return Rewrite(model=out, changed=tuple(node_name(la.node) for la in touched), skipped=tuple(skipped))


def _survey(graph: ir.Graph) -> tuple[_Sets, list[_Layer], list[Skipped]]:
    """Return the sets of tensors, the layers between them, and the nodes that freeze the sets around them."""
    sets, layers, skipped = _Sets(), [], []
    for node in graph:
        reason = _tie(node, sets, layers)
        if reason is not None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
            sets.frozen.update(v for v in (*node.inputs, *node.outputs) if v is not None)
    sets.frozen.update((*graph.inputs, *graph.outputs))
    sets.frozen = {sets.root(v) for v in sets.frozen}
    for layer in layers:
        layer.in_set, layer.out_set = sets.root(layer.in_set), sets.root(layer.out_set)
    return sets, layers, skipped


def _tie(node: ir.Node, sets: _Sets, layers: list[_Layer]) -> str | None:
    """Note what `node` demands of the scales around it, or return why they must be 1."""
    if node.domain != "" or node.inputs[0] is None:
        return "its scales cannot be moved"
    data, result = node.inputs[0], node.outputs[0]
    match node.op_type:
        case "Conv" | "Gemm":
            layer, reason = _layer(node)
            if layer is not None:
                layers.append(layer)
            return reason
        case "Add" | "Sub":
            if any(constant_array(v) is not None for v in node.inputs):
                return "it adds a constant"
            if not _same_shape(node.inputs[0], node.inputs[1]):
                return "it broadcasts"
            for value in node.inputs:
                sets.tie(value, result)
        case "Mul":
            gates = [v for v in node.inputs if _is_gate(v)]
            if len(gates) != 1:
                return "neither factor is a gate"
            sets.tie(next(v for v in node.inputs if v is not gates[0]), result)
        case "Clip":
            if _clip_bound(node) is None:
                return "it does not cut to [0, constant]"
            sets.tie(data, result)
        case "Flatten":
            if int_attribute(node, "axis", 1) != 1 or data.producer() is None or data.producer().op_type not in POOLS:
                return "it flattens more than one value per channel"
            sets.tie(data, result)
        case op if op in HOMOGENEOUS:
            sets.tie(data, result)
        case _:
            return "it is not homogeneous"
    return None


def _same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    return a is not None and b is not None and (a.shape is None or b.shape is None or a.shape == b.shape)


def _is_gate(value: ir.Value | None) -> bool:
    return value is not None and (node := value.producer()) is not None and node.op_type in GATES


def _clip_bound(clip: ir.Node) -> float | None:
    """Return c of a Clip to [0, c], or None for any other Clip."""
    low, high = [*(constant_array(v) for v in clip.inputs[1:3]), None, None][:2]
    return float(high.reshape(-1)[0]) if low is not None and high is not None and low.reshape(-1)[0] == 0 else None


def _layer(node: ir.Node) -> tuple[_Layer | None, str | None]:
    weight = constant_array(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or constant_array(node.inputs[0]) is not None:
        return None, "its weights are not float32 constants"
    if node.op_type == "Gemm" and (int_attribute(node, "transA", 0) or float_attribute(node, "alpha", 1.0) != 1.0):
        return None, "Gemm with alpha or transA"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant_array(node.inputs[2])
        if bias is None or not is_vector(bias, _matrix(node, weight).shape[0] * _matrix(node, weight).shape[1]):
            return None, "its bias is not one constant per output channel"
        if float_attribute(node, "beta", 1.0) != 1.0:
            return None, "Gemm with beta"
    return _Layer(node=node, weight=_matrix(node, weight), out_set=node.outputs[0], in_set=node.inputs[0]), None


def _matrix(node: ir.Node, weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the weights as (groups, outputs per group, inputs per group, taps)."""
    w = weight.astype(np.float64)
    if node.op_type == "Gemm":
        w = w if int_attribute(node, "transB", 0) else w.T
        return w.reshape(1, *w.shape, 1)
    groups = int_attribute(node, "group", 1)
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)


def _stored(node: ir.Node, matrix: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return what `_matrix` was made from."""
    if node.op_type == "Gemm" and not int_attribute(node, "transB", 0):
        return np.ascontiguousarray(matrix.reshape(shape[::-1]).T).astype(np.float32)
    return matrix.reshape(shape).astype(np.float32)


def _cuts(clips: list[ir.Node], sets: _Sets, channels: Mapping[str, ChannelStats]) -> dict[ir.Value, Vector]:
    """Return for each set with a Clip what share of the bound each channel reaches."""
    cuts: dict[ir.Value, Vector] = {}
    for clip in clips:
        bound, root = _clip_bound(clip), sets.root(clip.outputs[0])
        if bound is None or root in sets.frozen:
            continue
        stats = channels.get(str(clip.outputs[0].name))
        if stats is None or root in cuts:
            sets.frozen.add(root)
        else:
            cuts[root] = np.clip(stats.high / bound, 0.0, 1.0)
    return cuts


def _solve(layers, sets, cuts, channels, graph, per_channel):
    made = {la.out_set for la in layers}
    read = {la.in_set for la in layers}
    free = [r for r in dict.fromkeys(la.out_set for la in layers) if r in read and r not in sets.frozen]
    index = {r: k for k, r in enumerate(free)}
    sizes = [0] * len(free)
    for la in layers:
        if la.out_set in index:
            sizes[index[la.out_set]] = la.weight.shape[0] * la.weight.shape[1]
    importance = _importance(graph, layers, sets, channels)
    terms = []
    for la in layers:
        g, o, i, taps = la.weight.shape
        st = channels.get(str(la.node.inputs[0].name))
        power = (
            (st.mean**2 + st.variance).reshape(g, i) if st is not None and st.mean.size == g * i else np.ones((g, i))
        )
        imp = importance[id(la)].reshape(g, o)
        terms.append(
            LayerTerm(
                peak=np.abs(la.weight).max(axis=3),
                power=power * taps,
                importance=imp,
                into=index.get(la.in_set),
                out=index.get(la.out_set),
                per_channel=per_channel,
            )
        )
    tensors = []
    seen = set()
    for value in sets.parent:
        st = channels.get(str(value.name))
        r = sets.root(value)
        if st is None or r not in index or st.mean.size != sizes[index[r]] or id(value) in seen:
            continue
        tensors.append(
            TensorTerm(peak=np.maximum(np.abs(st.low), np.abs(st.high)), importance=importance[r], scales=index[r])
        )
    got = balance(sizes, terms, tensors, [Cut(scales=index[r], reached=c) for r, c in cuts.items() if r in index])
    return dict(zip(free, got))


def _importance(graph, layers, sets, channels):
    """What a unit of noise power in each channel costs: travelled back from the outputs, with the mean over channels kept at 1."""
    by_node = {la.node: la for la in layers}
    cost: dict[object, Vector] = {}

    def of(root, size):
        g = cost.get(root)
        if g is None or g.size != size:
            return np.ones(size)
        return g / max(g.mean(), 1e-30)

    for node in reversed(list(graph)):
        la = by_node.get(node)
        if la is None:
            continue
        g, o, i, taps = la.weight.shape
        out = of(la.out_set, g * o)
        st = channels.get(str(_after(node).name))
        cost[id(la)] = out
        back = np.einsum("goit,go->gi", la.weight**2, out.reshape(g, o)).reshape(-1)
        back = back / max(back.mean(), 1e-30)
        cost[la.in_set] = cost[la.in_set] + back if la.in_set in cost and cost[la.in_set].size == back.size else back
    for r in {la.out_set for la in layers}:
        la = next(x for x in layers if x.out_set == r)
        cost[r] = of(r, la.weight.shape[0] * la.weight.shape[1])
    return cost


def _after(node):
    return node.outputs[0]


def _move_bound(clip: ir.Node, scales: Vector | None, reached: Vector | None, *, lift: bool) -> None:
    """Let `clip` cut where its scaled channels are to be cut, or nowhere."""
    bound, graph = _clip_bound(clip), clip.graph
    if scales is None or bound is None or not isinstance(graph, ir.Graph):
        return
    if lift or reached is None:
        relu = ir.node("Relu", [clip.inputs[0]], name=clip.name)
        relu.outputs[0].type, relu.outputs[0].shape = clip.outputs[0].type, clip.outputs[0].shape
        graph.insert_before(clip, relu)
        remove_in_favour_of(clip, relu.outputs[0])
    else:
        moved = np.float32((reached * bound / scales).max())
        clip.replace_input_with(2, add_initializer(graph, f"{node_name(clip)}.bound", np.array(moved)))


def _scale_layer(graph: ir.Graph, layer: _Layer, scales: Mapping[ir.Value, Vector]) -> None:
    """Divide the outputs of `layer` by the scales of its output set and multiply its inputs by those of its input."""
    node, matrix = layer.node, layer.weight
    groups, outputs, inputs, _ = matrix.shape
    out = scales.get(layer.out_set, np.ones(groups * outputs))
    into = scales.get(layer.in_set, np.ones(groups * inputs))
    if (out == 1).all() and (into == 1).all():
        return
    old, name = constant_array(node.inputs[1]), node_name(node)
    assert old is not None  # noqa: S101 - _layer has looked
    scaled = matrix / out.reshape(groups, outputs, 1, 1) * into.reshape(groups, 1, inputs, 1)
    node.replace_input_with(1, add_initializer(graph, f"{name}.weight_equalized", _stored(node, scaled, old.shape)))
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        moved = (bias.astype(np.float64).reshape(-1) / out).astype(np.float32)
        node.replace_input_with(2, add_initializer(graph, f"{name}.bias_equalized", moved))
