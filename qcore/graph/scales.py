"""Where a factor for each channel of the last axis goes: into the constants of what makes an activation.

A LayerNormalization, a Mul or Add with a constant and a linear layer can hold it; a Relu and what works on each channel
by itself (a mean over a sequence, one row of it) hand it on to what is in front of them.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.traverse import constant_array, float_attribute, int_attribute, ints_attribute, only_consumer

Float = NDArray[np.floating]
Edit = tuple[ir.Node, int, Float]
"""This input of this node becomes this constant."""

_ALONG = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "Gather", "Identity", "Dropout")


def absorbed(value: ir.Value, factor: NDArray[np.float64]) -> list[Edit] | None:
    """Return the edits that multiply `value` by `factor` along its last axis, or None if its maker cannot hold it."""
    node = value.producer()
    if node is None or node.domain != "" or value is not node.outputs[0]:
        return None
    match node.op_type:
        case "LayerNormalization":
            return _into_constants(node, (1, 2), factor)
        case "Mul":
            return _into_either(node, factor)
        case "Add" | "Sub":
            return _into_sum(node, factor)
        case op if op == "Relu" or (op in _ALONG and _keeps_last(node)):  # f(c x) = c f(x) for c > 0
            return _absorbed_before(node.inputs[0], factor)
        case "MatMul" | "Gemm":
            return _into_linear(node, factor)
        case _:
            return None


def _absorbed_before(value: ir.Value | None, factor: NDArray[np.float64]) -> list[Edit] | None:
    return None if value is None or only_consumer(value) is None else absorbed(value, factor)


def _keeps_last(node: ir.Node) -> bool:
    """Say whether `node` works on each channel of the last axis by itself, as pooling a sequence or taking one row."""
    if node.op_type in ("Identity", "Dropout"):
        return True
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type == "Gather":
        axes: tuple[int, ...] = (int_attribute(node, "axis", 0),)
    else:
        given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = ints_attribute(node, "axes") if given is None else tuple(int(a) for a in given)
    return shape is not None and bool(axes) and all(a % len(shape) != len(shape) - 1 for a in axes)


def _scaled(value: ir.Value | None, factor: NDArray[np.float64]) -> Float | None:
    """Return the constant `value` times `factor` along its last axis; a scalar becomes a vector."""
    array = constant_array(value)
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    if array.size > 1 and array.shape[-1] not in (1, len(factor)):
        return None
    return np.asarray(array * factor)


def _into_constants(node: ir.Node, indices: tuple[int, ...], factor: NDArray[np.float64]) -> list[Edit] | None:
    edits: list[Edit] = []
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] is not None:
            array = _scaled(node.inputs[index], factor)
            if array is None or array.shape != factor.shape:
                return None
            edits.append((node, index, array))
    return edits or None


def _into_either(node: ir.Node, factor: NDArray[np.float64]) -> list[Edit] | None:
    for index in (1, 0):
        array = _scaled(node.inputs[index], factor)
        if array is not None:
            return [(node, index, array)]
    return None


def _into_sum(node: ir.Node, factor: NDArray[np.float64]) -> list[Edit] | None:
    for index in (1, 0):
        array = _scaled(node.inputs[index], factor)
        before = _absorbed_before(node.inputs[1 - index], factor) if array is not None else None
        if array is not None and before is not None:
            return [(node, index, array), *before]
    return None


def _into_linear(node: ir.Node, factor: NDArray[np.float64]) -> list[Edit] | None:
    weight = constant_array(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    transposed = bool(int_attribute(node, "transB", 0))
    edits: list[Edit] = [(node, 1, weight * (factor[:, None] if transposed else factor))]
    if len(node.inputs) > 2 and node.inputs[2] is not None and float_attribute(node, "beta", 1.0) != 0.0:
        bias = _scaled(node.inputs[2], factor)
        if bias is None:
            return None
        edits.append((node, 2, bias))
    return edits
