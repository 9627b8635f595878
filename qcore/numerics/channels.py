"""Statistics of the channels of a tensor, streamed: extremes and moments of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelStats:
    """Evidence about each channel of a tensor over `count` values per channel; all arrays are (channels,) float64."""

    count: int
    low: Vector
    high: Vector
    mean: Vector
    variance: Vector


def channel_stats(x: Float, axis: int = 1) -> ChannelStats:
    """Return the statistics of the channels of `x` along `axis`; `x` holds at least one value."""
    rows = np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1)
    return ChannelStats(
        count=rows.shape[1],
        low=rows.min(axis=1).astype(np.float64),
        high=rows.max(axis=1).astype(np.float64),
        mean=rows.mean(axis=1, dtype=np.float64),
        variance=rows.var(axis=1, dtype=np.float64),
    )


def merge_channels(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """Return the statistics of both data sets together.

    Source: Chan, Golub and LeVeque 1979, the pairwise update of mean and variance.
    """
    n = a.count + b.count
    delta, weight = b.mean - a.mean, b.count / n
    return ChannelStats(
        count=n,
        low=np.minimum(a.low, b.low),
        high=np.maximum(a.high, b.high),
        mean=a.mean + delta * weight,
        variance=(1 - weight) * a.variance + weight * b.variance + weight * (1 - weight) * delta**2,
    )


def stream_channels(
    batches: Iterable[Mapping[str, Float]], axes: Mapping[str, int] | None = None
) -> dict[str, ChannelStats]:
    """Return the statistics of the channels of every tensor of two or more dimensions over all batches.

    Only sums and extremes are kept, so memory does not grow with the batches.

    Args:
        batches: tensors by name.
        axes: where the channels of a tensor are, by name; 1 where it does not say.
    """
    stats: dict[str, ChannelStats] = {}
    for tensors in batches:
        for name, x in tensors.items():
            if x.ndim >= 2 and x.size:
                new = channel_stats(x, (axes or {}).get(name, 1))
                stats[name] = merge_channels(stats[name], new) if name in stats else new
    return stats
