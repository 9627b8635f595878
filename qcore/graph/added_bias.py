"""The bias of a MatMul that is the constant operand of the Add behind it, as linear layers are exported.

In a QDQ graph Q/DQ pairs may stand between the two, and the constant may be integers with parameters of its own: those
of an activation, one scale for all values.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer
from qcore.graph.qdq import is_dequantize, is_quantize
from qcore.graph.traverse import constant_array, is_vector, node_name, only_consumer
from qcore.numerics.affine import (
    Float,
    Levels,
    QParams,
    QScheme,
    container_bits,
    dequantize_array,
    qparams_from_range,
    quantize_array,
)

_LEVELS: tuple[Levels, ...] = ("uint8", "int8", "uint16", "int16")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedBias:
    """The bias of a MatMul: the Add, and which of its inputs is the constant."""

    node: ir.Node
    index: int

    @property
    def operand(self) -> ir.Value:
        """What the Add reads: a float constant, or the output of a DequantizeLinear."""
        value = self.node.inputs[self.index]
        assert value is not None  # noqa: S101 - added_bias has looked
        return value

    @property
    def array(self) -> NDArray[np.float32]:
        """The numbers that are added, in the shape of the constant."""
        return _numbers(self.operand)


def added_bias(node: ir.Node, outputs: int) -> AddedBias | str:
    """Return the bias that an Add gives the result of the MatMul `node`, or why there is none.

    Args:
        node: with constant weights, in a float or a QDQ graph.
        outputs: the number of output channels.
    """
    value = node.outputs[0]
    while (reader := only_consumer(value)) is not None and (is_quantize(reader) or is_dequantize(reader)):
        value = reader.outputs[0]
    if reader is None or reader.op_type != "Add" or reader.domain != "":
        return "no Add behind it holds a bias"
    index = 1 if reader.inputs[0] is value else 0
    operand = reader.inputs[index]
    stored = _stored(operand)
    if operand is None or stored is None or operand.is_graph_output():
        return "what is added to it is not a constant"
    if not is_vector(stored, outputs) or not _is_plain(operand):
        return "what is added to it is not one float value per output channel"
    return AddedBias(node=reader, index=index)


def replace_added_bias(bias: AddedBias, new: Float) -> dict[ir.Value, NDArray[np.generic]]:
    """Return what the initializers of `bias` must become for it to be `new` (outputs,), none where it cannot be.

    Integers keep their parameters where these hold the new values, and get wider ones of the same form where they do
    not. Parameters that the Add demands of all its tensors stay as they are.
    """
    source = bias.operand.producer()
    if source is None or not is_dequantize(source):
        return {bias.operand: new.reshape(bias.array.shape).astype(np.float32)}
    q = _parameters(source)
    if not _holds(q, new):
        if _is_shared(bias, q):
            return {}
        q = qparams_from_range(np.asarray(new.min()), np.asarray(new.max()), _scheme(q))
    stored, scale, zero = source.inputs[:3]
    assert stored is not None and scale is not None and zero is not None  # noqa: S101, PT018 - _is_plain has looked
    old_scale, old_zero = constant_array(scale), constant_array(zero)
    assert old_scale is not None and old_zero is not None  # noqa: S101, PT018
    return {
        stored: quantize_array(new.reshape(bias.array.shape).astype(np.float32), q),
        scale: q.scale.reshape(old_scale.shape),
        zero: q.zero_point.astype(old_zero.dtype).reshape(old_zero.shape),
    }


def own_constant(graph: ir.Graph, node: ir.Node, index: int) -> None:
    """Give input `index` of `node` an initializer of its own if others read the same float constant."""
    value = node.inputs[index]
    array = constant_array(value)
    if value is not None and array is not None and len(value.uses()) > 1:
        node.replace_input_with(index, add_initializer(graph, f"{node_name(node)}.bias", array))


def _stored(operand: ir.Value | None) -> NDArray[np.generic] | None:
    source = operand.producer() if operand is not None else None
    return constant_array(source.inputs[0] if source is not None and is_dequantize(source) else operand)


def _is_plain(operand: ir.Value) -> bool:
    """Say whether `operand` is float32, or integers of one scale that nobody else reads."""
    source = operand.producer()
    if source is None or not is_dequantize(source):
        array = constant_array(operand)
        return array is not None and array.dtype == np.float32
    arrays = [constant_array(v) for v in source.inputs]
    parameters = [a for a in arrays[1:] if a is not None]
    return (
        len(parameters) == 2
        and all(a.size == 1 for a in parameters)
        and arrays[0] is not None
        and str(arrays[0].dtype) in _LEVELS
        and all(v is not None and len(v.uses()) == 1 for v in (operand, *source.inputs))
    )


def _numbers(operand: ir.Value) -> NDArray[np.float32]:
    source, stored = operand.producer(), _stored(operand)
    assert stored is not None  # noqa: S101 - added_bias has looked
    if source is None or not is_dequantize(source):
        return stored.astype(np.float32, copy=False)
    q = _parameters(source)
    return dequantize_array(stored.astype(q.dtype, copy=False), q)


def _parameters(source: ir.Node) -> QParams:
    """Return the parameters of a DequantizeLinear that `_is_plain` has let through."""
    scale, zero = constant_array(source.inputs[1]), constant_array(source.inputs[2])
    assert scale is not None and zero is not None  # noqa: S101, PT018
    dtype = next(d for d in _LEVELS if d == str(zero.dtype))
    low, high = QScheme(dtype=dtype).levels
    return QParams(
        scale=scale.reshape(()).astype(np.float32),
        zero_point=zero.reshape(()).astype(np.int32),
        dtype=dtype,
        qmin=low,
        qmax=high,
    )


def _scheme(q: QParams) -> QScheme:
    """Return the scheme that `q` seems to follow: what a device demands of it can be seen in its numbers."""
    dtype = next(d for d in _LEVELS if d == q.dtype)
    middle = 0 if dtype.startswith("int") else 1 << (container_bits(dtype) - 1)
    return QScheme(dtype=dtype, symmetric=int(q.zero_point) == middle, power_of_two=bool(np.frexp(q.scale)[0] == 0.5))


def _holds(q: QParams, new: Float) -> bool:
    levels = np.rint(new.astype(np.float64) / float(q.scale)) + int(q.zero_point)
    low, high = _scheme(q).levels
    return bool(levels.min() >= low and levels.max() <= high)


def _is_shared(bias: AddedBias, q: QParams) -> bool:
    """Say whether another tensor of the Add has the parameters `q`, as where a device wants one scale for all."""
    other = bias.node.inputs[1 - bias.index]
    before, after = other.producer() if other is not None else None, only_consumer(bias.node.outputs[0])
    near = [n for n in (before if is_dequantize(before) else None, after if is_quantize(after) else None) if n]
    pairs = [(constant_array(n.inputs[1]), constant_array(n.inputs[2]) if len(n.inputs) > 2 else None) for n in near]
    return any(s is not None and z is not None and s == q.scale and z == q.zero_point for s, z in pairs)
