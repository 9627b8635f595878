"""Search for the range whose quantization loses least, on a histogram and for the scheme that will really be used.

Each end is tried on a grid of factors of the observed end, coarse first and then around the best; both ends of an
asymmetric scheme are searched together, a symmetric scheme has one threshold. Scales come from `qparams_from_range`,
so powers of two, odd numbers of levels and zero points are those of the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import QParams, QScheme, qparams_from_range

Array = NDArray[np.float64]
Cost = Callable[[QParams, Array, Array], Array]

_STEP = 0.7  # factors of the first round are its powers: 1 down to 1/25
_COARSE = 10
_FINER = 2  # each later round divides the step by this, and looks one former step to both sides
_ROUNDS = 4  # the last step is 4 per cent of the range
_EQUAL = 1 + 1e-9  # costs that differ by less are rounding
_UNSEEN = 1e-12  # probability of what a quantized distribution does not have


@dataclass(frozen=True, slots=True)
class Counted:
    """The bins of a histogram that are not empty: float64 (k,), ascending; values lie evenly in [left, right].

    `left == right` is a value that occurred `count` times.
    """

    left: Array
    right: Array
    count: Array


def least_error(values: Counted, scheme: QScheme, *, gamma: float = 1.0) -> tuple[float, float]:
    """Return the (low, high) that minimises rounding noise + `gamma` * clipping noise, both squared errors.

    The squared error of quantization is integrated over every bin in closed form, because a grid finer than the bins
    (16 bits, or a range cut to a small part) cannot be judged at their centres. The bin that holds 0 counts as zeros,
    which are exact in every scheme: behind a ReLU it is a spike.

    Source: gamma = 1 is the mean squared error; gamma = 3 AIMET's TF-Enhanced range setting.
    """
    costs = _errors_of(values, gamma)
    return _search(values, scheme, lambda q, low, high: costs(q))


def least_divergence(values: Counted, scheme: QScheme) -> tuple[float, float]:
    """Return the (low, high) whose quantized histogram Q diverges least from the observed P: min KL(P || Q).

    P is the histogram inside the range with what is outside added to its ends. Q gives every level the values that
    fall on it without those outside, spread evenly over the bins of the level that are not empty. The bin that holds
    0 is cut to its larger neighbour, because the zeros of a ReLU are no matter of resolution.

    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017), generalised to two ends; the zero bin as in NVIDIA's
    pytorch-quantization (`_compute_amax_entropy`).
    """
    centre = (values.left + values.right) / 2
    count = _without_zero_spike(values)

    def divergences(q: QParams, low: Array, high: Array) -> Array:
        return _divergences(centre, count, q, (low, high))

    return _search(values, scheme, divergences)


def _search(values: Counted, scheme: QScheme, cost: Cost) -> tuple[float, float]:
    """Return the ends of least cost; of equals, such as one power of two, the widest."""
    low, high = float(values.left[0]), float(values.right[-1])
    ends = _Ends(low=low, high=high, symmetric=scheme.symmetric)
    a = b = 1.0
    step, factors = _STEP, _STEP ** np.arange(_COARSE)
    for _ in range(_ROUNDS):
        pairs = ends.pairs(np.minimum(a * factors, 1.0), np.minimum(b * factors, 1.0))
        lows, highs = ends.at(pairs)
        q = qparams_from_range(lows, highs, replace(scheme, axis=0))
        costs = cost(q, lows, highs)
        best = int(np.argmax(np.where(costs <= costs.min() * _EQUAL, highs - lows, -1.0)))
        a, b = float(pairs[0][best]), float(pairs[1][best])
        step **= 1 / _FINER
        factors = step ** np.arange(-_FINER, _FINER + 1)
    lows, highs = ends.at((np.array([a]), np.array([b])))
    return float(lows[0]), float(highs[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """Where a range may end: factors of the observed ends; for a symmetric scheme of the larger one."""

    low: float
    high: float
    symmetric: bool

    def pairs(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return the combinations to try: an end that does not reach past 0 stays, since 0 is always kept."""
        one = np.ones(1)
        if self.symmetric:
            return a, a
        a, b = (a if self.low < 0 else one), (b if self.high > 0 else one)
        grid = np.meshgrid(a, b, indexing="ij")
        return grid[0].reshape(-1), grid[1].reshape(-1)

    def at(self, pairs: tuple[Array, Array]) -> tuple[Array, Array]:
        if self.symmetric:
            threshold = pairs[0] * max(-self.low, self.high)
            low, high = np.maximum(self.low, -threshold), np.minimum(self.high, threshold)
        else:
            low = pairs[0] * self.low if self.low < 0 else np.full_like(pairs[0], self.low)
            high = pairs[1] * self.high if self.high > 0 else np.full_like(pairs[1], self.high)
        return np.minimum(low, self.high), np.maximum(high, self.low)


