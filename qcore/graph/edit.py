"""The few edits that rewrites are made of, on a model that the caller owns (a copy)."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

_TAKEN = "qcore.names"


def editable_copy(model: ir.Model) -> ir.Model:
    """Return a copy of `model` whose constants are all initializers; weight bytes are shared, not copied."""
    copy = model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    RemoveInitializersFromInputsPass()(copy)  # models of IR version 3 listed every weight as an input
    taken: set[str | None] = set()
    for graph in (copy.graph, *copy.graph.subgraphs()):
        taken.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
        for node in graph:
            taken.update((node.name, *(output.name for output in node.outputs)))
    copy.graph.meta[_TAKEN] = taken
    return copy


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """Return `wanted`, with a number appended if a value or node of `graph` (of `editable_copy`) has that name."""
    taken: set[str] = graph.meta[_TAKEN]
    name, k = wanted, 0
    while name in taken:
        k += 1
        name = f"{wanted}_{k}"
    taken.add(name)
    return name


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return a new initializer of `graph`; `name` gets a number appended if it is taken."""
    unique = fresh_name(graph, name)
    # ir.tensor would ask typing whether the array is one, which costs more than all the rest; ascontiguousarray would
    # make a scalar a vector.
    tensor = ir.Tensor(np.array(array, order="C"), name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def remove_in_favour_of(node: ir.Node, replacement: ir.Value) -> None:
    """Remove `node` (one output); its readers read `replacement`, which takes over the output's name."""
    output = node.outputs[0]
    name, graph = output.name, node.graph
    assert isinstance(graph, ir.Graph)  # noqa: S101 - nodes of a function body are never passed here
    replacement.type = replacement.type or output.type
    replacement.shape = replacement.shape or output.shape
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = None
    replacement.name = name


def replace_node(graph: ir.Graph, node: ir.Node, new: list[ir.Node], result: ir.Value) -> None:
    """Put the nodes `new` in the place of `node` (one output); `result` takes over its output: name, type, readers."""
    output = node.outputs[0]
    name = output.name
    result.type, result.shape = output.type, output.shape
    graph.insert_before(node, new)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = None
    result.name = name
