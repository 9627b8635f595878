"""A graph as a flat list of instructions on numbered slots, made once, so that running it is one short loop.

Constants are folded, attributes are read, and values are freed behind their last reader. What shapes are made of
(`Shape -> Gather -> Concat -> Reshape`) stays on the CPU as small integer tensors: a dynamic batch costs no wait for
an accelerator. No torch module lives here; `qcore.training.executor` holds the tensors.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir
import torch

from qcore.errors import ModelError
from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import node_name
from qcore.training.ops import MICROSOFT, OPERATORS, SETTINGS
from qcore.training.ops.node import Function, OpFunction, OpInput, OpNode, Unsupported
from qcore.training.tensors import TORCH_TYPES, torch_from_onnx

Transform = Callable[[torch.Tensor], torch.Tensor]
DEVICE, ABSENT = 0, 1
"""Slots that every program has: the device of the run, and None for inputs that are not there."""

_MAKES_SHAPES = ("Shape", "Size")
_KEEPS_INTEGERS = ("Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_MAY_BE_OVERWRITTEN = ("Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that make a new tensor which their own gradients do not read."""
_NAMED = 8


class Instruction(NamedTuple):
    """Call `function` with the values of the slots `inputs`, put the result into `outputs`, then forget `dead`."""

    function: Function
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a program is built for; names are those of values of the graph.

    `changing` are initializers whose values may change between runs: nothing made from them is folded.
    """

    changing: frozenset[str]
    transforms: Mapping[str, Transform]
    intermediates: tuple[str, ...]
    batch_statistics: bool = False
    dropout: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What one run does: copy `template`, fill `inputs` and `held`, call `instructions`, read `outputs`.

    `held` maps the names of tensors that a module keeps (initializers, folded constants) to their first values.
    """

    template: list[object]
    inputs: tuple[tuple[str, int], ...]
    held: Mapping[str, torch.Tensor]
    held_slots: tuple[tuple[str, int], ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class _Draft:
    """A program in the making. `tensors`, `host` and `numbers` say in which slot a value is in each of its forms."""

    request: Request
    opsets: Mapping[str, int]
    constants: dict[ir.Value, torch.Tensor]
    template: list[object] = field(default_factory=lambda: [None, None])
    steps: list[tuple[Function, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    tensors: dict[ir.Value, int] = field(default_factory=dict)
    host: dict[ir.Value, int] = field(default_factory=dict)
    numbers: dict[ir.Value, int] = field(default_factory=dict)
    held: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    refused: list[Skipped] = field(default_factory=list)


def build_program(graph: ir.Graph, opsets: Mapping[str, int], request: Request) -> Program:
    """Return the program of `graph`, whose constants are initializers and whose nodes are in order.

    Raises:
        ModelError: nodes or element types that the executor does not know, all of them in one message.
    """
    draft = _Draft(request=request, opsets=opsets, constants={})
    for name, value in graph.initializers.items():
        if value.const_value is None or value.const_value.dtype not in TORCH_TYPES:
            kind = value.dtype.name if value.dtype else "unknown type"
            draft.refused.append(Skipped(node=name, op_type="initializer", reason=f"element type {kind}"))
        else:
            draft.constants[value] = torch_from_onnx(value.const_value)
    for value in graph.inputs:
        if value.dtype is not None and value.dtype not in TORCH_TYPES:
            draft.refused.append(
                Skipped(node=str(value.name), op_type="input", reason=f"element type {value.dtype.name}")
            )
        draft.tensors[value] = _new_slot(draft)
    inputs = tuple((str(value.name), draft.tensors[value]) for value in graph.inputs)
    for value in graph.inputs:
        _transform(draft, value)
    wanted = _wanted(graph, request.intermediates)
    for node in _needed(graph, wanted):
        _add_node(draft, node, wanted)
    if draft.refused:
        raise ModelError(_refusal(draft.refused))
    outputs = tuple((str(value.name), _tensor_slot(draft, value)) for value in wanted)
    return _finished(draft, inputs, outputs)


def _wanted(graph: ir.Graph, intermediates: Collection[str]) -> list[ir.Value]:
    """Return the graph's outputs and the values called `intermediates`, each once."""
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    missing = [name for name in intermediates if name not in values]
    if missing:
        raise ModelError(
            f"the graph has no value called {missing[0]!r}; allowed: names of its inputs, initializers and node "
            "outputs, as `qcore layers` lists them"
        )
    return list(dict.fromkeys([*graph.outputs, *(values[name] for name in intermediates)]))


def _needed(graph: ir.Graph, wanted: Collection[ir.Value]) -> list[ir.Node]:
    """Return, in order, the nodes that `wanted` depends on."""
    needed, kept = set(wanted), []
    for node in reversed(graph):
        if any(output in needed for output in node.outputs):
            needed.update(value for value in node.inputs if value is not None)
            kept.append(node)
    return kept[::-1]


def _add_node(draft: _Draft, node: ir.Node, wanted: Collection[ir.Value]) -> None:
    """Fold `node` or append its instruction; note it down where it is refused."""
    operator = _operator(node)
    try:
        if operator is None:
            raise Unsupported("the operator is not among those that the executor runs")
        function = operator(_seen(draft, node, wanted))
    except Unsupported as reason:
        draft.refused.append(Skipped(node=node_name(node), op_type=node.op_type, reason=str(reason)))
        for output in node.outputs:
            draft.tensors[output] = ABSENT
        return
    settings = SETTINGS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
    present = [value for value in node.inputs if value is not None]
    if all(_is_fixed(draft, value) for value in present) and not (draft.request.dropout and node.op_type == "Dropout"):
        _fold(draft, node, function, settings)
        return
    makes_shape = node.op_type in _MAKES_SHAPES
    on_host = makes_shape or all(_is_host(draft, value) for value in present)
    slot = _host_slot if on_host and not makes_shape else _tensor_slot
    inputs = tuple(
        ABSENT if value is None else _number_slot(draft, value) if i in settings else slot(draft, value)
        for i, value in enumerate(node.inputs)
    )
    outputs = tuple(_new_slot(draft) for _ in node.outputs)
    draft.steps.append((function, inputs, outputs))
    (draft.host if on_host else draft.tensors).update(zip(node.outputs, outputs, strict=True))
    for output in node.outputs:
        _transform(draft, output)


def _operator(node: ir.Node) -> OpFunction | None:
    if node.domain in ("", "ai.onnx"):
        return OPERATORS.get(node.op_type)
    return MICROSOFT.get(node.op_type) if node.domain == "com.microsoft" else None


def _seen(draft: _Draft, node: ir.Node, wanted: Collection[ir.Value]) -> OpNode:
    """Return `node` as operator functions see it."""
    inputs = tuple(
        None
        if value is None
        else OpInput(dtype=value.dtype, constant=draft.constants.get(value) if _is_fixed(draft, value) else None)
        for value in node.inputs
    )
    return OpNode(
        op_type=node.op_type,
        opset=draft.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1),
        attributes=node.attributes,
        inputs=inputs,
        outputs=tuple(bool(output.uses()) or output in wanted for output in node.outputs),
        carries_integers=not _only_dequantized(node.outputs[0], wanted),
        may_overwrite=_is_last_reader(draft, node, wanted),
        batch_statistics=draft.request.batch_statistics,
        dropout=draft.request.dropout,
    )


def _is_last_reader(draft: _Draft, node: ir.Node, wanted: Collection[ir.Value]) -> bool:
    """Say whether `node` alone reads its first input, which then may be overwritten."""
    value = node.inputs[0] if node.inputs else None
    maker = None if value is None else value.producer()
    if value is None or maker is None or value in wanted or len(value.uses()) > 1:
        return False
    return (
        maker.op_type in _MAY_BE_OVERWRITTEN
        and maker.domain == ""
        and value in draft.tensors
        and (str(value.name) not in draft.request.transforms)
    )


def _only_dequantized(value: ir.Value, wanted: Collection[ir.Value]) -> bool:
    """Say whether every reader of `value` dequantizes it, perhaps after moving its elements around."""
    if value in wanted:
        return False
    return all(
        reader.op_type == "DequantizeLinear"
        or (reader.op_type in _KEEPS_INTEGERS and index == 0 and _only_dequantized(reader.outputs[0], wanted))
        for reader, index in value.uses()
    )


def _is_fixed(draft: _Draft, value: ir.Value) -> bool:
    """Say whether `value` is a constant that nothing can change."""
    return value in draft.constants and value.name not in draft.request.changing | draft.request.transforms.keys()


def _is_host(draft: _Draft, value: ir.Value) -> bool:
    return value in draft.host or _is_fixed(draft, value)


def _fold(draft: _Draft, node: ir.Node, function: Function, settings: tuple[int, ...]) -> None:
    arguments = [
        None if value is None else draft.constants[value].tolist() if i in settings else draft.constants[value]
        for i, value in enumerate(node.inputs)
    ]
    with torch.no_grad():
        result = function(*arguments)
    draft.constants.update(zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=False))


def _new_slot(draft: _Draft, content: object = None) -> int:
    draft.template.append(content)
    return len(draft.template) - 1


def _host_slot(draft: _Draft, value: ir.Value) -> int:
    if value not in draft.host:
        draft.host[value] = _new_slot(draft, draft.constants[value])
    return draft.host[value]


def _tensor_slot(draft: _Draft, value: ir.Value) -> int:
    """Return the slot of `value` on the device of the run."""
    if value in draft.tensors:
        return draft.tensors[value]
    slot = _new_slot(draft)
    draft.tensors[value] = slot
    if value in draft.constants:
        draft.held[str(value.name)] = slot, draft.constants[value]
        _transform(draft, value)
    else:
        draft.steps.append((torch.Tensor.to, (draft.host[value], DEVICE), (slot,)))
    return draft.tensors[value]


def _number_slot(draft: _Draft, value: ir.Value) -> int:
    """Return the slot of `value` as Python numbers, through which no gradient goes."""
    if value in draft.constants and value.name in draft.request.changing:
        reason = "a shape, bound or axis is never trained; take it out of `trainable`"
        draft.refused.append(Skipped(node=str(value.name), op_type="initializer", reason=reason))
    if value not in draft.numbers:
        if _is_fixed(draft, value):
            draft.numbers[value] = _new_slot(draft, draft.constants[value].tolist())
        else:
            source = draft.host[value] if value in draft.host else _tensor_slot(draft, value)
            draft.numbers[value] = _new_slot(draft)
            draft.steps.append((torch.Tensor.tolist, (source,), (draft.numbers[value],)))
    return draft.numbers[value]


def _transform(draft: _Draft, value: ir.Value) -> None:
    """Let every reader of `value` from here on see the transformed value, where there is a transform."""
    transform = draft.request.transforms.get(str(value.name))
    if transform is None:
        return
    source = _tensor_slot(draft, value)
    draft.host.pop(value, None)
    draft.tensors[value] = _new_slot(draft)
    draft.steps.append((transform, (source,), (draft.tensors[value],)))


def _finished(draft: _Draft, inputs: tuple[tuple[str, int], ...], outputs: tuple[tuple[str, int], ...]) -> Program:
    """Return the program, with each computed slot emptied by its last reader."""
    last: dict[int, int] = {slot: -1 for _, slot in inputs}
    for k, (_, read, written) in enumerate(draft.steps):
        last.update(dict.fromkeys(written, k))
        last.update((slot, k) for slot in read if slot in last)
    dead: dict[int, list[int]] = {}
    kept = {slot for _, slot in outputs}
    for slot, k in last.items():
        if slot not in kept:
            dead.setdefault(k, []).append(slot)
    instructions = tuple(
        Instruction(function, read, written, tuple(dead.get(k, ())))
        for k, (function, read, written) in enumerate(draft.steps)
    )
    return Program(
        template=draft.template,
        inputs=inputs,
        held={name: tensor for name, (_, tensor) in draft.held.items()},
        held_slots=tuple((name, slot) for name, (slot, _) in draft.held.items()),
        instructions=instructions,
        outputs=outputs,
    )


def _refusal(refused: list[Skipped]) -> str:
    named = "; ".join(f"{s.op_type} {s.node!r}: {s.reason}" for s in refused[:_NAMED])
    more = f"; and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
    return (
        f"{len(refused)} parts of the model cannot be trained: {named}{more}; allowed: the operators in "
        "qcore.training.ops; export the model without them, or choose a recipe without training"
    )
