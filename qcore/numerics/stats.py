"""Mergeable statistics of a tensor: count, range, and a histogram whose merge is exact in any order.

A bin is `[i * 2**e, (i + 1) * 2**e)` for an integer i. Bins of width 2**e nest in those of 2**(e+1), so two
histograms are merged by coarsening the finer one: no value is ever moved to a bin that it does not belong to. The
exponent is a function of the whole range alone, so the result does not depend on how the data were cut into batches
or shards (ADR 0003). Values are float32; nothing here keeps the data.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float

DEFAULT_BINS = 2048
_EMPTY_EXPONENT = -149  # the spacing of the smallest float32
_CHUNK = 1 << 16  # elements binned at a time: stays in the cache and bounds the scratch memory


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Evidence about one tensor.

    `low` and `high` are the smallest and largest value of `count` values. `histogram[k]` counts the values in bin
    `first + k` of width `2**exponent`; the counts add up to `count`; there are at most `bins + 1` of them.
    """

    count: int
    low: float
    high: float
    bins: int
    exponent: int
    first: int
    histogram: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Hold what follows from the definition, also for statistics that were read from a file.

        Raises:
            ValueError: the fields contradict each other.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high and self.count > 0):
            raise ValueError(f"range [{self.low}, {self.high}] of {self.count} values")
        last = _bin(self.high, self.exponent)
        grid = (_exponent(self.low, self.high, self.bins), _bin(self.low, self.exponent))
        if (self.exponent, self.first) != grid or len(self.histogram) != last - self.first + 1:
            raise ValueError(f"bins do not fit the range [{self.low}, {self.high}]")
        if int(self.histogram.sum()) != self.count or int(self.histogram.min()) < 0:
            raise ValueError(f"histogram does not add up to {self.count}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeRule:
    """How a range is read from statistics.

    `min-max` keeps every value. `percentile` leaves out `100 - percentile` per cent of the values, half on each
    side; a side on which the data end at zero is kept whole (nothing is cut from a ReLU's zeros).
    """

    kind: Literal["min-max", "percentile"] = "min-max"
    percentile: float = 99.99


def tensor_stats(x: Float, *, bins: int = DEFAULT_BINS) -> TensorStats:
    """Return the statistics of all elements of `x` (any shape, at least one element).

    Raises:
        ValueError: `x` is empty or holds NaN or infinity.
    """
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    if flat.size == 0:
        raise ValueError("tensor is empty")
    low, high = float(flat.min()), float(flat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("tensor holds NaN or infinity")
    e = _exponent(low, high, bins)
    first, last = _bin(low, e), _bin(high, e)
    histogram = np.zeros(last - first + 1, np.int64)
    # Scaling by a power of two is exact in float32 unless it underflows, which only a shrinking one can.
    scale_up = np.float32(2.0**-e) if -127 <= e <= 0 else None
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        scaled = chunk * scale_up if scale_up is not None else np.ldexp(chunk.astype(np.float64), -e)
        index = np.floor(scaled).astype(np.int64) - first
        histogram += np.bincount(index, minlength=histogram.size)
    return TensorStats(flat.size, low, high, bins, e, first, histogram)


def merge_stats(a: TensorStats, b: TensorStats) -> TensorStats:
    """Return the statistics of both data sets together; associative, commutative and exact.

    Raises:
        ValueError: the two were made with different `bins`.
    """
    if a.bins != b.bins:
        raise ValueError(f"statistics with {a.bins} and {b.bins} bins cannot be merged")
    low, high = min(a.low, b.low), max(a.high, b.high)
    e = _exponent(low, high, a.bins)
    first, last = _bin(low, e), _bin(high, e)
    histogram = np.zeros(last - first + 1, np.int64)
    for s in (a, b):
        index = (np.arange(s.histogram.size, dtype=np.int64) + s.first) >> (e - s.exponent)
        np.add.at(histogram, index - first, s.histogram)
    return TensorStats(a.count + b.count, low, high, a.bins, e, first, histogram)


def range_from_stats(stats: TensorStats, rule: RangeRule) -> tuple[float, float]:
    """Return (low, high) of the values that the rule keeps, never wider than the observed range."""
    match rule.kind:
        case "min-max":
            return stats.low, stats.high
        case "percentile":
            return _percentile_range(stats, rule.percentile)


def _percentile_range(stats: TensorStats, percentile: float) -> tuple[float, float]:
    tail = stats.count * (1 - percentile / 100) / 2
    below = np.cumsum(stats.histogram)
    lowest_kept = int(np.searchsorted(below, tail, side="right"))
    highest_kept = int(np.searchsorted(below, stats.count - tail, side="left"))
    width = 2.0**stats.exponent
    low = (stats.first + lowest_kept) * width if stats.low < 0 else stats.low
    high = (stats.first + highest_kept + 1) * width if stats.high > 0 else stats.high
    return max(stats.low, min(low, stats.high)), min(stats.high, max(high, stats.low))


def _exponent(low: float, high: float, bins: int) -> int:
    """Return the smallest e for which at most `bins` + 1 bins of 2**e reach from low to high.

    Growing the range never lowers it. The floor keeps bin numbers of a constant tensor inside int64.
    """
    largest = max(abs(low), abs(high))
    if largest == 0.0:
        return _EMPTY_EXPONENT
    floor = max(_EMPTY_EXPONENT, math.frexp(largest)[1] - 40)
    span = high - low
    e = max(floor, math.frexp(span / bins)[1] - 1 if span > 0 else floor)
    while _bin(high, e) - _bin(low, e) > bins:
        e += 1
    return e


def _bin(x: float, e: int) -> int:
    return math.floor(math.ldexp(x, -e))
