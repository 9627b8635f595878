"""Operators that choose elements: slices, gathers, scatters, masks."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, number

_REDUCE: Mapping[str, str] = MappingProxyType({"add": "sum", "mul": "prod", "max": "amax", "min": "amin"})


def slices(node: OpNode) -> Function:
    """Build Slice-13: starts and ends count from the end where negative and are held inside the input."""
    del node  # it has no attributes

    def run(
        x: Tensor, starts: list[int], ends: list[int], axes: list[int] | None = None, steps: list[int] | None = None
    ) -> Tensor:
        picked: list[slice] = [slice(None)] * x.dim()
        for i, axis in enumerate(range(len(starts)) if axes is None else axes):
            step = 1 if steps is None else steps[i]
            if step > 0:
                picked[axis] = slice(starts[i], ends[i], step)
            else:
                places = torch.arange(x.shape[axis], device=x.device)[
                    _backwards(x.shape[axis], starts[i], ends[i], step)
                ]
                x = x.index_select(axis, places.flip(0))
        return x[tuple(picked)]

    return run


def _backwards(side: int, start: int, end: int, step: int) -> slice:
    """Return the slice that visits, in rising order, what a slice with the negative `step` visits in falling order."""
    visited = range(side)[slice(start, end if end >= -side else None, step)]
    if not visited:
        return slice(0, 0)
    return slice(visited[-1], visited[0] + 1, -step)


def gather(node: OpNode) -> Function:
    """Build Gather-13 along `axis`; negative indices count from the end."""
    axis, index = node.integer("axis"), node.constant(1)
    if index is not None and index.dim() == 0:
        place = int(index)
        return lambda x, _: x.select(axis, place)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.dim()
        flat = _counted_from_start(indices, x.shape[at]).reshape(-1)
        return x.index_select(at, flat).reshape(x.shape[:at] + indices.shape + x.shape[at + 1 :])

    return run


def _counted_from_start(indices: Tensor, side: int) -> Tensor:
    return torch.where(indices < 0, indices + side, indices).long()


def gather_elements(node: OpNode) -> Function:
    """Build GatherElements-13 along `axis`."""
    axis = node.integer("axis")
    return lambda x, indices: torch.gather(x, axis, _counted_from_start(indices, x.shape[axis]))


def gather_nd(node: OpNode) -> Function:
    """Build GatherND-13: the last axis of the indices addresses the axes behind the first `batch_dims`."""
    batch_dims = node.integer("batch_dims")

    def run(x: Tensor, indices: Tensor) -> Tensor:
        address: list[Tensor] = []
        for axis in range(batch_dims):
            places = torch.arange(x.shape[axis], device=x.device)
            address.append(places.reshape([-1 if a == axis else 1 for a in range(indices.dim() - 1)]))
        address += list(indices.long().unbind(-1))
        return x[tuple(address)]

    return run


def scatter_elements(node: OpNode) -> Function:
    """Build ScatterElements-18 along `axis`; repeated indices are combined by `reduction`."""
    axis, how = node.integer("axis"), node.choice("reduction", ("none", "add", "mul", "max", "min"))

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = _counted_from_start(indices, x.shape[axis])
        if how == "none":
            return x.scatter(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, _REDUCE[how])

    return run


def scatter_nd(node: OpNode) -> Function:
    """Build ScatterND-18; repeated indices are combined by `reduction`."""
    how = node.choice("reduction", ("none", "add", "mul", "max", "min"))

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
        for axis in range(depth):
            flat = flat * x.shape[axis] + _counted_from_start(indices[..., axis], x.shape[axis])
        rows = x.reshape(-1, x.shape[depth:].numel())
        news = updates.reshape(-1, rows.shape[1])
        places = flat.reshape(-1, 1).expand_as(news)
        if how == "none":
            return rows.scatter(0, places, news).reshape(x.shape)
        return rows.scatter_reduce(0, places, news, _REDUCE[how]).reshape(x.shape)

    return run


def one_hot(node: OpNode) -> Function:
    """Build OneHot-11: values[1] at the index along a new `axis`, else values[0]."""
    axis = node.integer("axis", -1)

    def run(indices: Tensor, depth: float | list[float], values: Tensor) -> Tensor:
        side = int(number(depth))
        at = axis % (indices.dim() + 1)
        places = torch.arange(side, device=indices.device).reshape(-1, *(1,) * (indices.dim() - at))
        hot = _counted_from_start(indices, side).unsqueeze(at) == places
        return torch.where(hot, values[1], values[0])

    return run


def trilu(node: OpNode) -> Function:
    """Build Trilu-14: the upper or lower triangle from the k-th diagonal on."""
    function = torch.triu if node.integer("upper", 1) else torch.tril

    def run(x: Tensor, k: float | list[float] | None = None) -> Tensor:
        diagonal = 0 if k is None else int(number(k))
        return function(x, diagonal) if x.numel() else x

    return run


def nonzero(node: OpNode) -> Function:
    """Build NonZero-13: one column for each element that is not zero; its shape depends on data."""
    del node  # it has no attributes
    return lambda x: torch.nonzero(x).transpose(0, 1)


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "Gather": gather,
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "NonZero": nonzero,
        "OneHot": one_hot,
        "ScatterElements": scatter_elements,
        "ScatterND": scatter_nd,
        "Slice": slices,
        "Trilu": trilu,
    }
)
