"""Questions about a graph; nothing here edits."""

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def node_name(node: ir.Node) -> str:
    """Return the name of `node`, or that of its first output where it has none."""
    return node.name or next((o.name for o in node.outputs if o.name), node.op_type)


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the constant that `value` holds (an initializer or the output of a Constant node), else None."""
    if value is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_vector(array: NDArray[Any], size: int) -> bool:
    """Say whether `array` holds one value per output channel: (size,), or that with leading dimensions of 1."""
    return array.size == size and (array.ndim < 2 or array.shape[-1] == size)


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads `value`, or None if it has several readers or is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return the integer attribute `name` of `node`, or `default` where it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return the float attribute `name` of `node`, or `default` where it is absent."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...]:
    """Return the integers of the attribute `name` of `node`, none where it is absent."""
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def auto_pad(node: ir.Node) -> str:
    """Return how a convolution or pooling finds its pads: NOTSET (they are given), VALID, SAME_UPPER or SAME_LOWER."""
    attribute = node.attributes.get("auto_pad")
    return "NOTSET" if attribute is None else attribute.as_string()
