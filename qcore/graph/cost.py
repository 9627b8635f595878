"""What a model costs before anyone runs it: multiply-accumulates of every layer.

A layer with constant weights uses each of them equally often, so what is left of its weights says what is left of its
cost. Additions of biases, activations and pooling are not counted.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from qcore.errors import ModelError
from qcore.graph.shapes import dims_of, shaped_copy
from qcore.graph.traverse import int_attribute, node_name

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """The multiply-accumulates of one layer; `weight` names its constant weights, None where they are computed."""

    node: str
    op_type: str
    macs: int
    weight: str | None


def layer_costs(model: ir.Model) -> tuple[LayerCost, ...]:
    """Return the multiply-accumulates of each Conv, ConvTranspose, Gemm and MatMul of `model`, in graph order.

    A symbolic batch (any symbolic first dimension) counts as one sample. Nodes inside subgraphs and functions are not
    counted.

    Raises:
        ModelError: a dimension that matters is not known.
    """
    nodes = [n for n in shaped_copy(model).graph if n.op_type in COUNTED and n.domain == ""]
    return tuple(
        LayerCost(
            node=node_name(n),
            op_type=n.op_type,
            macs=_macs(n),
            weight=n.inputs[1].name if n.inputs[1] is not None and n.inputs[1].is_initializer() else None,
        )
        for n in nodes
    )


def model_macs(model: ir.Model) -> int:
    """Return the multiply-accumulates of one inference. Raises as `layer_costs`."""
    return sum(cost.macs for cost in layer_costs(model))


def _macs(node: ir.Node) -> int:
    x, w = (_known(node, value) for value in node.inputs[:2])
    result = _known(node, node.outputs[0])
    match node.op_type:
        case "Conv":
            return math.prod(w) * math.prod(result[2:]) * result[0]
        case "ConvTranspose":
            return math.prod(w) * math.prod(x[2:]) * x[0]
        case "Gemm":
            return math.prod(result) * (x[0] if int_attribute(node, "transA", 0) else x[1])
        case _:
            return math.prod(result) * x[-1]


def _known(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of `value`; a symbolic first dimension counts 1."""
    dims = dims_of(value)
    if dims is None or None in dims[1:]:
        found = "nothing" if dims is None else ", ".join("?" if d is None else str(d) for d in dims)
        raise ModelError(
            f"the cost of {node_name(node)} cannot be counted: of the shape of {getattr(value, 'name', None)} is known "
            f"{found}; allowed: only the batch symbolic; export the model with a fixed input size"
        )
    return tuple(1 if d is None else d for d in dims)
