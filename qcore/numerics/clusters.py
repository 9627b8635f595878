"""One-dimensional clusters: the few values that stand for many with the least squared error.

In one dimension the best clusters are runs of the sorted values, so the best split is found by dynamic programming over
where the last run starts; the error of a run follows from prefix sums.

Source: Wang and Song 2011, "Ckmeans.1d.dp" (R Journal 3/2). As compression: Han et al. 2016, "Deep Compression"
(arXiv 1510.00149) section 3.
"""

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float

Array = NDArray[np.float64]
_MOST_POINTS = 1024  # distinct values that the exact search takes: a matrix of 8 MiB
_LLOYD_SWEEPS = 50


def cluster_centres(w: Float, clusters: int, *, keep_zeros: bool = False) -> Array:
    """Return at most `clusters` values, rising, that stand for `w` with the least `sum (w - nearest)^2`.

    Exact up to 1024 distinct values. More are first put into about as many bins, half of them of equal counts and half
    of equal width (few far values move centres as many near ones do), and Lloyd's iteration over all values follows.
    No seed: the same input always gives the same result.

    Args:
        w: any shape, at least one value, finite.
        clusters: at least 1, and 2 if `keep_zeros`.
        keep_zeros: one of the centres is 0, and stands for the zeros alone: sparse weights stay sparse, and no weight
            is lost to them.

    Raises:
        ValueError: too few clusters, or no value.
    """
    least = 2 if keep_zeros else 1
    if clusters < least or not w.size:
        raise ValueError(f"{clusters} clusters of {w.size} values; allowed: {least} clusters or more, and a value")
    values, counts = np.unique(np.asarray(w, np.float64), return_counts=True)
    if keep_zeros:
        used = values != 0
        if not used.any():
            return np.zeros(1)
        return np.unique(np.append(_centres(values[used], counts[used], clusters - 1), 0.0))
    return _centres(values, counts, clusters)


def assign(w: Float, centres: Array) -> NDArray[np.int64]:
    """Return for every value of `w` the position of the nearest of `centres` (rising); halfway up counts as down."""
    borders = (centres[1:] + centres[:-1]) / 2
    return np.searchsorted(borders, np.asarray(w, np.float64), side="left")


def clustered(w: Float, centres: Array, *, keep_zeros: bool = False) -> Array:
    """Return `w` with every value replaced by the nearest centre; with `keep_zeros` 0 stands for zeros alone."""
    x = np.asarray(w, np.float64)
    others = centres[centres != 0] if keep_zeros else centres
    if not others.size:
        return np.zeros_like(x)
    near: Array = others[assign(x, others)]
    return np.where(x == 0, 0.0, near) if keep_zeros else near


def _centres(values: Array, counts: NDArray[np.int64], clusters: int) -> Array:
    """Return the centres of `values` (rising, distinct), each of which occurs `counts` times."""
    if len(values) <= clusters:
        return values
    if len(values) <= _MOST_POINTS:
        return _best_runs(values, counts.astype(np.float64), clusters)
    half = _MOST_POINTS // 2
    even = np.searchsorted(np.cumsum(counts), np.linspace(0, counts.sum(), half, endpoint=False), side="right")
    wide = np.searchsorted(values, np.linspace(values[0], values[-1], half, endpoint=False))
    starts = np.unique(np.concatenate([even, wide]))
    weights = np.add.reduceat(counts.astype(np.float64), starts)
    points = np.add.reduceat(values * counts, starts) / weights
    return _lloyd(values, counts, _best_runs(points, weights, clusters))


def _best_runs(points: Array, weights: Array, clusters: int) -> Array:
    """Return the means of the best `clusters` runs of `points` (rising), of which there are more."""
    x = points - np.average(points, weights=weights)  # differences of prefix sums lose digits far from zero
    n, s, q = (np.concatenate([[0.0], np.cumsum(weights * x**p)]) for p in range(3))
    start, stop = np.arange(len(x))[:, None], np.arange(1, len(x) + 1)[None, :]
    inside = start < stop
    error = np.full((len(x), len(x)), np.inf)  # of the run from `start` to before `stop`
    np.divide((s[stop] - s[start]) ** 2, n[stop] - n[start], out=error, where=inside)
    error = np.where(inside, q[stop] - q[start] - error, np.inf)
    best, cuts = error[0], []
    for _ in range(clusters - 1):
        total = error[1:] + best[:-1, None]  # the last run starts behind a best split of what is before it
        cut = total.argmin(axis=0)
        best = np.take_along_axis(total, cut[None], axis=0)[0]
        cuts.append(cut + 1)
    edges = [len(x)]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1] - 1]))
    starts = np.array([0, *edges[:0:-1]])
    return np.asarray(np.add.reduceat(weights * points, starts) / np.add.reduceat(weights, starts))


def _lloyd(values: Array, counts: NDArray[np.int64], centres: Array) -> Array:
    """Return `centres` moved to the means of the values nearest to them, until none moves."""
    n, s = (np.concatenate([[0.0], np.cumsum(counts * v)]) for v in (np.ones_like(values), values))
    for _ in range(_LLOYD_SWEEPS):
        borders = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2, side="right")
        edges = np.concatenate([[0], borders, [len(values)]])
        size = n[edges[1:]] - n[edges[:-1]]
        moved = np.where(size > 0, (s[edges[1:]] - s[edges[:-1]]) / np.maximum(size, 1.0), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres
