"""Layers on integers, as kernels of devices compute them: products, sums in 32 bits, requantization.

Everything here is exact: products of 8-bit integers are added by float64 BLAS, whose sums of integers below 2^53 are
integers, and wrapped to 32 bits as hardware does. Nothing here knows about graphs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from qcore.numerics.affine import IntDtype, Integers

Sums = NDArray[np.int64]
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Integers as a file holds them and their zero point: () for the whole tensor, or (channels,) of weights."""

    values: Integers
    zero: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a convolution looks at its input, one entry per spatial axis; all as in ONNX Conv-11."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]


def matmul_sums(a: Stored, b: Stored, *, saturate_pairs: bool = False) -> Sums:
    """Return the sums of products `(a - zero) @ (b - zero)`: int32, in int64 where an operand has 16 bits.

    Args:
        a: (..., m, k), one zero point.
        b: (..., k, n), or (k, n) with (n,) zero points.
        saturate_pairs: add neighbours along k as `lost_in_pairs` says; then b is (k, n).

    Source: ONNX MatMulInteger-10, QLinearMatMul-10.
    """
    exact = np.matmul(_centred(a), b.values.astype(np.float64) - b.zero)
    sums = np.rint(exact).astype(np.int64)
    if saturate_pairs:
        rows = a.values.reshape(-1, a.values.shape[-1])
        sums += lost_in_pairs(rows, b.values).reshape(sums.shape)
    return _wrapped(sums, a, b)


