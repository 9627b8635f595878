"""How the ranges that were chosen for activations fit what was seen while the model was calibrated."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qcore.calibration import CalibrationTable
from qcore.canonical import Digest
from qcore.graph.qdq import ActivationRange
from qcore.numerics.error import limited_db
from qcore.numerics.stats import TensorStats
from qcore.review.source import RangeFit, Ranges

BINS = 96
"""The most bins of a histogram that is shown."""


def ranges_of(model_sha256: Digest, chosen: Mapping[str, ActivationRange], table: CalibrationTable) -> Ranges | None:
    """Return how `chosen` ranges fit the statistics in `table`, the worst quantizer first; None if no tensor is in it.

    Args:
        model_sha256: of the file that `chosen` was read from.
        chosen: ranges by the name of the float tensor.
        table: statistics of the float model.
    """
    fits = [_fit(name, r, table.stats[name]) for name, r in chosen.items() if name in table.stats]
    if not fits:
        return None
    return Ranges(
        model_sha256=model_sha256,
        calibrated=table.model_sha256,
        data_sha256=table.data_sha256,
        samples=table.samples,
        fits=tuple(sorted(fits, key=lambda f: (f.sqnr_db, f.tensor))),
    )


def _fit(name: str, chosen: ActivationRange, stats: TensorStats) -> RangeFit:
    width = math.ldexp(1.0, stats.exponent)
    counts = stats.histogram.astype(np.float64)
    centres = (stats.first + np.arange(len(counts)) + 0.5) * width
    np.clip(centres, stats.low, stats.high, out=centres)
    clipped = np.clip(centres, chosen.low, chosen.high)
    inside = clipped == centres
    noise = np.where(inside, chosen.step**2 / 12, (centres - clipped) ** 2)
    exponent, first, shown = _coarser(stats)
    return RangeFit(
        tensor=name,
        low=chosen.low,
        high=chosen.high,
        observed_low=stats.low,
        observed_high=stats.high,
        exponent=exponent,
        first=first,
        counts=tuple(int(n) for n in shown),
        outside=float(counts[~inside].sum() / counts.sum()),
        sqnr_db=limited_db(float(counts @ centres**2), float(counts @ noise)),
    )


def _coarser(stats: TensorStats) -> tuple[int, int, NDArray[np.int64]]:
    """Return exponent, first bin and counts of the histogram with at most `BINS` bins: neighbours are added up."""
    exponent, first, counts = stats.exponent, stats.first, stats.histogram
    while len(counts) > BINS:
        counts = np.pad(counts, (first % 2, (first + len(counts)) % 2)).reshape(-1, 2).sum(axis=1)
        exponent, first = exponent + 1, first // 2
    return exponent, first, counts
