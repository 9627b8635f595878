"""Resize, as one sparse linear map for each axis that changes; nearest is a choice of elements.

Source: ONNX Resize-19 and its reference implementation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from numpy.typing import NDArray
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported

_Floats = NDArray[np.float64]
_COORDINATES = ("half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric", "pytorch_half_pixel")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """The attributes of one Resize node."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    antialias: bool
    exclude_outside: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """One axis that is resized: which, its old and new length, and the scale that coordinates are computed with."""

    axis: int
    old: int
    new: int
    scale: float


def resize(node: OpNode) -> Function:
    """Build Resize-19 of any rank: nearest, linear and cubic.

    Raises:
        Unsupported: coordinates of tf_crop_and_resize, which crop by a region of interest.
    """
    rule = _Rule(
        mode=node.choice("mode", ("nearest", "linear", "cubic")),
        coordinates=node.choice("coordinate_transformation_mode", _COORDINATES),
        nearest=node.choice("nearest_mode", ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
        cubic_a=node.real("cubic_coeff_a", -0.75),
        antialias=bool(node.integer("antialias")),
        exclude_outside=bool(node.integer("exclude_outside")),
    )
    if rule.mode == "nearest" and rule.antialias:
        raise Unsupported("antialias with mode nearest")
    policy = node.choice("keep_aspect_ratio_policy", ("stretch", "not_larger", "not_smaller"))
    given = node.integers("axes")

    def run(x: Tensor, roi: object = None, scales: list[float] | None = None, sizes: list[int] | None = None) -> Tensor:
        del roi  # only tf_crop_and_resize looks at it
        axes = [axis % x.dim() for axis in given] if given is not None else list(range(x.dim()))
        changes = _by_sizes(x, axes, sizes, policy) if sizes else _by_scales(x, axes, scales or [])
        changes = [c for c in changes if not (c.old == c.new and math.isclose(c.scale, 1.0))]
        if _is_bilinear(x, changes, rule):
            size = [c.new for c in changes]
            return F.interpolate(x, size=size, mode="bilinear", align_corners=rule.coordinates == "align_corners")
        for change in changes:
            x = _resized(x, change, rule)
        return x

    return run


def _by_sizes(x: Tensor, axes: list[int], sizes: list[int], policy: str) -> list[_Axis]:
    scales = [size / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
    if policy != "stretch":
        scale = min(scales) if policy == "not_larger" else max(scales)
        scales = [scale] * len(axes)
        sizes = [int(scale * x.shape[axis] + 0.5) for axis in axes]
    return [
        _Axis(axis=axis, old=x.shape[axis], new=size, scale=scale)
        for axis, size, scale in zip(axes, sizes, scales, strict=True)
    ]


def _by_scales(x: Tensor, axes: list[int], scales: list[float]) -> list[_Axis]:
    return [
        _Axis(axis=axis, old=x.shape[axis], new=int(scale * x.shape[axis]), scale=scale)
        for axis, scale in zip(axes, scales, strict=True)
    ]


def _is_bilinear(x: Tensor, changes: list[_Axis], rule: _Rule) -> bool:
    """Say whether torch's own bilinear kernel does the same: both image axes, and scales that match the sizes."""
    return (
        rule.mode == "linear"
        and rule.coordinates in ("half_pixel", "align_corners")
        and not (rule.antialias or rule.exclude_outside)
        and x.dim() == 4
        and [c.axis for c in changes] == [2, 3]
        and all(c.new == c.scale * c.old for c in changes)
    )


def _resized(x: Tensor, change: _Axis, rule: _Rule) -> Tensor:
    places = _places(change, rule.coordinates)
    if rule.mode == "nearest":
        chosen = torch.from_numpy(_nearest(places, rule.nearest).clip(0, change.old - 1).astype(np.int64))
        return x.index_select(change.axis, chosen.to(x.device))
    matrix = torch.from_numpy(_matrix(change, rule)).to(device=x.device, dtype=x.dtype)
    return torch.movedim(torch.movedim(x, change.axis, -1) @ matrix.T, -1, change.axis)


def _places(change: _Axis, coordinates: str) -> _Floats:
    """Return where the new elements lie in the old axis: (new,)."""
    y = np.arange(change.new, dtype=np.float64)
    width = change.scale * change.old
    match coordinates:
        case "align_corners":
            return y * 0.0 if width == 1 else y * (change.old - 1) / (width - 1)
        case "asymmetric":
            return y / change.scale
        case "pytorch_half_pixel" if width == 1:
            return y * 0.0 - 0.5
        case "half_pixel_symmetric":
            offset = change.old / 2 * (1 - change.new / width)
            return offset + (y + 0.5) / change.scale - 0.5
        case _:
            return (y + 0.5) / change.scale - 0.5


def _nearest(places: _Floats, how: str) -> _Floats:
    match how:
        case "round_prefer_floor":
            return np.ceil(places - 0.5)
        case "round_prefer_ceil":
            return np.floor(places + 0.5)
        case "floor":
            return np.floor(places)
        case _:
            return np.ceil(places)


@lru_cache(maxsize=64)
def _matrix(change: _Axis, rule: _Rule) -> _Floats:
    """Return the weights of the old elements in the new ones: (new, old)."""
    places = _places(change, rule.coordinates)
    shrink = min(change.scale, 1.0) if rule.antialias else 1.0
    reach = math.ceil((1 if rule.mode == "linear" else 2) / shrink) + 1
    neighbours = np.floor(places).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)
    distance = np.abs(neighbours - places[:, None]) * shrink
    weights = np.clip(1 - distance, 0, None) if rule.mode == "linear" else _cubic(distance, rule.cubic_a)
    if rule.exclude_outside:
        weights = np.where((neighbours < 0) | (neighbours >= change.old), 0.0, weights)
    if rule.antialias or rule.exclude_outside:
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    matrix = np.zeros((change.new, change.old))
    rows = np.broadcast_to(np.arange(change.new)[:, None], neighbours.shape)
    np.add.at(matrix, (rows, neighbours.clip(0, change.old - 1)), weights)
    return matrix


def _cubic(d: _Floats, a: float) -> _Floats:
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


OPERATORS: Mapping[str, OpFunction] = MappingProxyType({"Resize": resize})
