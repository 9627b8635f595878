"""An ONNX graph as a torch module: run and trained under its own names, and written back.

executor = build_executor(model)
outputs = executor({"input": batch})          # a dict, by the names of the graph's outputs
outputs["logits"].square().mean().backward()
trained = write_back(model, executor)
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from qcore.errors import ModelError
from qcore.graph.edit import editable_copy
from qcore.training.program import DEVICE, Program, Request, Transform, build_program
from qcore.training.tensors import FLOATS
from qcore.training.weights import statistics_names, trainable_names, with_values

_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorOptions:
    """How a graph is trained.

    `trainable`: names of float initializers, None for those of `trainable_names`. `transforms`: for the name of a
    value, what all its readers (and the caller) shall see in its place; called where the value is made, or where an
    initializer is first read; a torch module among them becomes part of the executor, its parameters included.
    `intermediates`: names of values that are returned beside the outputs. The next two act in training mode only:
    `batch_statistics` lets BatchNormalization use and update statistics, `dropout` lets Dropout drop. `channels_last`:
    the memory layout of images and filters; None chooses.
    """

    trainable: Collection[str] | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    intermediates: tuple[str, ...] = ()
    batch_statistics: bool = False
    dropout: bool = False
    channels_last: bool | None = None


class Executor(torch.nn.Module):
    """Runs a graph: named tensors in, named tensors out. Made by `build_executor`.

    Float initializers are parameters, of which the trainable ones have gradients; running statistics, integers and
    what was folded are buffers. Their names in `state_dict` are those of the graph with `.` written as `:` (torch
    keeps dots for itself), behind `onnx:`.
    """

    def __init__(self, programs: tuple[Program, Program], parameters: Mapping[str, bool], channels_last: bool) -> None:
        """Hold the tensors of both programs.

        Args:
            programs: for evaluation and for training; the same object twice if there is no difference.
            parameters: name of each tensor that is a parameter -> whether it is trained.
            channels_last: whether 4-D inputs and filters are kept with their channels last in memory.
        """
        super().__init__()
        self._programs = programs
        self._keys: dict[str, str] = {}
        self._channels_last = channels_last
        self._transforms = torch.nn.ModuleList()
        held = {**programs[0].held, **programs[1].held}
        for name, tensor in held.items():
            key = _key(name, set(self._keys.values()))
            self._keys[name] = key
            if channels_last and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            if name in parameters:
                self.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=parameters[name]))
            else:
                self.register_buffer(key, tensor)
        self._fills = tuple(self._fills_of(program) for program in programs)

    def _fills_of(self, program: Program) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
        """Return the keys and slots of the parameters and of the buffers that `program` reads."""
        keyed = [(self._keys[name], slot) for name, slot in program.held_slots]
        return (
            tuple((key, slot) for key, slot in keyed if key in self._parameters),
            tuple((key, slot) for key, slot in keyed if key in self._buffers),
        )

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The parameters by the names of their initializers: trainable ones have `requires_grad`."""
        return {name: self._parameters[key] for name, key in self._keys.items() if key in self._parameters}

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """All tensors held, by their names in the graph."""
        return {
            name: self._parameters[key] if key in self._parameters else self._buffers[key]
            for name, key in self._keys.items()
        }

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the graph's outputs and the intermediates by name.

        Args:
            inputs: every input of the graph by name, with its element type, on the device of the parameters.

        Raises:
            ModelError: an input is missing.
        """
        program = self._programs[self.training]
        values = program.template.copy()
        for name, slot in program.inputs:
            if name not in inputs:
                raise ModelError(f"input {name!r} is missing, given: {', '.join(inputs) or 'none'}; pass every input")
            tensor = inputs[name]
            if self._channels_last and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            values[slot], values[DEVICE] = tensor, tensor.device
        parameters, buffers = self._fills[self.training]
        for key, slot in parameters:
            values[slot] = self._parameters[key]
        for key, slot in buffers:
            values[slot] = self._buffers[key]
        for function, read, written, dead in program.instructions:
            result = function(*[values[slot] for slot in read])
            if type(result) is tuple:
                for slot, part in zip(written, result, strict=False):
                    values[slot] = part
            else:
                values[written[0]] = result
            for slot in dead:
                values[slot] = None
        return {name: values[slot] for name, slot in program.outputs}


def build_executor(model: ir.Model, options: ExecutorOptions | None = None) -> Executor:
    """Return `model` as a torch module on the CPU, in training mode; the argument is not changed.

    Raises:
        ModelError: nodes that the executor does not run (all of them are named), or options that name values which
            the graph does not have.
    """
    options = options or ExecutorOptions()
    own = editable_copy(model)
    if own.functions:
        InlinePass()(own)
        own = editable_copy(own)
    graph = own.graph
    statistics = set(statistics_names(graph))
    trainable = set(trainable_names(own) if options.trainable is None else options.trainable)
    _check_names(graph, trainable, options)
    request = Request(
        changing=frozenset(trainable | statistics),
        transforms=options.transforms,
        intermediates=tuple(options.intermediates),
    )
    evaluation = build_program(graph, own.opset_imports, request)
    training = evaluation
    if options.batch_statistics or options.dropout:
        request = Request(
            changing=request.changing,
            transforms=options.transforms,
            intermediates=request.intermediates,
            batch_statistics=options.batch_statistics,
            dropout=options.dropout,
        )
        training = build_program(graph, own.opset_imports, request)
    floats = {
        name for name, v in graph.initializers.items() if v.const_value is not None and v.const_value.dtype in FLOATS
    }
    parameters = {name: name in trainable for name in floats - statistics}
    channels_last = _has_images(graph) if options.channels_last is None else options.channels_last
    executor = Executor((evaluation, training), parameters, channels_last)
    _adopt(executor, options.transforms)
    return executor


def write_back(model: ir.Model, executor: Executor) -> ir.Model:
    """Return `model` with the values of `executor` in the same initializers, names and element types.

    Tensors that did not change keep their bytes. Running statistics are written too.

    Args:
        model: the one that `executor` was built from; not changed.
        executor: trained or not.
    """
    return with_values(model, executor.values)


def _key(name: str, taken: Collection[str]) -> str:
    key = "onnx:" + name.replace(".", ":")
    while key in taken:
        key += "'"
    return key


def _adopt(executor: Executor, transforms: Mapping[str, Transform]) -> None:
    """Make torch modules among `transforms` part of `executor`, each once."""
    modules = {id(t): t for t in transforms.values() if isinstance(t, torch.nn.Module)}
    executor._transforms.extend(modules.values())


def _has_images(graph: ir.Graph) -> bool:
    return any(
        node.op_type == "Conv" and (w := node.inputs[1]) is not None and w.shape is not None and len(w.shape) == 4
        for node in graph
    )


def _check_names(graph: ir.Graph, trainable: Collection[str], options: ExecutorOptions) -> None:
    floats = [name for name, v in graph.initializers.items() if v.dtype in FLOATS]
    unknown = sorted(set(trainable) - set(floats))
    if unknown:
        raise ModelError(
            f"{unknown[0]!r} is no float initializer of the model, so it cannot be trained; allowed: "
            f"{', '.join(floats[:_LISTED])}{', ...' if len(floats) > _LISTED else ''}; correct `trainable`"
        )
    known = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    known |= {value.name for value in graph.inputs}
    missing = sorted(set(options.transforms) - known)
    if missing:
        raise ModelError(
            f"the graph has no value called {missing[0]!r} to transform; allowed: names of its inputs, initializers "
            "and node outputs; correct `transforms`"
        )
