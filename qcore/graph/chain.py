"""Layers that can be written as a chain of small ones, and the nodes of that chain.

Conv in one or two dimensions, Gemm, and MatMul with a constant matrix. A chain begins with what the layer reads and
ends with what it wrote, under the same name; the bias goes to its last node.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, fresh_name, replace_node
from qcore.graph.shapes import static_shape
from qcore.graph.traverse import auto_pad, constant_array, float_attribute, int_attribute, ints_attribute, node_name
from qcore.numerics.factors import Factors, Kind
from qcore.numerics.ranks import LayerShape

Array = NDArray[np.float64]
FACTORABLE = ("Conv", "Gemm", "MatMul")
PARTS: dict[Kind, tuple[str, ...]] = {
    "svd": ("reduce", "expand"),
    "spatial": ("vertical", "horizontal"),
    "tucker2": ("reduce", "core", "expand"),
    "cp": ("reduce", "vertical", "horizontal", "expand"),
    "depthwise": ("reduce", "depthwise", "expand"),
}
"""What the nodes of a chain are called, behind the name of the layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorLayer:
    """A layer with constant weights in float64 (outputs, inputs, height, width), and its shape for one sample."""

    node: ir.Node
    weight: Array
    shape: LayerShape


@dataclass(frozen=True, slots=True)
class _Axes:
    """Which axes of the kernel one node of a chain covers; it takes their strides, pads and dilations."""

    vertical: bool
    horizontal: bool


_NEITHER, _BOTH = _Axes(False, False), _Axes(True, True)
_VERTICAL, _HORIZONTAL = _Axes(True, False), _Axes(False, True)
_COVERED: dict[Kind, tuple[_Axes, ...]] = {
    "svd": (_BOTH, _NEITHER),
    "spatial": (_VERTICAL, _HORIZONTAL),
    "tucker2": (_NEITHER, _BOTH, _NEITHER),
    "cp": (_NEITHER, _VERTICAL, _HORIZONTAL, _NEITHER),
    "depthwise": (_NEITHER, _BOTH, _NEITHER),
}


def layer_refusal(node: ir.Node) -> str | None:
    """Return why the Conv, Gemm or MatMul `node` cannot be written as a chain, or None."""
    weight = constant_array(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or constant_array(node.inputs[0]) is not None:
        return "its weights are not float32 constants"
    if node.op_type == "Conv" and int_attribute(node, "group", 1) != 1:
        return "its channels are in groups"
    if node.op_type == "Conv" and weight.ndim > 4:
        return "it convolves in three dimensions"
    if node.op_type == "MatMul" and weight.ndim != 2:
        return "its weights are not one matrix"
    return None


def factor_layer(node: ir.Node, sized: ir.Node) -> FactorLayer | None:
    """Return the layer `node`, or None where its shape is not known.

    Args:
        node: one that `layer_refusal` does not refuse.
        sized: the same node with shapes for one sample (`shapes.single_sample`).
    """
    weight = weight_of(node)
    read, written = static_shape(sized.inputs[0]), static_shape(sized.outputs[0])
    if read is None or written is None:
        return None
    if node.op_type == "Conv":
        into, out = (_plane(shape[2:]) for shape in (read, written))
    else:
        into = out = (math.prod(written) // len(weight), 1)
    outputs, inputs, height, width = weight.shape
    return FactorLayer(
        node=node, weight=weight, shape=LayerShape(weight=(outputs, inputs, height, width), into=into, out=out)
    )


def weight_of(node: ir.Node) -> Array:
    """Return the weights of a layer as (outputs, inputs, height, width)."""
    stored = constant_array(node.inputs[1])
    assert stored is not None  # noqa: S101 - layer_refusal has looked
    w = stored.astype(np.float64)
    if node.op_type == "Conv":
        return w.reshape(*w.shape[:2], 1, w.shape[2]) if w.ndim == 3 else w
    w = w if node.op_type == "Gemm" and int_attribute(node, "transB", 0) else w.T
    return w[:, :, None, None]


def bias_of(node: ir.Node) -> tuple[Array | None, bool]:
    """Return the constant bias of a layer (outputs,), zeros where it has none, and whether it may be replaced.

    A MatMul has no place for one; that of a Gemm may be computed, or be a matrix.
    """
    outputs = len(weight_of(node))
    if node.op_type == "MatMul":
        return None, False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(outputs), True
    bias = constant_array(node.inputs[2])
    if bias is None or bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1):
        return None, False
    return np.broadcast_to(bias.astype(np.float64).reshape(-1), outputs) * float_attribute(node, "beta", 1.0), True


def replace_weight(graph: ir.Graph, node: ir.Node, weight: Array) -> None:
    """Give a layer the weights (outputs, inputs, height, width) under a new name; others that share the old keep it."""
    stored = constant_array(node.inputs[1])
    assert stored is not None  # noqa: S101 - layer_refusal has looked
    flat = weight.reshape(len(weight), -1) if node.op_type != "Conv" else weight.reshape(stored.shape)
    if node.op_type != "Conv" and not (node.op_type == "Gemm" and int_attribute(node, "transB", 0)):
        flat = flat.T
    node.replace_input_with(1, add_initializer(graph, f"{node_name(node)}.weight", flat.astype(np.float32)))


def replace_bias(graph: ir.Graph, node: ir.Node, bias: Array) -> None:
    """Give a Conv or Gemm the bias (outputs,)."""
    node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(graph, f"{node_name(node)}.bias", bias.astype(np.float32)))
    if node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def replace_by_chain(graph: ir.Graph, node: ir.Node, factors: Factors) -> tuple[str, ...]:
    """Put the chain of `factors` in the place of the layer `node` and return the names of its nodes."""
    make = _convolutions if node.op_type == "Conv" else _products
    nodes = make(graph, node, factors)
    for n in nodes[:-1]:
        n.outputs[0].name = fresh_name(graph, f"{n.name}.out")
        n.outputs[0].type = node.outputs[0].type
    replace_node(graph, node, nodes, nodes[-1].outputs[0])
    return tuple(node_name(n) for n in nodes)


