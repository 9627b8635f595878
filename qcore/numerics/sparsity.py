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


def pattern_mask(w: Float, kept: int, of: int, axis: int) -> NDArray[np.bool_]:
    """Return the mask (same shape as `w`) that keeps the `kept` largest |w| of every `of` neighbours along `axis`.

    Where `of` does not divide the axis, its last run is filled up with zeros in mind: at most `kept` of it stay. Among
    equal magnitudes the earlier element is dropped first.

    Args:
        w: weights, any shape.
        kept: from 1 to `of` - 1.
        of: 2 or more.
        axis: along which a kernel sums.

    Raises:
        ValueError: `kept` of `of` is no pattern.

    Source: Mishra et al. 2021 (arXiv 2104.08378), N:M structured sparsity.
    """
    if not 1 <= kept < of:
        raise ValueError(f"pattern is {kept}:{of}; allowed: N:M with 1 <= N < M")
    rows = np.moveaxis(np.abs(w), axis, -1)
    size, missing = rows.shape[-1], -rows.shape[-1] % of
    filled = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)], constant_values=-1)
    runs = filled.reshape(*rows.shape[:-1], -1, of)
    drop = np.argsort(runs, axis=-1, kind="stable")[..., : of - kept]
    mask = np.ones(runs.shape, bool)
    np.put_along_axis(mask, drop, False, axis=-1)
    return np.moveaxis(mask.reshape(*rows.shape[:-1], -1)[..., :size], -1, axis)
