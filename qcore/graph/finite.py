"""Weights that are no numbers: found before a method spreads them over a model, or blames the data for them.

An infinite constant may be meant (the -inf of an attention mask, the bound of a Clip); weights and biases may not be.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcore.errors import ModelError
from qcore.graph.traverse import constant_array, node_name

_WEIGHTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1, 2)),
    "MatMul": (0, 1),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)),
    "BatchNormalization": (1, 2, 3, 4),
    "PRelu": (1,),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
}
_MAY_BE_INFINITE = {"Gather": (0,), **dict.fromkeys(("Add", "Sub", "Mul", "Div"), (0, 1))}  # masks; NaN is none
_MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Cast")


def refuse_non_finite_weights(model: ir.Model) -> None:
    """Refuse a float model in which a weight or bias is NaN or infinite.

    Raises:
        ModelError: names the first such initializer, and the node that reads it.
    """
    checked: set[ir.Value] = set()
    for node, value in _weights(model):
        if value in checked:
            continue
        checked.add(value)
        held = _held(value)
        if held is not None and (held == "NaN" or node.op_type not in _MAY_BE_INFINITE or _is_bias(node)):
            raise ModelError(
                f"initializer {value.name} of {node.op_type} {node_name(node)} holds {held}; allowed: finite weights; "
                "mend the model and export it again"
            )


def non_finite_initializer(model: ir.Model) -> str | None:
    """Return in words the first initializer of `model` that holds NaN or infinity, whatever it is for, or None."""
    for value in model.graph.initializers.values():
        if (held := _held(value)) is not None:
            return f"initializer {value.name} holds {held}"
    return None


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield the constants that nodes read as weights or operands; what only moves them is gone through."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "":
            continue
        for index in _WEIGHTS.get(node.op_type, _MAY_BE_INFINITE.get(node.op_type, ())):
            value = _moved(node.inputs[index]) if index < len(node.inputs) else None
            if value is not None and constant_array(value) is not None:
                yield node, value


def _moved(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES and node.domain == "":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def _is_bias(node: ir.Node) -> bool:
    """Say whether `node` adds a constant to the result of a linear layer."""
    makers = [v.producer() for v in node.inputs if v is not None] if node.op_type == "Add" else []
    return any(m is not None and m.op_type == "MatMul" and any(map(_is_constant, m.inputs)) for m in makers)


def _is_constant(value: ir.Value | None) -> bool:
    moved = _moved(value)
    return moved is not None and constant_array(moved) is not None


def _held(value: ir.Value) -> str | None:
    """Return "NaN" or "infinity" if the constant `value` holds such a number, or None."""
    array = constant_array(value)
    if array is None or not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return None
    return "NaN" if np.isnan(array).any() else "infinity"
