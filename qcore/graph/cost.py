"""What a model costs before anyone runs it: multiply-accumulates of every layer.

A layer with constant weights uses each of them equally often, so what is left of its weights says what is left of its
cost. Additions of biases, activations and pooling are not counted.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from qcore.errors import ModelError
from qcore.graph.shapes import dims_of, single_sample, static_shape
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

    For one sample, whatever the batch (`single_sample`). Nodes inside subgraphs and functions are not counted.

    Raises:
        ModelError: a dimension that matters is not known.
    """
    return tuple(
        LayerCost(
            node=node_name(n),
            op_type=n.op_type,
            macs=_known_macs(n),
            weight=n.inputs[1].name if n.inputs[1] is not None and n.inputs[1].is_initializer() else None,
        )
        for n in _counted(model)
    )


def model_macs(model: ir.Model) -> int:
    """Return the multiply-accumulates of one inference. Raises as `layer_costs`."""
    return sum(cost.macs for cost in layer_costs(model))


def node_macs(model: ir.Model) -> dict[str, int]:
    """Return node name -> multiply-accumulates as `layer_costs`, without nodes for which they cannot be counted."""
    found = {node_name(n): _macs(n) for n in _counted(model)}
    return {name: macs for name, macs in found.items() if macs is not None}


def _counted(model: ir.Model) -> list[ir.Node]:
    return [n for n in single_sample(model).graph if n.op_type in COUNTED and n.domain == ""]


def _macs(node: ir.Node) -> int | None:
    a, b, out = static_shape(node.inputs[0]), static_shape(node.inputs[1]), static_shape(node.outputs[0])
    if a is None or b is None or out is None:
        return None
    match node.op_type:
        case "Conv":  # every output sums over inputs per group and taps
            return math.prod(out) * math.prod(b[1:])
        case "ConvTranspose":  # every input goes to outputs per group and taps
            return math.prod(a) * math.prod(b[1:])
        case "Gemm":
            return math.prod(out) * a[0 if int_attribute(node, "transA", 0) else 1]
        case _:
            return math.prod(out) * a[-1]


def _known_macs(node: ir.Node) -> int:
    macs = _macs(node)
    if macs is None:
        value = next(v for v in (*node.inputs[:2], node.outputs[0]) if static_shape(v) is None)
        dims = dims_of(value)
        found = "nothing" if dims is None else ", ".join("?" if d is None else str(d) for d in dims)
        raise ModelError(
            f"the cost of {node_name(node)} cannot be counted: of the shape of {getattr(value, 'name', None)} is known "
            f"{found}; allowed: only the batch symbolic; export the model with a fixed input size"
        )
    return macs
