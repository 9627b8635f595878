"""Affine quantization: which scale and zero point, and the integer values that follow from them.

The arithmetic is that of ONNX QuantizeLinear / DequantizeLinear (opset 13): `q = saturate(round(x / scale) + zero)`
with round half to even, and `x = (q - zero) * scale`. Nothing here knows about graphs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating]
Integers = NDArray[np.signedinteger | np.unsignedinteger]
Levels = Literal["uint8", "int8", "uint16", "int16", "int4"]
IntDtype = Literal["uint8", "int8", "uint16", "int16", "int4", "int32"]

TINY_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True, slots=True)
class QScheme:
    """How a tensor is quantized.

    `bits` may be less than the width of `dtype`, which is the default: the values then use only `2**bits` levels of
    the container. `symmetric` puts zero in the middle of the container (zero point 0 for signed dtypes, 128 for uint8)
    and leaves out the lowest level, so that the range is its own mirror. `axis` is the channel axis of per-channel
    quantization, None for one scale per tensor. `power_of_two` rounds scales up to a power of two, so that nothing
    saturates that fitted.
    """

    dtype: Levels
    bits: int | None = None
    symmetric: bool = False
    axis: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        """Hold 2 <= bits <= width of dtype."""
        if not 2 <= self.width <= container_bits(self.dtype):
            raise ValueError(f"bits is {self.bits}; allowed: 2 to {container_bits(self.dtype)} for {self.dtype}")

    @property
    def width(self) -> int:
        """The bits that are used."""
        return container_bits(self.dtype) if self.bits is None else self.bits

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and highest integer value."""
        half = 1 << (self.width - 1)
        middle = 0 if self.dtype.startswith("int") else half
        if self.symmetric and middle:
            middle = 1 << (container_bits(self.dtype) - 1)
        low, high = middle - half, middle + half - 1
        return (low + 1, high) if self.symmetric else (low, high)


@dataclass(frozen=True, kw_only=True, slots=True)
class QParams:
    """The result of deciding: `scale` float32 and `zero_point` int32, both () or (channels,); `axis` as in ONNX.

    Every scale is positive and finite. `qmin` and `qmax` are the levels that saturate.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    dtype: IntDtype
    qmin: int
    qmax: int
    axis: int | None = None


def container_bits(dtype: IntDtype) -> int:
    """Return the width of an integer dtype in bits."""
    return int(dtype.removeprefix("u").removeprefix("int"))


def qparams_from_range(low: Float, high: Float, scheme: QScheme) -> QParams:
    """Return the scale and zero point that cover [low, high], widened to hold 0.

    Args:
        low: smallest value, () or (channels,); same shape as `high`.
        high: largest value, at least `low`.
        scheme: dtype, bits, symmetry, axis.

    Raises:
        ValueError: a bound is not finite, or high < low.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 2.1 and eq. 3; zero is exactly representable.
    """
    lo = np.minimum(np.asarray(low, np.float64), 0.0)
    hi = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()) or (np.asarray(high) < np.asarray(low)).any():
        raise ValueError(f"range is [{low}, {high}]; allowed: finite, low <= high")
    qmin, qmax = scheme.levels
    if scheme.symmetric:
        scale = np.maximum(-lo, hi) / ((qmax - qmin) // 2)
        zero = np.full_like(scale, (qmax + qmin) // 2)
    else:
        scale = (hi - lo) / (qmax - qmin)
        zero = None
    if scheme.power_of_two:
        scale = np.exp2(np.ceil(np.log2(np.maximum(scale, TINY_SCALE))))
    stored = np.where(scale <= TINY_SCALE, 1.0, scale).astype(np.float32)  # an all-zero tensor keeps its zeros
    if zero is None:
        # From the rounded float32 scale: `scale * (q - zero)` must reproduce low as closely as the runtime can.
        zero = np.clip(np.rint(qmin - lo / stored.astype(np.float64)), qmin, qmax)
    return QParams(
        scale=stored,
        zero_point=np.asarray(zero).astype(np.int32),
        dtype=scheme.dtype,
        qmin=qmin,
        qmax=qmax,
        axis=scheme.axis,
    )


def quantize_array(x: Float, q: QParams) -> Integers:
    """Return `x` in integers of dtype `q.dtype`, same shape: round half to even, then saturate at qmin and qmax.

    numpy has no int4; those values come as int8.
    """
    scale, zero = _along_axis(x.ndim, q)
    # Divide in float32 as the runtimes do, so that ties fall on the same side.
    scaled = np.rint(np.asarray(x, np.float32) / scale)
    result: Integers = np.clip(scaled.astype(np.float64) + zero, q.qmin, q.qmax).astype(
        "int8" if q.dtype == "int4" else q.dtype
    )
    return result


def dequantize_array(x_q: Integers, q: QParams) -> NDArray[np.float32]:
    """Return `(x_q - zero_point) * scale` in float32, same shape."""
    scale, zero = _along_axis(x_q.ndim, q)
    result: NDArray[np.float32] = ((x_q.astype(np.int64) - zero).astype(np.float32) * scale).astype(np.float32)
    return result


def channel_range(w: Float, axis: int) -> tuple[Float, Float]:
    """Return the smallest and largest value of each channel: two arrays (w.shape[axis],)."""
    others = tuple(i for i in range(w.ndim) if i != axis)
    return w.min(axis=others), w.max(axis=others)


def _along_axis(ndim: int, q: QParams) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    if q.axis is None:
        return q.scale, q.zero_point
    shape = [1] * ndim
    shape[q.axis] = -1
    return q.scale.reshape(shape), q.zero_point.reshape(shape)
