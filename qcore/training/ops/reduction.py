"""Operators that reduce, accumulate or order along axes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, number

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def reduction(function: Reduce, inputs_since: int) -> OpFunction:
    """Return the operator function of a reduction; its axes are an attribute before opset `inputs_since`."""

    def build(node: OpNode) -> Function:
        keep, nothing = bool(node.integer("keepdims", 1)), bool(node.integer("noop_with_empty_axes"))
        attribute = node.integers("axes") if node.opset < inputs_since else None

        def run(x: Tensor, axes: list[int] | None = None) -> Tensor:
            found = axes or attribute
            if not found:
                if nothing:
                    return function(x.unsqueeze(0), [0], False)
                found = list(range(x.dim()))
            return function(x, found, keep) if x.dim() else function(x.unsqueeze(0), [0], False)

        return run

    return build


def sum_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the sum over `axes`, in the type of `x`."""
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def mean_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the mean over `axes`, in the type of `x`."""
    return torch.mean(x, axes, keepdim=keep) if x.is_floating_point() else _integer_mean(x, axes, keep)


def _integer_mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.mean(x.to(torch.float64), axes, keepdim=keep).to(x.dtype)


def product_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the product over `axes`, in the type of `x`."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def max_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the maximum over `axes`; the lowest value of the type where there is nothing to reduce."""
    if _is_empty(x, axes):
        return _empty_reduced(x, axes, keep, -torch.inf if x.is_floating_point() else _limits(x)[0])
    return torch.amax(x, axes, keepdim=keep)


def min_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the minimum over `axes`; the highest value of the type where there is nothing to reduce."""
    if _is_empty(x, axes):
        return _empty_reduced(x, axes, keep, torch.inf if x.is_floating_point() else _limits(x)[1])
    return torch.amin(x, axes, keepdim=keep)


def _is_empty(x: Tensor, axes: list[int]) -> bool:
    return any(x.shape[axis] == 0 for axis in axes)


def _empty_reduced(x: Tensor, axes: list[int], keep: bool, value: float) -> Tensor:
    return torch.full_like(torch.sum(x, axes, keepdim=keep, dtype=x.dtype), value)


def _limits(x: Tensor) -> tuple[int, int]:
    if x.dtype == torch.bool:
        return 0, 1
    info = torch.iinfo(x.dtype)
    return int(info.min), int(info.max)


def l1_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the sum of absolute values over `axes`."""
    return sum_over(x.abs(), axes, keep)


def l2_over(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the square root of the sum of squares over `axes`; its gradient at 0 is 0."""
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
    return torch.sqrt(sum_of_squares(x.to(torch.float64), axes, keep)).to(x.dtype)


def log_of_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the logarithm of the sum over `axes`."""
    return torch.log(sum_over(x, axes, keep))


def log_of_sum_of_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the logarithm of the sum of exponentials over `axes`."""
    return torch.logsumexp(x, axes, keepdim=keep)


def sum_of_squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the sum of squares over `axes`."""
    return sum_over(x * x, axes, keep)


def arg_of(function: Function) -> OpFunction:
    """Return the operator function of ArgMax-13 or ArgMin-13: the first such position, or the last."""

    def build(node: OpNode) -> Function:
        axis, keep, last = (
            node.integer("axis"),
            bool(node.integer("keepdims", 1)),
            bool(node.integer("select_last_index")),
        )

        def run(x: Tensor) -> Tensor:
            if last:
                return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
            return function(x, axis, keep)

        return run

    return build


def accumulation(function: Function, neutral: float) -> OpFunction:
    """Return the operator function of CumSum-14 or CumProd-26 along the axis in the second input."""

    def build(node: OpNode) -> Function:
        exclusive, reverse = bool(node.integer("exclusive")), bool(node.integer("reverse"))

        def run(x: Tensor, axes: float | list[float]) -> Tensor:
            axis = int(number(axes))
            x = x.flip(axis) if reverse else x
            if exclusive:
                first = torch.full_like(x.narrow(axis, 0, 1), neutral)
                x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
            y = function(x, axis, dtype=x.dtype)
            return y.flip(axis) if reverse else y

        return run

    return build


def top_k(node: OpNode) -> Function:
    """Build TopK-24: the k largest or smallest, ordered; of equal values the first comes first."""
    axis, largest = node.integer("axis", -1), bool(node.integer("largest", 1))

    def run(x: Tensor, k: float | list[float]) -> tuple[Tensor, Tensor]:
        count = int(number(k))
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return run


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "ArgMax": arg_of(torch.argmax),
        "ArgMin": arg_of(torch.argmin),
        "CumProd": accumulation(torch.cumprod, 1.0),
        "CumSum": accumulation(torch.cumsum, 0.0),
        "ReduceL1": reduction(l1_over, 18),
        "ReduceL2": reduction(l2_over, 18),
        "ReduceLogSum": reduction(log_of_sum, 18),
        "ReduceLogSumExp": reduction(log_of_sum_of_exp, 18),
        "ReduceMax": reduction(max_over, 18),
        "ReduceMean": reduction(mean_over, 18),
        "ReduceMin": reduction(min_over, 18),
        "ReduceProd": reduction(product_over, 18),
        "ReduceSum": reduction(sum_over, 13),
        "ReduceSumSquare": reduction(sum_of_squares, 18),
        "TopK": top_k,
    }
)
