"""QuantizeLinear and its reverse, with gradients.

Rounding passes gradients on unchanged (the straight-through estimator); saturation passes none. The quotient by the
scale is an ordinary division, so a scale that is trained gets the gradient of learned step sizes.

Source: Bengio et al. 2013 (arXiv 1308.3432); Esser et al. 2020 (arXiv 1902.08153) eq. 3; ONNX QuantizeLinear-25.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported, carrier
from qcore.training.tensors import INTEGER_RANGES


class _Round(torch.autograd.Function):
    """Rounding half to even whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return `x` rounded half to even."""
        del ctx  # nothing is kept
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient as it came."""
        del ctx  # nothing was kept
        return gradients[0]


def round_straight_through(x: Tensor) -> Tensor:
    """Return `x` rounded half to even; the gradient is that of the identity."""
    rounded: Tensor = _Round.apply(x)
    return rounded


def quantize_linear(node: OpNode) -> Function:
    """Build QuantizeLinear-25 to integers: per tensor, along an axis, or in blocks.

    Raises:
        Unsupported: the result is not an integer of 4, 8 or 16 bits, or a precision is asked for.
    """
    axis, block, target = node.integer("axis", 1), node.integer("block_size"), _target(node)
    low, high = INTEGER_RANGES[target]
    dtype = carrier(target)
    if node.integer("precision"):
        raise Unsupported("the attribute precision")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        scale = _spread(scale, x, axis, block)
        y = round_straight_through(x.to(scale.dtype) / scale)
        if zero is not None:
            y = y + _spread(zero, x, axis, block).to(y.dtype)
        return torch.clamp(y, low, high)

    return (lambda *tensors: run(*tensors).to(dtype)) if node.carries_integers else run


def dequantize_linear(node: OpNode) -> Function:
    """Build DequantizeLinear-25 of integers: (x - zero) * scale, in the type of the scale or `output_dtype`."""
    axis, block = node.integer("axis", 1), node.integer("block_size")
    output = node.integer("output_dtype")
    dtype = carrier(ir.DataType(output)) if output else None

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        spread = _spread(scale, x, axis, block)
        y = x.to(spread.dtype)
        if zero is not None:
            y = y - _spread(zero, x, axis, block).to(spread.dtype)
        return (y * spread).to(dtype or spread.dtype)

    return run


def dynamic_quantize_linear(node: OpNode) -> Function:
    """Build DynamicQuantizeLinear-11: to uint8 with the range of the input, widened to hold 0."""
    del node  # it has no attributes

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
        scale = (high - low) / 255.0
        zero = torch.round(-low / scale).clamp(0, 255)
        y = (torch.round(x / scale) + zero).clamp(0, 255)
        return y.to(torch.uint8), scale, zero.to(torch.uint8)

    return run


def _target(node: OpNode) -> ir.DataType:
    asked = node.integer("output_dtype")
    target = ir.DataType(asked) if asked else node.input_type(2) or ir.DataType.UINT8
    if target not in INTEGER_RANGES or target == ir.DataType.INT32:
        raise Unsupported(f"quantization to {target.name}")
    return target


def _spread(parameters: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Return scales or zero points in a shape that broadcasts to `x`."""
    if parameters.dim() == 0:
        return parameters
    if block:
        return parameters.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameters.dim() == 1:
        return parameters if parameters.numel() == 1 else parameters.reshape(_along(axis, x.dim()))
    return parameters


def _along(axis: int, rank: int) -> list[int]:
    return [-1 if a == axis % rank else 1 for a in range(rank)]


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "DequantizeLinear": dequantize_linear,
        "DynamicQuantizeLinear": dynamic_quantize_linear,
        "QuantizeLinear": quantize_linear,
    }
)
