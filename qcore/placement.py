"""Placement: which nodes of a model run on integers, which tensors between them are integers, and with what scales.

Decided from the graph, the target profile and the names in a calibration table; nothing here edits. The linter asks
the same questions of a finished file.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import (
    constant_array,
    float_attribute,
    int_attribute,
    ints_attribute,
    is_vector,
    node_name,
    only_consumer,
)
from qcore.target import TargetProfile

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization", "InstanceNormalization")
NORMALIZING = ("LayerNormalization", "InstanceNormalization")
ABSORBED = ("Relu", "Clip")
FLOAT_TAIL = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Softmax", "LogSoftmax")
READS_SHAPES = ("Shape", "Size")
# All other inputs of these are indices, shapes, scales or bounds.
_FIRST_INPUT = (
    *("Clip", "Resize", "Pad", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Reshape"),
    *("Squeeze", "Unsqueeze", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "Dropout", "TopK", "Upsample"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a recipe says about single nodes, by name: left float, or computed with 16-bit activations."""

    floating: Collection[str] = ()
    wide: Collection[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The result: planned nodes, integer tensors in graph order, and what was left out.

    `movers` are the nodes that hand the scale of their input on. `group` maps every tensor, and every constant that a
    mover or one-scale node reads, to the tensor that stands for all that share its scale.
    """

    nodes: tuple[ir.Node, ...]
    movers: tuple[ir.Node, ...]
    tensors: tuple[ir.Value, ...]
    group: Mapping[ir.Value, ir.Value]
    skipped: tuple[Skipped, ...]


@dataclass(slots=True)
class _Draft:
    """A placement while it grows."""

    target: TargetProfile
    choice: Choice
    measured: Collection[str]
    tail: set[ir.Value]
    nodes: list[ir.Node] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    wanted: set[ir.Value] = field(default_factory=set)


def place(graph: ir.Graph, target: TargetProfile, choice: Choice, measured: Collection[str]) -> Placement:
    """Return what of `graph` runs on integers on `target`.

    Args:
        graph: float model whose constants are initializers.
        target: the device.
        choice: nodes that the recipe treats apart.
        measured: names of the float tensors whose ranges are known.
    """
    draft = _Draft(target=target, choice=choice, measured=measured, tail=float_tail(graph, target))
    nodes = list(graph)
    for node in nodes:
        if node.op_type in READS_SHAPES or moves(node, target) or _is_absorbed(node, target):
            continue
        reason = _refusal(node, draft)
        if reason is None:
            draft.nodes.append(node)
            draft.wanted.update(_needed(node, draft.tail))
        else:
            draft.skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
    if target.integer_io:
        ends = [v for v in graph.inputs if not v.is_initializer()] + list(graph.outputs)
        draft.wanted.update(v for v in ends if v.name in measured)
    movers = _reach_through_movers(nodes, draft)
    order = [*graph.inputs, *(o for node in nodes for o in node.outputs)]
    tensors = tuple(v for v in order if v in draft.wanted)
    return Placement(
        nodes=tuple(draft.nodes),
        movers=movers,
        tensors=tensors,
        group=_groups(draft, movers, tensors),
        skipped=tuple(draft.skipped),
    )


def moves(node: ir.Node, target: TargetProfile) -> bool:
    """Say whether `node` only moves or selects values on `target`, so that its output has the scale of its input.

    Interpolating Resize and Pad with anything but zero do not.
    """
    if node.op_type not in target.same_scale or node.domain != "":
        return False
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
        fill = constant_array(node.inputs[2])
        return fill is not None and not fill.any()
    return True


def data_inputs(node: ir.Node) -> list[int]:
    """Return which inputs of `node` carry data that an integer kernel takes as quantized tensors, in order.

    Weights and biases of layers are not among them (`weight_index`).
    """
    if node.op_type in WEIGHTED:
        indices = [0] if weight_index(node) is not None else [0, 1]
    elif node.op_type in _FIRST_INPUT:
        indices = [0]
    else:
        indices = list(range(node.op_type == "Where", len(node.inputs)))
    return [i for i in indices if i < len(node.inputs) and node.inputs[i] is not None]


def data_outputs(node: ir.Node) -> list[ir.Value]:
    """Return the outputs of `node` that carry data."""
    return [o for o in node.outputs if o.name] if node.op_type == "Split" else list(node.outputs[:1])


def weight_index(node: ir.Node) -> int | None:
    """Return which input of `node` holds constant weights, or None: no layer, or a product of two activations."""
    if node.op_type not in WEIGHTED or len(node.inputs) < 2:
        return None
    if node.op_type in ("MatMul", "Gemm") and (
        constant_array(node.inputs[1]) is None or not is_activation(node.inputs[0])
    ):
        return None
    return 1


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return the third input of a layer, or None."""
    return node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None


def channel_axis(node: ir.Node, ndim: int) -> int | None:
    """Return the axis of output channels of the weights of `node`, or None where one scale is all that fits."""
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1 if int_attribute(node, "group", 1) == 1 else None
        case "Gemm":
            return 0 if int_attribute(node, "transB", 0) else 1
        case "MatMul":
            return 1 if ndim == 2 else None
        case _:
            return None


def is_activation(value: ir.Value | None) -> bool:
    """Say whether `value` is there and is not a constant."""
    return value is not None and constant_array(value) is None


def absorbing(value: ir.Value) -> ir.Node | None:
    """Return the Relu or Clip with constant bounds that alone reads `value` as its data, or None."""
    reader = only_consumer(value)
    producer = value.producer()
    if reader is None or reader.op_type not in ABSORBED or reader.inputs[0] is not value or reader.domain != "":
        return None
    if producer is None or reader.graph is not producer.graph:
        return None
    return reader if all(constant_array(v) is not None for v in reader.inputs[1:] if v is not None) else None


def carrier(value: ir.Value) -> ir.Value:
    """Return the tensor whose Q/DQ pair stands for `value`: behind an absorbed Relu or Clip, else itself."""
    reader = absorbing(value)
    return value if reader is None else reader.outputs[0]


def float_tail(graph: ir.Graph, target: TargetProfile) -> set[ir.Value]:
    """Return the float tensors from the last Gemm or MatMul to the graph's outputs, which kernels give for free."""
    tail: set[ir.Value] = set()
    if not target.float_output or target.integer_io:
        return tail
    for output in graph.outputs:
        chain: list[ir.Value] = []
        value: ir.Value | None = output
        while value is not None:
            if value.uses() if value is output else (only_consumer(value) is None):
                break
            chain.append(value)
            node = value.producer()
            if node is None or node.domain != "":
                break
            if node.op_type in ("Gemm", "MatMul"):
                tail.update(chain)
                break
            value = node.inputs[0] if node.op_type in FLOAT_TAIL and node.inputs else None
    return tail


def _needed(node: ir.Node, tail: Collection[ir.Value]) -> Iterator[ir.Value]:
    """Yield the activations that are integers where `node` runs on them."""
    for i in data_inputs(node):
        value = node.inputs[i]
        if value is not None and is_activation(value):
            yield value
    for output in data_outputs(node):
        if output not in tail:
            yield carrier(output)


def _is_absorbed(node: ir.Node, target: TargetProfile) -> bool:
    source = node.inputs[0] if node.inputs else None
    producer = source.producer() if source is not None else None
    if source is None or producer is None or moves(producer, target):
        return False  # behind a node that keeps scales there is none that could saturate in its place
    return absorbing(source) is node


def _refusal(node: ir.Node, draft: _Draft) -> str | None:
    """Return why `node` stays float, or None."""
    target, dtype = draft.target, node.outputs[0].dtype if node.outputs else None
    if dtype not in (None, ir.DataType.FLOAT):
        return f"it gives {dtype.name}, not float32"
    if node.op_type not in target.quantize or node.domain != "":
        return f"{target.name} has no integer kernel for {node.op_type}"
    if node_name(node) in draft.choice.floating:
        return "excluded by the recipe"
    if any(v in draft.tail for v in node.inputs):
        return "it works on the float output of the last layer"
    arrays = [constant_array(v) for v in node.inputs]
    if any(a is not None and not _is_finite(a) for a in arrays):
        return "a constant of it holds NaN or infinity"
    reason = _shape_refusal(node) or (_weight_refusal(node) if weight_index(node) is not None else None)
    if reason is not None:
        return reason
    missing = [v.name for v in _needed(node, draft.tail) if root(v, target).name not in draft.measured]
    return f"the calibration table has no float tensor {missing[0]}" if missing else None


def root(value: ir.Value, target: TargetProfile) -> ir.Value:
    """Return the tensor whose statistics hold for `value`: nodes that only move values are gone through."""
    node = value.producer()
    while node is not None and moves(node, target) and is_activation(node.inputs[0]):
        source = node.inputs[0]
        assert source is not None  # noqa: S101 - is_activation has looked
        value, node = source, source.producer()
    return value


def _shape_refusal(node: ir.Node) -> str | None:
    """Return why the form of `node` has no integer kernel, whatever its numbers."""
    if any(o.uses() or o.is_graph_output() for o in node.outputs if o not in data_outputs(node)):
        return "more than its first output is used"
    if not any(is_activation(node.inputs[i]) for i in data_inputs(node)):
        return "it reads only constants"
    constants = [a for i in data_inputs(node) if (a := constant_array(node.inputs[i])) is not None]
    if any(a.dtype != np.float32 or a.size == 0 for a in constants):
        return "a constant of it is not float32"
    if node.op_type == "Gemm" and weight_index(node) is None:
        plain = float_attribute(node, "alpha", 1.0) == 1.0 and int_attribute(node, "transA", 0) == 0
        return None if plain and bias_of(node) is None else "Gemm of two activations with alpha, transA or a bias"
    if node.op_type == "AveragePool" and any(d != 1 for d in ints_attribute(node, "dilations")):
        return "integer kernels of AveragePool have no dilations"
    if node.op_type == "Div":
        return _divisor_refusal(node)
    if node.op_type == "Pow" and is_activation(node.inputs[1]):
        return "its exponent is not a constant"
    if node.op_type in ("Clip", *_FIRST_INPUT) and any(
        is_activation(v) and _is_float(v) for v in node.inputs[1:] if v is not None
    ):
        return "its bounds or sizes are not constants"
    return None


def _divisor_refusal(node: ir.Node) -> str | None:
    """Return why the divisor cannot be kept in integers: rounding to zero must be impossible."""
    divisor = constant_array(node.inputs[1])
    if divisor is None:
        return "its divisor is not a constant, and could round to zero"
    magnitude = np.abs(divisor.astype(np.float64))
    return "its divisor would round to zero" if magnitude.min() < magnitude.max() / 100 else None


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT)