def _errors_of(values: Counted, gamma: float) -> Callable[[QParams], Array]:
    """Return the function that gives each candidate's expected squared error, summed over all values."""
    zero = (values.left <= 0) & (values.right >= 0)
    left, right = np.where(zero, 0.0, values.left), np.where(zero, 0.0, values.right)
    point = left == right
    density = np.where(point, 0.0, values.count) / np.where(point, 1.0, right - left)
    at, times = right[point & ~zero], values.count[point & ~zero]
    edges = np.unique(np.concatenate([left[~point], right[~point]]))
    begin, end = np.searchsorted(edges, left[~point]), np.searchsorted(edges, right[~point])
    density = density[~point]

    def errors(q: QParams) -> Array:
        scale = q.scale.astype(np.float64)[:, None]
        zero_point = q.zero_point.astype(np.float64)[:, None]
        bottom, top = (q.qmin - zero_point) * scale, (q.qmax - zero_point) * scale
        total = np.zeros(len(scale))
        if edges.size:
            below = _error_below(edges[None, :], scale, (bottom, top), gamma)
            total += (below[:, end] - below[:, begin]) @ density
        if at.size:
            inside = np.clip(at[None, :], bottom, top)
            clipped = gamma * (at - inside) ** 2 + (inside - scale * np.rint(inside / scale)) ** 2
            total += clipped @ times
        return total

    return errors


def _error_below(x: Array, scale: Array, ends: tuple[Array, Array], gamma: float) -> Array:
    """Return the integral from 0 to `x` of the squared quantization error, (candidates, edges).

    Inside the grid: whole cells of `scale**3 / 12` and the cubic of the cell that is not whole; outside: the cubic of
    the distance.
    """
    bottom, top = ends
    inside = np.minimum(np.maximum(x, bottom), top)
    u = inside / scale
    cell = np.rint(u)
    rest = u - cell
    integral = (cell / 12 + rest * rest * rest / 3) * (scale * scale * scale)
    outside = x - inside
    return np.asarray(integral + (gamma / 3) * (outside * outside * outside))


def _without_zero_spike(values: Counted) -> Array:
    count = values.count.copy()
    zero = np.flatnonzero((values.left <= 0) & (values.right >= 0))
    for k in zero:
        neighbours = np.delete(values.count, zero)
        near = np.searchsorted(np.delete(values.left, zero), values.left[k])
        around = neighbours[max(near - 1, 0) : near + 1]
        count[k] = min(count[k], float(around.max(initial=1.0)))
    return count


def _divergences(centre: Array, count: Array, q: QParams, ends: tuple[Array, Array]) -> Array:
    """Return KL(P || Q) for each candidate."""
    k, n = len(q.scale), len(centre)
    low, high = ends
    first = np.searchsorted(centre, np.minimum(low, centre[-1]))
    last = np.maximum(np.searchsorted(centre, high, side="right") - 1, first)
    last = np.minimum(last, n - 1)
    first = np.minimum(first, last)
    column = np.arange(n)[None, :]
    inside = (column >= first[:, None]) & (column <= last[:, None])
    kept = np.where(inside, count[None, :], 0.0)
    below = np.concatenate([[0.0], np.cumsum(count)])
    p = kept.copy()
    rows = np.arange(k)
    p[rows, first] += below[first]
    p[rows, last] += below[-1] - below[last + 1]
    levels = q.qmax - q.qmin + 1
    level = np.rint(centre[None, :] / q.scale[:, None]) + (q.zero_point[:, None] - q.qmin)
    group = (np.clip(level, 0, levels - 1) + rows[:, None] * levels).astype(np.int64)
    mass = np.bincount(group[inside], weights=kept[inside], minlength=k * levels)
    members = np.bincount(group[inside], minlength=k * levels)
    spread = (mass / np.maximum(members, 1))[group]
    total, seen = below[-1], kept.sum(axis=1, keepdims=True)
    p /= total
    ratio = np.where(inside, p / np.maximum(spread / seen, _UNSEEN), 1.0)
    return np.asarray((p * np.log(np.where(p > 0, ratio, 1.0))).sum(axis=1))