def conv_sums(x: Stored, w: Stored, geometry: Geometry, groups: int, *, saturate_pairs: bool = False) -> Sums:
    """Return the sums of a convolution, (n, outputs, ...): int32, in int64 where an operand has 16 bits.

    Args:
        x: (n, channels, ...), one zero point, which is also what pads hold.
        w: (outputs, channels / groups, ...), zero point () or (outputs,).
        geometry: of the convolution.
        groups: of the convolution.
        saturate_pairs: add neighbours as `lost_in_pairs` says, along (taps, channels of the group), channels innermost.
            Depthwise layers (one channel in and out per group) have kernels of their own, which add in 32 bits.

    Source: ONNX ConvInteger-10, QLinearConv-10.
    """
    seen = _windows(x, geometry)
    per_group, outputs = w.values.shape[1], w.values.shape[0]
    centred = w.values.astype(np.float64) - w.zero.reshape(-1, *[1] * (w.values.ndim - 1))
    if per_group == 1 and not saturate_pairs:
        return _wrapped(_depthwise(seen, x, centred, outputs // groups), x, w)
    taps, out = len(geometry.kernel), outputs // groups
    # (n, channels, *positions, *kernel) -> (n, *positions, *kernel, channels): what is added stands in order
    order = (0, *range(2, 2 + 2 * taps), 1)
    parts = []
    for g in range(groups):
        part = seen[:, g * per_group : (g + 1) * per_group].transpose(order)
        rows = part.reshape(np.prod(part.shape[: 1 + taps], dtype=int), -1)
        chosen = slice(g * out, (g + 1) * out)
        sums = np.rint((rows.astype(np.float64) - x.zero) @ _columns(centred[chosen])).astype(np.int64)
        if saturate_pairs and (per_group, out) != (1, 1):
            sums += lost_in_pairs(rows, _columns(w.values[chosen]))
        parts.append(sums.reshape(*part.shape[: 1 + taps], out))
    return _wrapped(np.moveaxis(np.concatenate(parts, axis=-1), -1, 1), x, w)


def lost_in_pairs(a: Integers, b: Integers) -> Sums:
    """Return what `a @ b` changes by, (m, n), where sums of two neighbouring products saturate in 16 bits.

    `pmaddubsw` multiplies uint8 by int8, adds the products 0 and 1, 2 and 3 ... along k and saturates each sum at
    int16; an odd k is filled with zeros. That is what x86 kernels do that have no VNNI. The integers go in as stored,
    zero points included; those are corrected for afterwards, in 32 bits. int8 activations are moved up by 128 first.

    The order of k is that of ONNX Runtime 1.32's AVX2 kernels, to the bit (docs/benchmarks.md); other kernels may pair
    other products, and then lose other sums of about the same size.

    Args:
        a: (m, k) uint8 or int8, activations.
        b: (k, n) int8, weights.

    Source: Intel 64 and IA-32 manual, volume 2, PMADDUBSW; onnxruntime, MLAS, QgemmU8S8KernelAvx2.
    """
    rows = a.astype(np.int32) + (128 if a.dtype == np.int8 else 0)
    columns = b.astype(np.int32)
    if rows.shape[1] % 2:
        rows, columns = np.pad(rows, ((0, 0), (0, 1))), np.pad(columns, ((0, 1), (0, 0)))
    most = rows.max(axis=0, initial=0)[:, None]
    high, low = (f(columns, 0) * most for f in (np.maximum, np.minimum))
    possible = (high[0::2] + high[1::2] > _INT16.max) | (low[0::2] + low[1::2] < _INT16.min)
    lost = np.zeros((len(rows), columns.shape[1]), np.int64)
    for pair in np.flatnonzero(possible.any(axis=1)):
        at = np.flatnonzero(possible[pair])
        sums = rows[:, 2 * pair : 2 * pair + 2] @ columns[2 * pair : 2 * pair + 2, at]
        lost[:, at] += np.clip(sums, _INT16.min, _INT16.max) - sums
    return lost


def requantize(sums: Sums, multiplier: NDArray[np.float32], zero: int, dtype: IntDtype) -> Integers:
    """Return `saturate(round(sums * multiplier) + zero)` in `dtype`, half to even, products in float32.

    Args:
        sums: int32 values.
        multiplier: input scale x weight scale / output scale, in float32; of a shape that broadcasts.
        zero: zero point of the output.
        dtype: of the output.

    Source: ONNX QLinearConv-10, QLinearMatMul-10.
    """
    info = np.iinfo(dtype)
    scaled = np.rint(sums.astype(np.float32) * multiplier).astype(np.float64) + zero
    result: Integers = np.clip(scaled, info.min, info.max).astype(dtype)
    return result


def _centred(x: Stored) -> NDArray[np.float64]:
    return x.values.astype(np.float64) - x.zero


def _columns(w: NDArray[Any]) -> NDArray[Any]:
    """Return weights (outputs, channels, *kernel) as (*kernel x channels, outputs)."""
    columns: NDArray[Any] = np.moveaxis(w, 1, -1).reshape(len(w), -1).T
    return columns


def _wrapped(sums: Sums, *operands: Stored) -> Sums:
    """Return the sums as 32 bits hold them; integers of 16 bits are added in 64."""
    if any(o.values.dtype.itemsize > 1 for o in operands):
        return sums
    return sums.astype(np.int32).astype(np.int64)


def _windows(x: Stored, g: Geometry) -> Integers:
    """Return what every output sees, (n, channels, *positions, *kernel): a view of the padded input."""
    padded = np.pad(x.values, ((0, 0), (0, 0), *g.pads), constant_values=x.values.dtype.type(x.zero))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(g.kernel, g.dilations, strict=True))
    axes = tuple(range(2, padded.ndim))
    seen = sliding_window_view(padded, reach, axis=axes)
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in (*g.strides, *g.dilations)))
    result: Integers = seen[steps]
    return result


def _depthwise(seen: Integers, x: Stored, w: NDArray[np.float64], multiple: int) -> Sums:
    """Return the sums of a convolution with one channel per group, tap by tap."""
    spatial = w.ndim - 2
    shape = (*seen.shape[:1], len(w), *seen.shape[2 : 2 + spatial])
    sums = np.zeros(shape, np.int64)
    for tap in np.ndindex(*w.shape[2:]):
        values = seen[(..., *tap)].astype(np.int64) - x.zero
        values = values if multiple == 1 else np.repeat(values, multiple, axis=1)
        sums += values * w[(slice(None), 0, *tap)].astype(np.int64).reshape(-1, *[1] * spatial)
    return sums
