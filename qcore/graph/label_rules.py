"""What every operator does to the channels that run through it (see `labels.py`).

A rule reads the labels of a node's inputs, gives labels to its outputs, and ties or fixes what the operator demands.
It returns why it cannot follow the node, in which case every channel that touches the node stays.

Source: Li et al. 2017 (arXiv 1608.08710) prunes what an Add ties; Fang et al. 2023, "DepGraph" (arXiv 2301.12900).
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcore.graph.label_moves import MOVES, Rule, axes_of
from qcore.graph.labels import Count, Ints, Labels, Layer, because_of, is_constant, known_dims
from qcore.graph.rewrite import Skipped
from qcore.graph.shapes import dims_of
from qcore.graph.traverse import constant_array, int_attribute

UNARY = (
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Clip", "HardSigmoid", "HardSwish", "Mish"),
    *("Sigmoid", "Tanh", "Softplus", "Softsign", "Gelu", "Erf", "Swish", "Identity", "Dropout", "Cast"),
    *("Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Not", "IsNaN", "IsInf"),
    *("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh"),
)
BROADCAST = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu", "Where", "Mod"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
)
MANY = (*BROADCAST, "Concat")
"""Operators that are followed through all their activations; elsewhere only the first one may lose channels."""
POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
REDUCTIONS = (
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
)
ALONG_AXIS = ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum")


def follow(node: ir.Node, labels: Labels) -> None:
    """Let `labels` follow what `node` does; where that is not known, all its channels stay."""
    labels.used.clear()
    reason = _reason_to_stop(node) or RULES.get(node.op_type, _unknown)(node, labels)
    because = because_of(node, reason or "it reads these numbers as they are")
    many = node.domain == "" and node.op_type in MANY
    for index, value in enumerate(node.inputs):
        if reason is not None or (index and not many and not is_constant(value)):
            labels.fix_value(value, because)
        elif value is not None and value.is_initializer():
            for axis in range(len(dims_of(value) or ())):
                if (value, axis) not in labels.used:
                    labels.fix(labels.of_constant(value, axis), because)
    for output in node.outputs:
        for axis, found in labels.all_of(output).items():
            if known_dims(output)[axis] != found.size:  # shape inference says otherwise, or nothing
                labels.fix(labels.axes.pop((output, axis)), because_of(node, "its shape is not known"))


def _reason_to_stop(node: ir.Node) -> str | None:
    if node.domain != "":
        return f"{node.op_type} of {node.domain} is not followed"
    if node.op_type != "Split" and any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return "more than its first output is used"
    made = node.outputs if node.op_type == "Split" else node.outputs[:1]
    if any(dims_of(v) is None for v in (*node.inputs, *made) if v is not None):
        return "the shape of what it reads or makes is not known"
    return None


def _unknown(node: ir.Node, labels: Labels) -> str | None:
    return f"channels are not followed through {node.op_type}"


def _unary(node: ir.Node, labels: Labels) -> str | None:
    if is_constant(node.inputs[0]):
        return "it reads a constant"
    drops = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    if drops is not None and ((random := constant_array(drops)) is None or random.any()):
        return "it is in training mode"
    labels.give(node.outputs[0], labels.all_of(node.inputs[0]))
    return None


def _broadcast(node: ir.Node, labels: Labels) -> str | None:
    inputs = [v for v in node.inputs if v is not None]
    result = known_dims(node.outputs[0])
    because = because_of(node, "it combines them with something that keeps its size")
    for axis in range(len(result)):
        here = [(v, axis - len(result) + len(known_dims(v))) for v in inputs]
        here = [(v, a) for v, a in here if a >= 0]
        wide = [(v, a) for v, a in here if known_dims(v)[a] == result[axis]]
        for v, a in here:
            if (v, a) not in wide and not is_constant(v):
                labels.fix(labels.of(v, a), because_of(node, "it repeats them"))
        activations = [labels.of(v, a) for v, a in wide if not is_constant(v)]
        known = [found for found in activations if found is not None]
        shared = known[0] if known and len(known) == len(activations) else None
        for found in known:
            labels.tie(found, shared, because)
        for v, a in wide:
            if is_constant(v):
                labels.bind(v, a, shared, because)
        labels.give(node.outputs[0], {axis: shared})
    return None


def _conv(node: ir.Node, labels: Labels) -> str | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not is_constant(weight) or is_constant(x):
        return "its weights are computed"
    shape, channels = known_dims(weight), known_dims(x)[1]
    groups, into = int_attribute(node, "group", 1), labels.of(x, 1)
    because = because_of(node, "its inputs cannot lose channels")
    if groups == 1:
        labels.bind(weight, 1, into, because)
        out: Ints | None = labels.of_constant(weight, 0)
    elif into is None:
        out = None
        labels.bind(weight, 0, None, because)
    else:
        out = _grouped(node, labels, into, groups)
    if out is not None and groups == 1:
        labels.layers.append(Layer(node=node, out=out, into=into))
    _bias(node, labels, out, because)
    _fix_spatial(node, labels, x)
    labels.give(node.outputs[0], {0: labels.of(x, 0), 1: out})
    assert channels is None or shape[1] is None or channels == shape[1] * groups  # noqa: S101 - the file was checked
    return None


def _grouped(node: ir.Node, labels: Labels, into: Ints, groups: int) -> Ints:
    """Return the output labels of a convolution with groups, each of which goes or stays with all its channels."""
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None and weight is not None  # noqa: S101, PT018 - _conv has looked
    because, filters = because_of(node, "its groups must stay alike"), int(known_dims(weight)[0] or 0)
    first = into.reshape(groups, -1)[:, :1]
    labels.tie(into, np.repeat(first.reshape(-1), into.size // groups), because)
    out = np.repeat(first.reshape(-1), filters // groups)
    labels.bind(weight, 0, out, because)
    labels.counts.append(
        Count(node=str(node.outputs[0].name), tensor=str(x.name), axis=1, size=into.size, divisor=into.size // groups)
    )
    return out


def _bias(node: ir.Node, labels: Labels, out: Ints | None, because: Skipped) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    if is_constant(bias) and (dims := known_dims(bias)) and (out is None or dims[-1] == out.size):
        labels.bind(bias, len(dims) - 1, out, because)
    elif not is_constant(bias) or known_dims(bias)[-1:] not in ((), (1,)):
        labels.fix(out, because_of(node, "its bias is computed"))


def _fix_spatial(node: ir.Node, labels: Labels, x: ir.Value) -> None:
    for axis, found in labels.all_of(x).items():
        if axis >= 2:
            labels.fix(found, because_of(node, "it looks at neighbours along them"))


def _conv_transpose(node: ir.Node, labels: Labels) -> str | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not is_constant(weight) or is_constant(x):
        return "its weights are computed"
    groups, into = int_attribute(node, "group", 1), labels.of(x, 1)
    because = because_of(node, "its inputs cannot lose channels")
    if groups == 1:
        labels.bind(weight, 0, into, because)
        out: Ints | None = labels.of_constant(weight, 1)
    elif groups == known_dims(weight)[0] and known_dims(weight)[1] == 1:
        labels.bind(weight, 0, into, because)
        out = into
        labels.counts.append(
            Count(node=str(node.outputs[0].name), tensor=str(x.name), axis=1, size=int(known_dims(x)[1] or 0))
        )
    else:
        return "it is a transposed convolution with groups"
    if out is not None and groups == 1:
        labels.layers.append(Layer(node=node, out=out, into=into))
    _bias(node, labels, out, because)
    _fix_spatial(node, labels, x)
    labels.give(node.outputs[0], {0: labels.of(x, 0), 1: out})
    return None


def _linear(node: ir.Node, labels: Labels) -> str | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not is_constant(weight) or is_constant(x) or len(known_dims(weight)) != 2:
        return "it does not multiply an activation by one constant matrix"
    rank = len(known_dims(x))
    if rank < 2 or int_attribute(node, "transA", 0):
        return "it reads its input transposed" if rank > 1 else "it multiplies a vector"
    flipped = bool(int_attribute(node, "transB", 0))
    because = because_of(node, "its inputs cannot lose channels")
    into = labels.of(x, rank - 1)
    labels.bind(weight, 1 if flipped else 0, into, because)
    out = labels.of_constant(weight, 0 if flipped else 1)
    labels.layers.append(Layer(node=node, out=out, into=into))
    _bias(node, labels, out, because)
    rows = {a: found for a, found in labels.all_of(x).items() if a < rank - 1}
    for found in rows.values() if node.op_type == "Gemm" else ():
        labels.fix(found, because_of(node, "they are rows of a Gemm"))
    labels.give(node.outputs[0], {**rows, rank - 1: out})
    return None


def _per_channel(node: ir.Node, labels: Labels) -> str | None:
    """Follow BatchNormalization and InstanceNormalization: constants with one value per channel."""
    x, constants = node.inputs[0], node.inputs[1:]
    if int_attribute(node, "training_mode", 0):
        return "it is in training mode"
    if x is None or is_constant(x) or not all(is_constant(v) for v in constants):
        return "its statistics are computed"
    into, because = labels.of(x, 1), because_of(node, "its input cannot lose channels")
    for value in constants:
        if value is not None:
            labels.bind(value, 0, into, because)
    if node.op_type == "InstanceNormalization":
        _fix_spatial(node, labels, x)
    labels.give(node.outputs[0], labels.all_of(x))
    return None


def _pool(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    if x is None or is_constant(x):
        return "it reads a constant"
    _fix_spatial(node, labels, x)
    labels.give(node.outputs[0], {a: found for a, found in labels.all_of(x).items() if a < 2})
    return None


def _reduce(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    rank = len(known_dims(x))
    axes = axes_of(node, rank)
    if axes is None or is_constant(x):
        return "its axes are computed"
    axes = axes or (() if int_attribute(node, "noop_with_empty_axes", 0) else tuple(range(rank)))
    found = labels.all_of(x)
    for axis in axes:
        labels.fix(found.pop(axis, None), because_of(node, "it reduces over them"))
    if not int_attribute(node, "keepdims", 1):
        found = {a - sum(b < a for b in axes): f for a, f in found.items()}
    labels.give(node.outputs[0], found)
    return None


def _along_axis(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    second = constant_array(node.inputs[1]) if node.op_type == "CumSum" else np.array(int_attribute(node, "axis", -1))
    if is_constant(x) or second is None:
        return "it reads a constant, or its axis is computed"
    axis, found = int(second.reshape(-1)[0]) % len(known_dims(x)), labels.all_of(x)
    labels.fix(found.get(axis), because_of(node, "it works across them"))
    labels.give(node.outputs[0], found)
    return None


def _layer_norm(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    if is_constant(x):
        return "it reads a constant"
    first, found = int_attribute(node, "axis", -1) % len(known_dims(x)), labels.all_of(x)
    for axis, own in found.items():
        if axis >= first:
            labels.fix(own, because_of(node, "it works across them"))
    labels.give(node.outputs[0], {a: f for a, f in found.items() if a < first})
    return None


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ALONG_AXIS, _along_axis),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _per_channel),
    **dict.fromkeys(("Gemm", "MatMul"), _linear),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "LayerNormalization": _layer_norm,
    **MOVES,
}
