"""Which weights of a graph may become zero, and along which axis a layer sums over its inputs."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.errors import ModelError
from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name

PRUNED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prunable:
    """A layer with float constant weights: `weight` is its second input, `axis` that of the inputs it sums over."""

    node: ir.Node
    weight: ir.Value
    array: NDArray[np.floating]
    axis: int


def prunable_layers(
    model: ir.Model, *, exclude: Collection[str] = (), of: int | None = None
) -> tuple[tuple[Prunable, ...], tuple[Skipped, ...]]:
    """Return the layers of `model` whose weights may become zero, in graph order, and those that stay, with reasons.

    Args:
        model: float model; Conv, ConvTranspose, Gemm and MatMul are looked at.
        exclude: names of nodes to leave alone.
        of: the M of a pattern N:M that shall be laid along the inputs; None where there is none.

    Raises:
        ModelError: `exclude` names no node.
    """
    if missing := set(exclude) - {node_name(n) for n in model.graph}:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    found: list[Prunable] = []
    skipped: list[Skipped] = []
    for node in [n for n in model.graph if n.op_type in PRUNED and n.domain == ""]:
        weight, array = node.inputs[1], constant_array(node.inputs[1])
        reason = None
        if node_name(node) in exclude:
            reason = "excluded by the recipe"
        elif weight is None or array is None or not np.issubdtype(array.dtype, np.floating):
            reason = "its weights are not float constants"
        elif of is not None:
            reason = _pattern_refusal(node, array, of)
        if reason is not None or weight is None or array is None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=str(reason)))
        else:
            found.append(Prunable(node=node, weight=weight, array=array, axis=_input_axis(node, array.ndim)))
    return tuple(found), tuple(skipped)


def _input_axis(node: ir.Node, dimensions: int) -> int:
    match node.op_type:
        case "Conv":
            return 1
        case "ConvTranspose":
            return 0
        case "Gemm":
            return 1 if int_attribute(node, "transB", 0) else 0
        case _:
            return max(dimensions - 2, 0)


def _pattern_refusal(node: ir.Node, weight: NDArray[np.floating], of: int) -> str | None:
    """Return why no pattern over `of` inputs can be laid on the weights of `node`, or None."""
    if node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1:
        return "its input channels are in groups"
    inputs = weight.shape[_input_axis(node, weight.ndim)]
    return f"it has {inputs} inputs per output and tap, fewer than {of}" if inputs < of else None
