"""Mergeable statistics of a tensor: count, range, histogram and moving average; merging is exact in any order.

A bin is `[i * 2**e, (i + 1) * 2**e)` for an integer i. Bins of width 2**e nest in those of 2**(e+1), so two
histograms are merged by coarsening the finer one: no value is ever moved to a bin that it does not belong to. The
exponent is a function of the whole range alone, so the result does not depend on how the data were cut into batches
or shards (ADR 0003). A moving average is kept as a weighted sum in integers, with weights that depend on a sample's
place in the split alone (ADR 0008). Values are float32; nothing here keeps the data.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float, QScheme
from qcore.numerics.ranges import Counted, least_divergence, least_error

DEFAULT_BINS = 2048
DEFAULT_DECAY = 0.99
ONE = 1 << 64
"""The weight of the last sample of a split."""

RuleKind = Literal["min-max", "moving-average", "percentile", "entropy", "mse", "sqnr"]

_EMPTY_EXPONENT = -149  # the spacing of the smallest float32, of which every float32 is a multiple
_CHUNK = 1 << 15  # elements binned at a time: the scratch arrays stay in the cache
_RUN = 64  # values that are counted together
_EXACT = 1 << 24  # integers up to here are float32
_SQNR_GAMMA = 3.0


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Evidence about one tensor.

    `low` and `high` are the smallest and largest of all values. `histogram[k]` counts those of `count` values that are
    in bin `first + k` of width `2**exponent`; there are at most `bins + 1` bins. Of large tensors a part is
    counted (`counted_part`).
    `low_sum` and `high_sum` are the sums over the samples of weight times smallest (largest) value of the sample in
    units of 2**-149, and `weight` is the sum of those weights.
    """

    count: int
    low: float
    high: float
    bins: int
    exponent: int
    first: int
    histogram: NDArray[np.int64]
    weight: int
    low_sum: int
    high_sum: int

    def check(self) -> None:
        """Hold what follows from the definition, for statistics that were read from a file.

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
        ends = (_units(self.low) * self.weight, self.low_sum, self.high_sum, _units(self.high) * self.weight)
        if self.weight < 0 or sorted(ends) != list(ends):
            raise ValueError(f"moving average leaves the range [{self.low}, {self.high}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeRule:
    """How a range is read from statistics; every kind reads the same ones.

    * `min-max` keeps every value.
    * `moving-average` is the exponential moving average, in the order of the split, of the smallest and of the
      largest value of each sample; the table's `decay` says how fast it forgets.
    * `percentile` leaves out `100 - percentile` per cent of the values, half on each side; a side on which the data
      end at zero is kept whole (nothing is cut from a ReLU's zeros).
    * `entropy` loses the least information: `ranges.least_divergence`.
    * `mse` makes the least squared error: `ranges.least_error` with clipping and rounding noise alike. Since the
      power of the signal is given, this is also the range of the highest plain SQNR.
    * `sqnr` is AIMET's TF-Enhanced, which weighs the noise of clipping 3 times that of rounding
      (`TfEnhancedEncodingAnalyzer`, gamma = 3): between `mse` and `min-max`.
    """

    kind: RuleKind = "min-max"
    percentile: float = 99.99


def tensor_stats(x: Float, *, bins: int = DEFAULT_BINS, weight: int = ONE, values: int | None = None) -> TensorStats:
    """Return the statistics of all elements of `x` (any shape, at least one element) as one sample.

    Args:
        x: the values.
        bins: histogram resolution.
        weight: the sample's weight in the moving average (`average_weight`).
        values: about how many values the histogram counts at most (`counted_part`); None counts all.

    Raises:
        ValueError: `x` is empty or holds NaN or infinity.
    """
    return add_sample(None, x, bins=bins, weight=weight, values=values)


def counted_part(flat: NDArray[np.float32], values: int | None) -> NDArray[np.float32]:
    """Return the values of `flat` (n,) that the histogram counts: all, or one to two times `values` in runs of 64.

    The runs are evenly spaced, and their distance shares no factor with the number of runs that there are, so that they
    come from all rows and channels alike. Single values would cost as much as the runs that are read with them.
    """
    if values is None:
        return flat
    runs = flat.size // _RUN
    stride = runs * _RUN // max(values, _RUN)
    if stride <= 1:
        return flat
    while math.gcd(stride, runs) > 1:
        stride += 1
    return flat[: runs * _RUN].reshape(runs, _RUN)[::stride].reshape(-1)


def add_sample(
    stats: TensorStats | None,
    x: Float,
    *,
    bins: int = DEFAULT_BINS,
    weight: int = ONE,
    values: int | None = None,
) -> TensorStats:
    """Return what merging `stats` with the statistics of one more sample gives, for less work and memory.

    `stats` is used up: its histogram is written to where the bins stay the same. A new one for every sample would end
    up in the gaps between the activations, and the heap would grow.

    Raises:
        ValueError: as `tensor_stats`; or `stats` has other `bins`.
    """
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    if flat.size == 0:
        raise ValueError("tensor is empty")
    x_low, x_high = float(flat.min()), float(flat.max())
    if not (math.isfinite(x_low) and math.isfinite(x_high)):
        raise ValueError("tensor holds NaN or infinity")
    low = x_low if stats is None else min(stats.low, x_low)
    high = x_high if stats is None else max(stats.high, x_high)
    histogram, e, first = _empty_histogram(low, high, bins)
    if stats is not None:
        _refuse_other_bins(stats.bins, bins)
        if (e, first, histogram.size) == (stats.exponent, stats.first, stats.histogram.size):
            histogram = stats.histogram
        else:
            _coarsen_into(histogram, e, first, stats)
    counted = counted_part(flat, values)
    _count_into(histogram, e, first, counted)
    sums = (weight, weight * _units(x_low), weight * _units(x_high))
    if stats is None:
        return TensorStats(counted.size, low, high, bins, e, first, histogram, *sums)
    merged = (stats.weight + sums[0], stats.low_sum + sums[1], stats.high_sum + sums[2])
    return TensorStats(stats.count + counted.size, low, high, bins, e, first, histogram, *merged)


def merge_stats(a: TensorStats, b: TensorStats) -> TensorStats:
    """Return the statistics of both data sets together; associative, commutative and exact.

    Raises:
        ValueError: the two were made with different `bins`.
    """
    _refuse_other_bins(a.bins, b.bins)
    low, high = min(a.low, b.low), max(a.high, b.high)
    histogram, e, first = _empty_histogram(low, high, a.bins)
    for s in (a, b):
        _coarsen_into(histogram, e, first, s)
    sums = (a.weight + b.weight, a.low_sum + b.low_sum, a.high_sum + b.high_sum)
    return TensorStats(a.count + b.count, low, high, a.bins, e, first, histogram, *sums)


def average_weight(position: int, size: int, decay: float) -> int:
    """Return the weight of sample `position` of a split of `size` samples in a moving average: decay**age * 2**64.

    `age` is the number of samples behind it. Computed in integers by squaring, rounded down, so it is the same on
    every platform and in every shard; samples older than 64 / -log2(decay) weigh nothing.
    """
    age, power, result = size - 1 - position, int(decay * ONE), ONE
    while age and result:
        if age & 1:
            result = result * power >> 64
        power = power * power >> 64
        age >>= 1
    return result


def range_from_stats(stats: TensorStats, rule: RangeRule, scheme: QScheme) -> tuple[float, float]:
    """Return (low, high) of the values that the rule keeps, never wider than the observed range.

    Args:
        stats: of the tensor.
        rule: which values are kept.
        scheme: how they will be quantized; `entropy`, `mse` and `sqnr` weigh the errors that it makes.

    Raises:
        ValueError: a moving average of samples that weigh nothing (a part of the split only).
    """
    match rule.kind:
        case "min-max":
            return stats.low, stats.high
        case "moving-average":
            return _average_range(stats)
        case "percentile":
            return _percentile_range(stats, rule.percentile)
        case "entropy":
            return least_divergence(_counted(stats), scheme)
        case "mse":
            return least_error(_counted(stats), scheme)
        case "sqnr":
            return least_error(_counted(stats), scheme, gamma=_SQNR_GAMMA)


def _average_range(stats: TensorStats) -> tuple[float, float]:
    if stats.weight == 0:
        raise ValueError("the samples weigh nothing in the moving average; merge the shards of the whole split")
    unit = stats.weight << -_EMPTY_EXPONENT
    return float(Fraction(stats.low_sum, unit)), float(Fraction(stats.high_sum, unit))


def _percentile_range(stats: TensorStats, percentile: float) -> tuple[float, float]:
    tail = stats.count * (1 - percentile / 100) / 2
    below = np.cumsum(stats.histogram)
    lowest_kept = int(np.searchsorted(below, tail, side="right"))
    highest_kept = int(np.searchsorted(below, stats.count - tail, side="left"))
    width = 2.0**stats.exponent
    low = (stats.first + lowest_kept) * width if stats.low < 0 else stats.low
    high = (stats.first + highest_kept + 1) * width if stats.high > 0 else stats.high
    return max(stats.low, min(low, stats.high)), min(stats.high, max(high, stats.low))


def _counted(stats: TensorStats) -> Counted:
    """Return the bins that are not empty; the outermost end where the values end."""
    index = np.flatnonzero(stats.histogram)
    start = (index + stats.first).astype(np.float64)
    width = 2.0**stats.exponent
    return Counted(
        left=np.maximum(start * width, stats.low),
        right=np.minimum((start + 1) * width, stats.high),
        count=stats.histogram[index].astype(np.float64),
    )


def _refuse_other_bins(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"statistics with {a} and {b} bins cannot be merged")


def _empty_histogram(low: float, high: float, bins: int) -> tuple[NDArray[np.int64], int, int]:
    """Return zeros for every bin from low to high, their exponent, and the number of the first."""
    e = _exponent(low, high, bins)
    first = _bin(low, e)
    return np.zeros(_bin(high, e) - first + 1, np.int64), e, first


def _coarsen_into(histogram: NDArray[np.int64], e: int, first: int, stats: TensorStats) -> None:
    """Add the counts of `stats` to bins that are at least as wide."""
    if e == stats.exponent:
        start = stats.first - first
        histogram[start : start + stats.histogram.size] += stats.histogram
        return
    index = (np.arange(stats.histogram.size, dtype=np.int64) + stats.first) >> (e - stats.exponent)
    np.add.at(histogram, index - first, stats.histogram)


def _count_into(histogram: NDArray[np.int64], e: int, first: int, flat: NDArray[np.float32]) -> None:
    """Count the values of `flat` in their bins."""
    fast = -127 <= e <= 0 and abs(first) + histogram.size < _EXACT
    if not fast:
        for start in range(0, flat.size, _CHUNK):
            scaled = np.ldexp(flat[start : start + _CHUNK].astype(np.float64), -e)
            histogram += np.bincount(np.floor(scaled).astype(np.int64) - first, minlength=histogram.size)
        return
    # Scaling up by a power of two is exact in float32, and so are whole numbers below 2**24.
    scale = np.float32(2.0**-e)
    scaled32, index = np.empty(min(_CHUNK, flat.size), np.float32), np.empty(min(_CHUNK, flat.size), np.int32)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        whole, number = scaled32[: chunk.size], index[: chunk.size]
        np.multiply(chunk, scale, out=whole)
        if first < 0:
            np.floor(whole, out=whole)  # else the conversion's truncation is the floor
        np.copyto(number, whole, casting="unsafe")
        if first != 0:
            np.subtract(number, np.int32(first), out=number)
        histogram += np.bincount(number, minlength=histogram.size)


def _units(x: float) -> int:
    """Return a float32 value in units of 2**-149, exactly."""
    return int(math.ldexp(x, -_EMPTY_EXPONENT))


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
