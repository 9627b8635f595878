"""A graph cut into pieces that run one after the other, so that not all activations of a sample are in memory at once.

A piece is some consecutive nodes with their weights. It reads what earlier pieces left, and gives what was asked for
and what later pieces read. Together the pieces do exactly what the whole does, once.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx
from onnx import TensorProto

from qcore.runtime.piece import Piece

PIECE_BYTES = 4 << 20
"""How much of a batch's activations is fetched at a time."""

_SMALL = 1 << 10  # bytes; larger constants are no shapes, and shape inference does not need their values
_WIDTH: dict[int, int] = {TensorProto.DOUBLE: 8, TensorProto.INT64: 8, TensorProto.UINT64: 8, TensorProto.FLOAT16: 2}
_WHOLE = ("Sequence", "Optional", "SplitToSequence", "ConcatFromSequence")


def cut(
    data: bytes, wanted: Collection[str], samples: Mapping[str, Sequence[int]], limit: int = PIECE_BYTES
) -> Iterator[Piece]:
    """Yield a model in as few consecutive pieces as give at most about `limit` bytes of `wanted` tensors each.

    Args:
        data: the bytes of a valid model, nodes in topological order.
        wanted: names of tensors that are read from outside.
        samples: shape of one sample by input ("" for the only one).
        limit: bytes of wanted tensors a piece may give in one run, unless a single node gives more.

    A graph with sequences, subgraphs or types that shape inference does not know stays in one piece.
    """
    model = onnx.ModelProto.FromString(data)
    del data
    graph = model.graph
    made = {o for node in graph.node for o in node.output if o}
    inputs = {i.name for i in graph.input}
    inner = sorted((made | {t.name for t in graph.initializer}) & set(wanted) - inputs)
    known = _types(model, samples)
    starts = _starts(graph, known, set(inner), limit)
    carried = _carried(graph, starts)
    if len(starts) == 1 or any(name not in known for names in carried for name in names):
        present = {o.name for o in graph.output}
        graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner if n not in present)
        reads = tuple(i.name for i in _fed(graph))
        yield Piece(model=model.SerializeToString(), reads=reads, gives=tuple(inner))
    else:
        yield from _pieces(model, starts, carried, (set(inner), known))


def _fed(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are no weights."""
    constants = {t.name for t in graph.initializer}
    return [i for i in graph.input if i.name not in constants]


def _types(model: onnx.ModelProto, samples: Mapping[str, Sequence[int]]) -> dict[str, onnx.TypeProto]:
    """Return the tensor types that shape inference finds for one run; large weights are left out."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph, source = light.graph, model.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.output.extend(source.output)
    for tensor in source.initializer:
        if tensor.ByteSize() <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in _fed(source):
        kind = value.type.tensor_type
        declared = [d.dim_value or 1 for d in kind.shape.dim]
        rest = samples.get(value.name, samples.get("", declared[1:]))
        graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind.elem_type, [*declared[:1], *rest]))
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}  # what cannot be inferred is run in one piece
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {v.name: v.type for v in values if v.type.tensor_type.elem_type}
    return types | {t.name: onnx.helper.make_tensor_type_proto(t.data_type, t.dims) for t in source.initializer}


def _starts(graph: onnx.GraphProto, known: Mapping[str, onnx.TypeProto], wanted: set[str], limit: int) -> list[int]:
    """Return the number of the first node of each piece."""
    starts, given = [0], 0
    if any(_holds_subgraph(n) or n.op_type.startswith(_WHOLE) for n in graph.node):
        return starts
    for k, node in enumerate(graph.node):
        size = sum(_size(known.get(o)) for o in node.output if o in wanted)
        if given and given + size > limit:
            starts.append(k)
            given = 0
        given += size
    return starts


def _holds_subgraph(node: onnx.NodeProto) -> bool:
    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)


def _size(kind: onnx.TypeProto | None) -> int:
    """Return the bytes of a tensor; unknown dimensions count as 1."""
    if kind is None:
        return 0
    tensor = kind.tensor_type
    elements: int = math.prod(max(1, d.dim_value) for d in tensor.shape.dim)
    return elements * _WIDTH.get(tensor.elem_type, 4)


def _carried(graph: onnx.GraphProto, starts: Sequence[int]) -> list[list[str]]:
    """Return what each piece reads of what earlier pieces made."""
    made: set[str] = set()
    carried = []
    for start, end in _spans(graph, starts):
        nodes = graph.node[start:end]
        carried.append(sorted({i for n in nodes for i in n.input} & made))
        made |= {o for n in nodes for o in n.output if o}
    return carried


def _spans(graph: onnx.GraphProto, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(starts, [*starts[1:], len(graph.node)], strict=True)


def _pieces(
    model: onnx.ModelProto,
    starts: Sequence[int],
    carried: Sequence[Sequence[str]],
    about: tuple[set[str], Mapping[str, onnx.TypeProto]],
) -> Iterator[Piece]:
    wanted, known = about
    graph = model.graph
    results = {o.name for o in graph.output}
    for k, (start, end) in enumerate(_spans(graph, starts)):
        nodes = graph.node[start:end]
        read = {i for n in nodes for i in n.input}
        later = {name for names in carried[k + 1 :] for name in names}
        outputs = {o for n in nodes for o in n.output if o} & (wanted | later | results)
        if k == 0:
            outputs |= {t.name for t in graph.initializer} & wanted
        fed = [i for i in _fed(graph) if k == 0 or i.name in read]
        piece = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
        piece.graph.name = graph.name
        piece.graph.node.extend(nodes)
        piece.graph.initializer.extend(t for t in graph.initializer if t.name in read | outputs)
        piece.graph.input.extend(fed)
        piece.graph.input.extend(_without_shape(name, known[name]) for name in carried[k])
        piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(outputs))
        reads = (*(i.name for i in fed), *carried[k])
        yield Piece(model=piece.SerializeToString(), reads=reads, gives=tuple(sorted(outputs)))


def _without_shape(name: str, kind: onnx.TypeProto) -> onnx.ValueInfoProto:
    """Return an input of any shape: the next sample may have another one."""
    return onnx.helper.make_tensor_value_info(name, kind.tensor_type.elem_type, None)
