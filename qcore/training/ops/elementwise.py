"""Operators on each element by itself: one input, two with broadcasting, or any number."""

from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported, carrier, number


def plain(function: Function) -> OpFunction:
    """Return the operator function of an operator without attributes that torch has as `function`."""
    return lambda _: function


def div(node: OpNode) -> Function:
    """Build Div-14: integers are divided towards zero."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")

    return run


def power(node: OpNode) -> Function:
    """Build Pow-15: the result has the type of the base."""
    exponent = node.constant(1)
    if exponent is not None and exponent.numel() == 1 and exponent.dim() == 0:
        number = exponent.item()

        def run_constant(a: Tensor, _: Tensor) -> Tensor:
            return torch.pow(a, number) if a.is_floating_point() else torch.pow(a, exponent.to(a.device)).to(a.dtype)

        return run_constant
    return lambda a, b: torch.pow(a, b).to(a.dtype)


def mod(node: OpNode) -> Function:
    """Build Mod-13: with fmod=1 the result has the sign of the dividend, otherwise of the divisor."""
    return torch.fmod if node.integer("fmod") else torch.remainder


def of_many(function: Callable[[Tensor, Tensor], Tensor]) -> OpFunction:
    """Return the operator function of `function` over any number of inputs, from left to right."""
    return lambda _: lambda *tensors: reduce(function, tensors)


def mean(node: OpNode) -> Function:
    """Build Mean-13 of any number of inputs."""
    return lambda *tensors: reduce(torch.add, tensors) / len(tensors)


def clip(node: OpNode) -> Function:
    """Build Clip-13: the limits are numbers; where the lower is above the upper, the upper wins.

    Between two limits it is torch's hardtanh, whose gradient costs a sixth of that of clamp (docs/benchmarks.md).
    """
    if not node.has(1) and not node.has(2):
        return lambda x, *_: x

    in_place = node.may_overwrite

    def run(x: Tensor, low: float | list[float] | None = None, high: float | list[float] | None = None) -> Tensor:
        least, most = None if low is None else number(low), None if high is None else number(high)
        if least is not None and most is not None and least <= most and x.is_floating_point():
            return F.hardtanh(x, least, most, in_place)
        return torch.clamp(x, least, most)

    return run


def is_inf(node: OpNode) -> Function:
    """Build IsInf-20."""
    match node.integer("detect_negative", 1), node.integer("detect_positive", 1):
        case 0, 0:
            return lambda x: torch.zeros_like(x, dtype=torch.bool)
        case 0, _:
            return torch.isposinf
        case _, 0:
            return torch.isneginf
        case _:
            return torch.isinf


def bitwise_not(node: OpNode) -> Function:
    """Build BitwiseNot-18 of types that torch has: a wider carrier would show more bits."""
    kind = node.input_type(0)
    if kind in (ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64):
        raise Unsupported(f"element type {kind.name}")
    return torch.bitwise_not


def bit_shift(node: OpNode) -> Function:
    """Build BitShift-11 by Y bits."""
    if node.choice("direction", ("LEFT", "RIGHT")) == "RIGHT":
        return torch.bitwise_right_shift
    return torch.bitwise_left_shift


def cast(node: OpNode) -> Function:
    """Build Cast-13 to a type that torch carries."""
    return _converter(ir.DataType(node.integer("to")), node.input_type(0))


def cast_like(node: OpNode) -> Function:
    """Build CastLike-15: to the type of the second input."""
    target = node.input_type(1)
    if target is not None:
        convert = _converter(target, node.input_type(0))
        return lambda x, _: convert(x)
    return lambda x, like: x.to(like.dtype)


def _converter(target: ir.DataType, source: ir.DataType | None) -> Callable[[Tensor], Tensor]:
    if source is not None:
        carrier(source)
    dtype = carrier(target)
    if target in (ir.DataType.INT4, ir.DataType.UINT4):
        raise Unsupported(f"a cast to {target.name}, which wraps around")
    return lambda x: x.to(dtype)


_UNARY: Mapping[str, Function] = MappingProxyType(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "Identity": lambda x: x,
        "IsNaN": torch.isnan,
        "Log": torch.log,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Reciprocal": torch.reciprocal,
        "Round": torch.round,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Sqrt": torch.sqrt,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
    }
)
_BINARY: Mapping[str, Function] = MappingProxyType(
    {
        "Add": torch.add,
        "And": torch.logical_and,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Equal": torch.eq,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Mul": torch.mul,
        "Or": torch.logical_or,
        "Sub": torch.sub,
        "Xor": torch.logical_xor,
    }
)

OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        **{name: plain(function) for name, function in {**_UNARY, **_BINARY}.items()},
        "BitShift": bit_shift,
        "BitwiseNot": bitwise_not,
        "Cast": cast,
        "CastLike": cast_like,
        "Clip": clip,
        "Div": div,
        "IsInf": is_inf,
        "Max": of_many(torch.maximum),
        "Mean": mean,
        "Min": of_many(torch.minimum),
        "Mod": mod,
        "Pow": power,
        "Sum": of_many(torch.add),
        "Where": plain(torch.where),
    }
)
