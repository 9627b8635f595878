"""A quantized graph run unit by unit over many samples: a layer may be changed when its inputs are known.

Layer-wise recovery sees the inputs of a layer as the layers before it really make them, changes its weights, and only
then lets the rest of the graph see its outputs. Going unit by unit costs one inference in all; running the graph up to
each layer anew would cost one per layer. A unit is a node with the DequantizeLinear nodes that feed it and the
activation and QuantizeLinear behind it, so what is kept between units are integers, a byte per value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from qcore.errors import ModelError
from qcore.runtime.ort import Predict, load_as_written, load_unfused

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
    """How far a graph has been run.

    `constants` may be replaced for units that have not run yet; `tensors` are what later units still need, one array
    per batch.
    """

    model: onnx.ModelProto
    constants: dict[str, Array]
    makers: dict[str, onnx.NodeProto]
    units: list[Unit]
    last_use: dict[str, int]
    tensors: dict[str, list[Array]]
    position: int = 0


def start_walk(model: onnx.ModelProto, batches: Sequence[Mapping[str, Array]]) -> Walk:
    """Return a walk at the graph's inputs.

    Args:
        model: a QDQ model whose constants are initializers; only read.
        batches: named inputs of each batch.
    """
    constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output if o}
    units = units_of(model.graph)
    return Walk(
        model=model,
        constants=constants,
        makers=makers,
        units=units,
        last_use={name: k for k, unit in enumerate(units) for name in unit.reads},
        tensors={i.name: [b[i.name] for b in batches] for i in model.graph.input if i.name not in constants},
    )


def inputs_of(walk: Walk, layer: str) -> Iterator[Array]:
    """Run every unit before the node called `layer` and yield its first input, dequantized, batch by batch.

    Raises:
        ModelError: the runtime cannot run a unit, or the node does not exist or has run already.
    """
    while walk.position < len(walk.units):
        node = next((n for n in walk.units[walk.position].nodes if n.name == layer), None)
        if node is not None:
            break
        _run_unit(walk)
    else:
        raise ModelError(f"node {layer!r} does not come up; allowed: nodes of the quantized graph, in graph order")
    source = walk.makers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        yield from walk.tensors[node.input[0]]
        return
    scale = walk.constants[source.input[1]].astype(np.float32)
    zero = walk.constants[source.input[2]].astype(np.float32) if len(source.input) > 2 else np.float32(0)
    for stored in walk.tensors[source.input[0]]:
        yield (stored.astype(np.float32) - zero) * scale


def units_of(graph: onnx.GraphProto) -> list[Unit]:
    """Return the units of `graph` in its order; together they hold every node that anything reads."""
    constants = {t.name for t in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output if o}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in graph.output}
    taken: set[str] = set()
    units = []
    for node in graph.node:
        inner = node.op_type == "DequantizeLinear" and node.output[0] not in outputs
        if node.output[0] in taken or inner:
            continue
        chain = _chain(node, readers, outputs)
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


def _chain(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], outputs: set[str]
) -> list[onnx.NodeProto]:
    """Return `node` and what follows it alone, up to its QuantizeLinear."""
    chain = [node]
    while len(chain[-1].output) == 1 and chain[-1].output[0] not in outputs:
        after = readers.get(chain[-1].output[0], [])
        if len(after) != 1 or after[0].op_type not in TRAILING or after[0].input[0] != chain[-1].output[0]:
            break
        chain.append(after[0])
        if after[0].op_type == "QuantizeLinear":
            break
    return chain


def _run_unit(walk: Walk) -> None:
    unit = walk.units[walk.position]
    predict = load_unit(walk.model, unit, walk.constants, {n: walk.tensors[n][0] for n in unit.reads})
    if unit.reads:
        made = [predict({n: walk.tensors[n][k] for n in unit.reads}) for k in range(len(walk.tensors[unit.reads[0]]))]
        walk.tensors.update({name: [m[name] for m in made] for name in unit.writes})
    else:
        walk.constants.update(predict({}))
    for name in unit.reads:
        if walk.last_use[name] == walk.position:
            del walk.tensors[name]
    walk.position += 1


def load_unit(
    model: onnx.ModelProto, unit: Unit, constants: Mapping[str, Array], fed: Mapping[str, Array], *, threads: int = 0
) -> Predict:
    """Return the function that runs `unit` of `model` as it is written.

    Args:
        model: the whole graph; only read.
        unit: of that graph.
        constants: by name; those that the unit does not read do no harm.
        fed: an example of what it reads, for the dtypes.
        threads: as in `load_as_written`.

    Raises:
        ModelError: the runtime cannot load it.
    """
    needed = dict.fromkeys(i for n in unit.nodes for i in n.input if i in constants)
    graph = onnx.helper.make_graph(
        list(unit.nodes),
        "unit",
        [_port(name, fed[name]) for name in unit.reads if name not in constants],
        [onnx.ValueInfoProto(name=name) for name in unit.writes],
        [numpy_helper.from_array(constants[name], name) for name in needed],
    )
    proto = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return load_as_written(proto.SerializeToString(), name=f"node {unit.nodes[-1].name}", threads=threads).predict


def _port(name: str, value: Array) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), None)


def expose(model: ir.Model, names: Sequence[str]) -> Predict:
    """Return a function from named inputs to the tensors `names` of `model`."""
    return load_unfused(with_outputs(model, names)).predict


def with_outputs(model: ir.Model, names: Sequence[str]) -> bytes:
    """Return the file of `model` with the tensors `names` as further outputs."""
    proto = ir.serde.serialize_model(model)
    present = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    return bytes(proto.SerializeToString())
