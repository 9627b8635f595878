"""Equalization sets: which activations must share their channel scales, and which layers stand between the sets.

A channel of an activation may be divided by s > 0 if every layer that makes it is divided by s and every layer that
reads it is multiplied by s. Tensors tied by a residual Add, a ReLU or a pooling share their scales and form a set. A
set that meets anything else (a graph input or output, a Sigmoid, a reshape) keeps scale 1: it is frozen.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, is_vector, node_name

HOMOGENEOUS = (
    *("Relu", "LeakyRelu", "Identity", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
)
POOLS = ("GlobalAveragePool", "GlobalMaxPool")
GATES = ("Sigmoid", "HardSigmoid", "Softmax")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLayer:
    """A layer with constant weights between two sets.

    `weight` is float64 (groups, outputs per group, inputs per group, taps); `into` and `out` stand for the sets.
    """

    node: ir.Node
    weight: NDArray[np.float64]
    into: ir.Value
    out: ir.Value

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return int(self.weight.shape[0] * self.weight.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sets:
    """All sets of a graph: `root` maps each tied tensor to the one that stands for its set; `frozen` holds such."""

    root: dict[ir.Value, ir.Value]
    frozen: frozenset[ir.Value]
    layers: tuple[SetLayer, ...]
    skipped: tuple[Skipped, ...]

    @property
    def free(self) -> tuple[ir.Value, ...]:
        """The sets that may be scaled: made by a layer, read by a layer, not frozen."""
        read = {la.into for la in self.layers}
        made = dict.fromkeys(la.out for la in self.layers)
        return tuple(r for r in made if r in read and r not in self.frozen)


@dataclass(slots=True)
class _Forest:
    """Tied tensors while they are being found."""

    parent: dict[ir.Value, ir.Value] = field(default_factory=dict)
    layers: list[ir.Node] = field(default_factory=list)

    def root(self, value: ir.Value) -> ir.Value:
        while (up := self.parent.setdefault(value, value)) is not value:
            value = up
        return value

    def tie(self, a: ir.Value | None, b: ir.Value) -> None:
        if a is not None:
            self.parent[self.root(a)] = self.root(b)


def equalization_sets(graph: ir.Graph) -> Sets:
    """Return the sets of `graph` (constants as initializers); `skipped` names the nodes that freeze sets, and why."""
    forest, skipped, stiff = _Forest(), [], [*graph.inputs, *graph.outputs]
    for node in graph:
        reason = _tie(node, forest)
        if reason is not None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
            stiff += [v for v in (*node.inputs, *node.outputs) if v is not None]
    layers = tuple(
        SetLayer(node=n, weight=_matrix(n), into=forest.root(n.inputs[0]), out=forest.root(n.outputs[0]))
        for n in forest.layers
        if n.inputs[0] is not None
    )
    frozen = {forest.root(v) for v in stiff}
    frozen |= _contradictions(layers)
    return Sets(
        root={v: forest.root(v) for v in list(forest.parent)},
        frozen=frozenset(frozen),
        layers=layers,
        skipped=tuple(skipped),
    )


def clip_bound(clip: ir.Node) -> float | None:
    """Return c of a Clip to [0, c], or None for any other Clip."""
    low, high = [*(constant_array(v) for v in clip.inputs[1:3]), None, None][:2]
    if low is None or high is None or float(low.reshape(-1)[0]) != 0 or not float(high.reshape(-1)[0]) > 0:
        return None
    return float(high.reshape(-1)[0])


def stored_weight(node: ir.Node, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the weights of `node` as its initializer holds them, from their form in `SetLayer`."""
    shape = _weight(node).shape
    if node.op_type == "Gemm" and not int_attribute(node, "transB", 0):
        return np.ascontiguousarray(matrix.reshape(shape[::-1]).T).astype(np.float32)
    return matrix.reshape(shape).astype(np.float32)


def _contradictions(layers: tuple[SetLayer, ...]) -> set[ir.Value]:
    """Return the sets whose layers do not agree on the number of channels: something broadcasts."""
    sizes: dict[ir.Value, set[int]] = {}
    for la in layers:
        sizes.setdefault(la.out, set()).add(la.outputs)
        sizes.setdefault(la.into, set()).add(la.weight.shape[0] * la.weight.shape[2])
    return {root for root, found in sizes.items() if len(found) > 1}


def _tie(node: ir.Node, forest: _Forest) -> str | None:
    """Note what `node` demands of the scales around it, or return why they must be 1."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return "it is not a standard operator of one input"
    data, result = node.inputs[0], node.outputs[0]
    match node.op_type:
        case "Conv" | "Gemm":
            forest.layers += [node] if (reason := layer_refusal(node)) is None else []
            return reason
        case "Add" | "Sub":
            return _tie_sum(node, forest)
        case "Mul":
            gates = [v for v in node.inputs if _is_gate(v)]
            if len(gates) != 1:
                return "it is not a product with one gate"
            forest.tie(next(v for v in node.inputs if v is not gates[0]), result)
        case "Clip" if clip_bound(node) is None:
            return "it does not cut to [0, constant]"
        case "Flatten" if int_attribute(node, "axis", 1) != 1 or not _is_pooled(data):
            return "it flattens more than one value per channel"
        case op if op in (*HOMOGENEOUS, "Clip", "Flatten"):
            forest.tie(data, result)
        case _:
            return "it is not homogeneous"
    return None


def _tie_sum(node: ir.Node, forest: _Forest) -> str | None:
    a, b = node.inputs[0], node.inputs[1]
    if constant_array(a) is not None or constant_array(b) is not None:
        return "it adds a constant"
    if a is None or b is None or (a.shape is not None and b.shape is not None and a.shape != b.shape):
        return "it broadcasts"
    forest.tie(a, node.outputs[0])
    forest.tie(b, node.outputs[0])
    return None


def _is_gate(value: ir.Value | None) -> bool:
    return value is not None and (node := value.producer()) is not None and node.op_type in GATES


def _is_pooled(value: ir.Value) -> bool:
    return (node := value.producer()) is not None and node.op_type in POOLS


def layer_refusal(node: ir.Node) -> str | None:
    """Return why the weights and bias of the Conv or Gemm `node` cannot be rewritten, or None."""
    weight = constant_array(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or constant_array(node.inputs[0]) is not None:
        return "its weights are not float32 constants"
    plain = float_attribute(node, "alpha", 1.0) == 1.0 and float_attribute(node, "beta", 1.0) == 1.0
    if node.op_type == "Gemm" and (int_attribute(node, "transA", 0) or not plain):
        return "Gemm with alpha, beta or transA"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias, matrix = constant_array(node.inputs[2]), _matrix(node)
        if bias is None or not is_vector(bias, matrix.shape[0] * matrix.shape[1]):
            return "its bias is not one constant per output channel"
    return None


def _weight(node: ir.Node) -> NDArray[np.floating]:
    weight = constant_array(node.inputs[1])
    assert weight is not None  # noqa: S101 - layer_refusal has looked
    return weight


def _matrix(node: ir.Node) -> NDArray[np.float64]:
    w = _weight(node).astype(np.float64)
    if node.op_type == "Gemm":
        w = w if int_attribute(node, "transB", 0) else w.T
        return w.reshape(1, *w.shape, 1)
    groups = int_attribute(node, "group", 1)
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
