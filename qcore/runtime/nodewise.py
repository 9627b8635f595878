"""A quantized graph run unit by unit over many samples: a layer may be changed when its inputs are known.

Layer-wise recovery sees the inputs of a layer as the layers before it really make them, changes its weights, and only
then lets the rest of the graph see its outputs. Going unit by unit costs one inference in all; running the graph up to
each layer anew would cost one per layer. A unit is a node with the DequantizeLinear nodes that feed it and the
activation and QuantizeLinear behind it, so what is kept between units are integers, a byte per value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[np.generic]
TRAILING = ("Relu", "Clip", "QuantizeLinear")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Some nodes that run together: `reads` are the tensors they need from other units, `writes` what they make."""

    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(slots=True)
class Walk:
    """How far a graph has been run: the tensors that later units still need, one array per batch."""

    model: onnx.ModelProto
    constants: dict[str, Array]
    makers: dict[str, onnx.NodeProto]
    units: list[Unit]
    last_use: dict[str, int]
    tensors: dict[str, list[Array]]
    position: int = 0
    dequantizers: dict[str, onnx.NodeProto] = field(default_factory=dict)


def start_walk(model: onnx.ModelProto, batches: Sequence[Mapping[str, Array]]) -> Walk:
    """Return a walk at the graph's inputs.

    Args:
        model: a QDQ model without Constant nodes; only read.
        batches: named inputs of each batch.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output if o}
    units = _units(model.graph, constants, makers)
    last_use = {name: k for k, unit in enumerate(units) for name in unit.reads}
    tensors = {i.name: [b[i.name] for b in batches] for i in model.graph.input if i.name not in constants}
    return Walk(model, constants, makers, units, last_use, tensors)


def inputs_of(walk: Walk, layer: str) -> Iterator[Array]:
    """Run every unit before the node `layer` and return its first input, dequantized, batch by batch."""
    while layer not in (names := {n.name for n in walk.units[walk.position].nodes}):
        _run_unit(walk)
    del names
    node = next(n for n in walk.units[walk.position].nodes if n.name == layer)
    source = walk.makers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        yield from walk.tensors[node.input[0]]
        return
    scale, zero = (walk.constants[n].astype(np.float32) for n in source.input[1:3])
    for stored in walk.tensors[source.input[0]]:
        yield (stored.astype(np.float32) - zero) * scale


def _units(graph: onnx.GraphProto, constants: Mapping[str, Array], makers: Mapping[str, onnx.NodeProto]) -> list[Unit]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in graph.output}
    taken: set[str] = set()
    units = []
    for node in graph.node:
        final = node.op_type == "DequantizeLinear" and node.output[0] in outputs
        if node.output[0] in taken or (node.op_type == "DequantizeLinear" and not final):
            continue
        chain = [node]
        while len(chain[-1].output) == 1 and chain[-1].output[0] not in outputs:
            after = readers.get(chain[-1].output[0], [])
            if len(after) != 1 or after[0].op_type not in TRAILING or after[0].input[0] != chain[-1].output[0]:
                break
            chain.append(after[0])
            if after[0].op_type == "QuantizeLinear":
                break
        taken.update(o for n in chain for o in n.output)
        feeding = {
            name: makers[name]
            for n in chain
            for name in n.input
            if name in makers and makers[name].op_type == "DequantizeLinear"
        }
        nodes = (*feeding.values(), *chain)
        made = {o for n in nodes for o in n.output}
        reads = dict.fromkeys(i for n in nodes for i in n.input if i and i not in constants and i not in made)
        units.append(Unit(nodes=nodes, reads=tuple(reads), writes=tuple(o for o in chain[-1].output if o)))
    return units


def _run_unit(walk: Walk) -> None:
    unit = walk.units[walk.position]
    graph = onnx.helper.make_graph(
        list(unit.nodes),
        "unit",
        [_port(name, walk.tensors[name][0]) for name in unit.reads],
        [onnx.ValueInfoProto(name=name) for name in unit.writes],
        [
            numpy_helper.from_array(walk.constants[name], name)
            for name in dict.fromkeys(i for n in unit.nodes for i in n.input if i in walk.constants)
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=walk.model.opset_import, ir_version=walk.model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions are many and short-lived
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the arithmetic of the file itself
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made: list[list[Array]] = [[] for _ in unit.writes]
    for k in range(len(next(iter(walk.tensors.values())))):
        for values, value in zip(made, session.run(list(unit.writes), {n: walk.tensors[n][k] for n in unit.reads})):
            values.append(value)
    walk.tensors.update(zip(unit.writes, made))
    for name in unit.reads:
        if walk.last_use[name] == walk.position:
            del walk.tensors[name]
    walk.position += 1


def _port(name: str, value: Array) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), None)
