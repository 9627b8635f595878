"""Which weights to zero: masks as arrays, without a graph."""

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float


def magnitude_mask(w: Float, sparsity: float) -> NDArray[np.bool_]:
    """Return the mask (same shape as `w`) that keeps the largest |w| and drops exactly `round(sparsity * size)`.

    Among equal magnitudes the earlier element is dropped first, so that the result is the same everywhere.

    Args:
        w: weights, any shape.
        sparsity: fraction to drop, in [0, 1).

    Raises:
        ValueError: sparsity is outside [0, 1).

    Source: Han et al. 2015 (arXiv 1506.02626), magnitude criterion, one layer at a time.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; allowed: 0 <= sparsity < 1")
    drop = round(sparsity * w.size)
    mask = np.ones(w.size, bool)
    mask[np.argsort(np.abs(w), axis=None, kind="stable")[:drop]] = False
    return mask.reshape(w.shape)