def _convolutions(graph: ir.Graph, node: ir.Node, factors: Factors) -> list[ir.Node]:
    at, nodes = node.inputs[0], []
    steps = list(zip(PARTS[factors.kind], _kernels(factors), _COVERED[factors.kind], strict=True))
    stored = constant_array(node.inputs[1])
    flat = stored is not None and stored.ndim == 3
    for k, (part, kernel, axes) in enumerate(steps):
        name = fresh_name(graph, f"{node_name(node)}.{part}")
        array = kernel[:, :, 0] if flat else kernel
        weight = add_initializer(graph, f"{name}.weight", array.astype(np.float32))
        bias = [b for b in node.inputs[2:3] if b is not None] if k == len(steps) - 1 else []
        depthwise = kernel.shape[1] == 1 and 0 < k < len(steps) - 1 and factors.kind in ("cp", "depthwise")
        attributes = _geometry(node, axes, flat=flat)
        attributes.update(kernel_shape=list(array.shape[2:]), group=len(kernel) if depthwise else 1)
        nodes.append(ir.node("Conv", [at, weight, *bias], attributes, name=name))
        at = nodes[-1].outputs[0]
    return nodes


def _kernels(factors: Factors) -> list[Array]:
    """Return the factors as weights of convolutions, (outputs, inputs per group, height, width)."""
    match factors.kind, factors.arrays:
        case "svd", (reduce, expand):
            return [reduce, expand[:, :, None, None]]
        case "spatial", (vertical, horizontal):
            return [vertical[:, :, :, None], horizontal[:, :, None, :]]
        case "tucker2", (reduce, core, expand):
            return [reduce[:, :, None, None], core, expand[:, :, None, None]]
        case "cp", (reduce, vertical, horizontal, expand):
            by_channel = [vertical[:, None, :, None], horizontal[:, None, None, :]]
            return [reduce[:, :, None, None], *by_channel, expand[:, :, None, None]]
        case _:
            reduce, kernel, expand = factors.arrays
            return [reduce[:, :, None, None], kernel[:, None], expand[:, :, None, None]]


def _geometry(node: ir.Node, axes: _Axes, *, flat: bool) -> dict[str, int | str | list[int]]:
    """Return strides, pads and dilations of `node` along the axes that a part covers; neutral along the others."""
    covered = [axes.horizontal] if flat else [axes.vertical, axes.horizontal]
    result: dict[str, int | str | list[int]] = {}
    for name in ("strides", "dilations"):
        values = ints_attribute(node, name)
        if values:
            result[name] = [v if c else 1 for v, c in zip(values, covered, strict=True)]
    pads = ints_attribute(node, "pads")
    if (mode := auto_pad(node)) != "NOTSET":
        return result | ({"auto_pad": mode} if any(covered) else {})
    return result | ({"pads": [v if c else 0 for v, c in zip(pads, covered * 2, strict=True)]} if pads else {})


def _products(graph: ir.Graph, node: ir.Node, factors: Factors) -> list[ir.Node]:
    reduce, expand = (a.reshape(len(a), -1).astype(np.float32) for a in factors.arrays)
    names = [fresh_name(graph, f"{node_name(node)}.{part}") for part in PARTS[factors.kind]]
    if node.op_type == "MatMul":
        weights = [add_initializer(graph, f"{n}.weight", w.T) for n, w in zip(names, (reduce, expand), strict=True)]
        first = ir.node("MatMul", [node.inputs[0], weights[0]], name=names[0])
        return [first, ir.node("MatMul", [first.outputs[0], weights[1]], name=names[1])]
    weights = [add_initializer(graph, f"{n}.weight", w) for n, w in zip(names, (reduce, expand), strict=True)]
    before: dict[str, int | float] = {
        "transA": int_attribute(node, "transA", 0),
        "transB": 1,
        "alpha": float_attribute(node, "alpha", 1.0),
    }
    first = ir.node("Gemm", [node.inputs[0], weights[0]], before, name=names[0])
    bias = [b for b in node.inputs[2:3] if b is not None]
    behind: dict[str, int | float] = {"transB": 1, "beta": float_attribute(node, "beta", 1.0)}
    return [first, ir.node("Gemm", [first.outputs[0], weights[1], *bias], behind, name=names[1])]


def _plane(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width); a signal in one dimension is a plane of height 1."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
