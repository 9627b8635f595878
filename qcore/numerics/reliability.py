"""Whether a classifier's probabilities mean what they say: the expected calibration error over equal-width bins.

Counts are whole numbers, so bins of any parts of the samples add up to those of all, whatever the order.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3, 15 bins (part 4).
"""

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float

BINS = 15
UNIT = 1 << 32
"""A probability of 1 in the units that are summed; 2^31 samples fit in 64 bits."""

_SUM_TOLERANCE = 1e-3  # float16 probabilities of 1000 classes add up to 1 within this


def top_probability(outputs: Float, reference: Float) -> NDArray[np.float64]:
    """Return the largest class probability of each row of `outputs` (n, classes).

    Softmax is applied where the row of `reference`, the float model's outputs for the same samples, is no
    distribution. Where it is one, the row is divided by its sum: behind an 8-bit Softmax it may be off 1 by much.
    """
    base = np.asarray(reference, np.float64)
    given = (base >= 0).all(axis=1) & (np.abs(base.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    rows = np.asarray(outputs, np.float64)
    grown = np.exp(rows - rows.max(axis=1, keepdims=True))
    shares = np.maximum(rows, 0)
    total = shares.sum(axis=1)
    flat = np.where(total > 0, shares.max(axis=1) / np.where(total > 0, total, 1), 1 / rows.shape[1])
    result: NDArray[np.float64] = np.where(given, flat, 1 / grown.sum(axis=1))
    return result


def probability_bins(probability: Float, right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return (BINS, 3): samples, samples that are right, and the sum of probabilities in `UNIT`, by bin (a, b]."""
    place = np.clip(np.ceil(probability * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins = np.zeros((BINS, 3), np.int64)
    np.add.at(bins, place, np.stack([np.ones(len(place)), right, np.rint(probability * UNIT)], axis=1).astype(np.int64))
    return bins


def expected_calibration_error(counts: Float, rights: Float, confidences: Float) -> float:
    """Return sum over bins of (their share of samples) x |share that is right - mean probability|.

    Args:
        counts: (bins,) samples.
        rights: (bins,) samples that are right.
        confidences: (bins,) mean probability.
    """
    n = np.asarray(counts, np.float64)
    return float(np.sum(np.abs(np.asarray(rights, np.float64) - n * np.asarray(confidences, np.float64))) / np.sum(n))
