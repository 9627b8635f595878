"""Which weights to zero: masks as arrays, without a graph."""

from collections.abc import Sequence

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


def lamp_scores(w: Float) -> NDArray[np.float64]:
    """Return the squares of `w`, each over the sum of itself and of all larger ones, shape of `w`.

    By these scores weights of different layers can be compared: what goes is what matters least in its layer. The
    largest weight of every layer scores 1, so no layer is emptied before all are down to one.

    Source: Lee et al. 2021 (arXiv 2010.07611) equation 3.
    """
    power = np.square(np.asarray(w, np.float64).reshape(-1))
    order = np.argsort(power, kind="stable")
    left = np.cumsum(power[order][::-1])[::-1]
    scores = np.empty_like(power)
    scores[order] = np.divide(power[order], left, out=np.zeros_like(power), where=left > 0)
    return scores.reshape(np.shape(w))


def joint_masks(scores: Sequence[Float], sparsity: float) -> list[NDArray[np.bool_]]:
    """Return the masks, of the shapes of `scores`, that keep the largest scores of all arrays together.

    Exactly `round(sparsity * number of scores)` are dropped; among equal ones the earlier first.

    Args:
        scores: one array per layer, of any shape, not negative.
        sparsity: fraction to drop, in [0, 1).

    Raises:
        ValueError: sparsity is outside [0, 1).
    """
    whole = magnitude_mask(np.concatenate([np.reshape(s, -1) for s in scores]), sparsity)
    ends = np.cumsum([s.size for s in scores])
    return [part.reshape(s.shape) for part, s in zip(np.split(whole, ends[:-1]), scores, strict=True)]


def pattern_of(text: str) -> tuple[int, int]:
    """Return N and M of a pattern "N:M", 1 <= N < M.

    Raises:
        ValueError: it is none.
    """
    kept, _, of = text.partition(":")
    if not (text.isascii() and kept.isdecimal() and of.isdecimal() and 1 <= int(kept) < int(of)):
        raise ValueError(f"pattern is {text}; allowed: N:M with 1 <= N < M, e.g. 2:4")
    return int(kept), int(of)


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
