"""Multiplications of a model, per node: what Conv, ConvTranspose, Gemm and MatMul cost for one sample."""

import math

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcore.graph.traverse import int_attribute, node_name

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def node_macs(model: ir.Model) -> dict[str, int]:
    """Return node name -> multiply-accumulates for one sample, in graph order; bias additions do not count.

    Shapes are those of `single_sample`. Nodes whose shapes are not known then (further symbolic dimensions) are left
    out, as are nodes inside subgraphs.
    """
    sized = single_sample(model)
    counted = [n for n in sized.graph if n.op_type in COUNTED and n.domain == ""]
    found = {node_name(n): _macs(n) for n in counted}
    return {name: macs for name, macs in found.items() if macs is not None}


def single_sample(model: ir.Model) -> ir.Model:
    """Return a copy of `model` for one sample, with every shape that ONNX shape inference finds.

    The first dimension of every input becomes 1; where the graph does not take that (a matrix is no batch), only those
    do that have no number.
    """
    sized = _inferred(model, fixed_too=True)
    if all(static_shape(o) is not None for node in sized.graph for o in node.outputs):
        return sized
    return _inferred(model, fixed_too=False)


def _inferred(model: ir.Model, *, fixed_too: bool) -> ir.Model:
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None and len(value.shape) and not value.is_initializer():
            first = 1 if fixed_too or not isinstance(value.shape[0], int) else value.shape[0]
            value.shape = ir.Shape([first, *value.shape[1:]])
    for value in (*copy.graph.outputs, *(o for node in copy.graph for o in node.outputs)):
        value.shape = None  # said for another batch; inferred anew
    # Not strict: what does not fit keeps an unknown shape, and nobody is warned.
    return ShapeInferencePass(check_type=False, strict_mode=False)(copy).model


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of `value` if every dimension is a number, else None."""
    if value is None or value.shape is None:
        return None
    dims = tuple(value.shape)
    return tuple(int(d) for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None


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