def _weight_refusal(node: ir.Node) -> str | None:
    if not is_activation(node.inputs[0]):
        return "its first input is a constant"
    weight, bias = constant_array(node.inputs[1]), bias_of(node)
    if weight is None or weight.dtype != np.float32 or weight.size == 0:
        return "its weights are not float32 constants"
    if bias is not None:
        array, axis = constant_array(bias), channel_axis(node, weight.ndim)
        channels = weight.shape[axis] if axis is not None else _channels(node, weight)
        if array is None or array.dtype != np.float32:
            return "its bias is not a constant"
        if not is_vector(array, channels):
            return "its bias is not one value per output channel"
    plain = float_attribute(node, "alpha", 1.0) == 1.0 and float_attribute(node, "beta", 1.0) == 1.0
    if node.op_type == "Gemm" and not (plain and int_attribute(node, "transA", 0) == 0):
        return "Gemm with alpha, beta or transA"
    return None


def _channels(node: ir.Node, weight: NDArray[np.generic]) -> int:
    """Return the number of outputs of a layer whose weights have no axis of them."""
    return int(weight.shape[1]) * int_attribute(node, "group", 1) if node.op_type == "ConvTranspose" else weight.size


def _is_finite(array: NDArray[np.generic]) -> bool:
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())


def _reach_through_movers(nodes: list[ir.Node], draft: _Draft) -> tuple[ir.Node, ...]:
    """Let data that are integers on one side of a mover be integers on the other, and return the movers that do.

    Backwards first: a source is only worth an integer where somebody wants the result.
    """
    candidates = [n for n in nodes if moves(n, draft.target) and node_name(n) not in draft.choice.floating]
    for node in reversed(candidates):
        source = node.inputs[0]
        if source is None or not is_activation(source) or not any(o in draft.wanted for o in data_outputs(node)):
            continue
        if root(source, draft.target).name in draft.measured:
            draft.wanted.add(source)
    movers = []
    for node in candidates:
        source = node.inputs[0]
        if source in draft.wanted or (constant_array(source) is not None and _quantizable(node, draft)):
            movers.append(node)
            draft.wanted.update(o for o in data_outputs(node) if o not in draft.tail)
        elif any(o in draft.wanted for o in data_outputs(node)):
            reason = "its input has no measured range"
            draft.skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
    return tuple(movers)


def _quantizable(node: ir.Node, draft: _Draft) -> bool:
    """Say whether a mover of a constant (an embedding) can keep it as integers."""
    array = constant_array(node.inputs[0])
    wanted = any(o in draft.wanted for o in data_outputs(node))
    return wanted and array is not None and array.dtype == np.float32 and array.size > 0 and _is_finite(array)


def _groups(draft: _Draft, movers: Iterable[ir.Node], tensors: Iterable[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Return for every tensor the one that stands for all that share its scale."""
    group = {value: value for value in tensors}

    def find(value: ir.Value) -> ir.Value:
        while group.setdefault(value, value) is not value:
            value = group[value]
        return value

    shared = [(n.inputs[:1], data_outputs(n)) for n in movers]
    shared += [
        ([n.inputs[i] for i in data_inputs(n)], [carrier(o) for o in data_outputs(n)])
        for n in draft.nodes
        if n.op_type in draft.target.one_scale
    ]
    for sources, outputs in shared:
        values = [v for v in (*sources, *outputs) if v is not None and v not in draft.tail]
        for value in values[1:]:
            group[find(value)] = find(values[0])
    return {value: find(value) for value in group}
