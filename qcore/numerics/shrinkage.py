"""How far to believe moments of few samples: shares that are chosen on one half of them and judged on the other.

Second-order rounding moves error to where the samples at hand do not show it, and least squares follows their noise.
With a hundred images and a thousand inputs both fit what was seen perfectly and other samples badly. Two shares hold
them back: `ridge` holds weights to the float ones, and `shrinkage` draws the covariance towards its diagonal.

Source: Ledoit and Wolf 2004, J. Multivariate Anal. 88 (shrinkage of a covariance; here towards its own diagonal, the
share by two-fold cross-validation of the error that is minimized instead of a formula).
"""

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.refine import LayerMoments
from qcore.numerics.rounding import round_second_order

Array = NDArray[np.float64]
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHRINKAGES = (0.003, 0.03, 0.1, 0.3, 1.0)
USUAL_SHRINKAGE = 0.3  # what most layers of real networks choose
MOST_INPUTS = 1200  # of a layer whose shares are chosen: the cost is that of a dozen factorizations
DAMPING = 1e-3
_MOST_ROWS, _MOST_GROUPS = 48, 64  # that choose for all


def shrunk(covariance: Array, share: float) -> Array:
    """Return `covariance` (groups, inputs, inputs) drawn by `share` (0 to 1) towards its diagonal, positive definite.

    An input that never varies gets a small variance, so that there is an inverse.
    """
    diagonal = np.einsum("gii->gi", covariance)
    floor = DAMPING * np.maximum(diagonal.mean(axis=1, keepdims=True), 0.0) + 1e-12
    k = covariance.shape[1]
    return np.asarray((1 - share) * covariance + (share * diagonal + floor)[:, :, None] * np.eye(k))


def pulled(wanted: Array, moments: LayerMoments, ridge: float | None) -> Array:
    """Return the least-squares weights for the inputs that really come, held to `wanted` (groups, outputs, inputs).

    `ridge` is a share of the mean variance of the inputs; None returns `wanted`.

    Source: Li et al. 2025 (arXiv 2504.02692) for the objective; Hoerl and Kennard 1970 for the ridge.
    """
    if ridge is None:
        return wanted
    k = wanted.shape[2]
    size = np.trace(moments.covariance, axis1=1, axis2=2) / k
    held = moments.covariance + (ridge * size + 1e-12)[:, None, None] * np.eye(k)
    missing = moments.cross - wanted @ moments.covariance
    return np.asarray(wanted + np.swapaxes(np.linalg.solve(held, np.swapaxes(missing, 1, 2)), 1, 2))


def choose_ridge(wanted: Array, moments: LayerMoments) -> float | None:
    """Return the ridge of `RIDGES` for which weights learned on one half serve the other best, None if none serves.

    Args:
        wanted: float weights, (groups, outputs, inputs).
        moments: with halves; None is returned without, and for more than `MOST_INPUTS` inputs.
    """
    if moments.halves is None or wanted.shape[2] > MOST_INPUTS:
        return None
    errors = np.zeros(len(RIDGES))
    for learn, judge in (moments.halves, moments.halves[::-1]):
        values, vectors = np.linalg.eigh(learn.covariance)
        values = np.maximum(values, 0.0)
        size = values.mean(axis=1, keepdims=True) + 1e-12
        missing = (learn.cross - wanted @ learn.covariance) @ vectors
        judged = (judge.cross - wanted @ judge.covariance) @ vectors
        metric = np.swapaxes(vectors, 1, 2) @ judge.covariance @ vectors
        for k, ridge in enumerate(RIDGES):
            moved = missing / (values + ridge * size)[:, None, :]
            errors[k] += ((moved @ metric) * moved).sum() - 2 * (moved * judged).sum()
    best = int(errors.argmin())
    return RIDGES[best] if errors[best] < 0 else None


def choose_shrinkage(weights: Array, moments: LayerMoments, scale: Array, levels: tuple[int, int]) -> float:
    """Return the share of `SHRINKAGES` with which rounding for one half leaves the least error on the other.

    Args:
        weights: to be rounded, (groups, outputs, inputs); some of many rows choose for all.
        moments: with halves; without, and for more than `MOST_INPUTS` inputs, the usual share is returned.
        scale: (groups, outputs).
        levels: lowest and highest integer.
    """
    groups, outputs, inputs = weights.shape
    if moments.halves is None or inputs > MOST_INPUTS:
        return USUAL_SHRINKAGE
    some, rows = slice(None, None, -(-groups // _MOST_GROUPS)), slice(None, None, -(-outputs // _MOST_ROWS))
    w, s = weights[some, rows], scale[some, rows]
    errors = []
    for share in SHRINKAGES:
        error = 0.0
        for learn, judge in (moments.halves, moments.halves[::-1]):
            integers = round_second_order(w, shrunk(learn.covariance[some], share), s, levels)
            difference = integers * s[:, :, None] - w
            error += float(((difference @ judge.covariance[some]) * difference).sum())
        errors.append(error)
    return SHRINKAGES[int(np.argmin(errors))]
