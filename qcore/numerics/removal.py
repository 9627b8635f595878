"""How many channels of each group to remove: measured errors of single groups against what their removal saves.

Nothing here knows a graph: groups are numbered, and what a model costs is a sum of terms that shrink with them.

Source: the score dictionary of AIMET's greedy compression-ratio selection; Yang et al. 2018 (arXiv 1804.03230,
NetAdapt) for going step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What it costs in accuracy to keep fewer channels of one group.

    `counts` falls from all channels down; `errors` of the same length is the output error at each, 0 at the first.
    `latencies`, where they were measured, is the share of the latency that is left at each, 1 at the first.
    """

    counts: tuple[int, ...]
    errors: tuple[float, ...]
    latencies: tuple[float, ...] = ()

    def rising(self) -> "Curve":
        """Return the curve made monotone: removing more is never better than removing less."""
        return replace(self, errors=tuple(np.maximum.accumulate(np.maximum(self.errors, 0.0)).tolist()))


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTerms:
    """A cost that falls as groups shrink: the sum over terms of `amount` times, for each axis, the share that is left.

    `amount` (terms,); `whole` (terms, axes) is the share of an axis that always stays, `part` (terms, axes,
    groups) the share that belongs to each. Invariant: `whole` and the sum over groups of `part` make 1.
    """

    amount: Array
    whole: Array
    part: Array

    def at(self, left: Array) -> float:
        """Return the cost when the share `left` (groups,) of each group's channels is kept."""
        return float(self.amount @ np.prod(self.whole + self.part @ left, axis=1))


def removal_path(curves: Sequence[Curve], cost: Callable[[Counts], float]) -> list[Counts]:
    """Return how many channels each group keeps, from all to the fewest, each step the best bargain of those left.

    A step takes one group to any smaller count of its curve; the one with the least error per saved cost is taken.
    """
    rising = [curve.rising() for curve in curves]
    at = [0] * len(curves)
    path = [tuple(curve.counts[0] for curve in curves)]
    while True:
        here = path[-1]
        now, best = cost(here), (np.inf, -1, -1)
        for g, curve in enumerate(rising):
            for k in range(at[g] + 1, len(curve.counts)):
                saved = now - cost((*here[:g], curve.counts[k], *here[g + 1 :]))
                price = (curve.errors[k] - curve.errors[at[g]]) / saved if saved > 0 else np.inf
                best = min(best, (price, g, k))
        price, g, k = best
        if not np.isfinite(price):
            return path
        at[g] = k
        path.append(tuple(c.counts[i] for c, i in zip(curves, at, strict=True)))


def latency_left(curves: Sequence[Curve], counts: Counts) -> float:
    """Return the share of the latency that is left with `counts`, if what groups save adds up."""
    saved = (1 - dict(zip(c.counts, c.latencies, strict=True))[n] for c, n in zip(curves, counts, strict=True))
    return 1 - sum(max(0.0, s) for s in saved)


def first_that_fits(path: Sequence[Counts], fits: Callable[[Counts], bool]) -> int | None:
    """Return the first position of `path` that `fits`, by bisection (behind it everything should fit), or None."""
    low, high = 0, len(path) - 1
    if not fits(path[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(path[middle]) else (middle + 1, high)
    return low


def given_back(curves: Sequence[Curve], counts: Counts, fits: Callable[[Counts], bool]) -> Counts:
    """Return `counts` with channels given back to groups, as far as it still `fits`: what helps most first.

    The step that goes below a budget often goes far below it.
    """
    rising = [dict(zip(x.counts, x.rising().errors, strict=True)) for x in curves]
    while True:
        moves = [
            (errors[counts[g]] - error, g, count)
            for g, errors in enumerate(rising)
            for count, error in errors.items()
            if count > counts[g]
        ]
        for _, g, count in sorted(moves, key=lambda move: -move[0]):
            tried = (*counts[:g], count, *counts[g + 1 :])
            if fits(tried):
                counts = tried
                break
        else:
            return counts


def trades_of(curves: Sequence[Curve], counts: Counts, over: Callable[[Counts], float]) -> list[Counts]:
    """Return what costs no more than `counts`: one group keeps fewer, and others get channels back for it.

    Those that lose least come first, if what single groups lose adds up.

    Args:
        curves: of all groups.
        counts: what they keep; fits.
        over: the cost of counts as a multiple of what is allowed, or of what `counts` cost if that is more.
    """
    limit = max(1.0, over(counts))
    found: dict[Counts, None] = {}
    for steps in range(1, max(len(c.counts) for c in curves)):
        for g, curve in enumerate(curves):
            at = curve.counts.index(counts[g]) + steps
            if at >= len(curve.counts):
                continue
            # A group that has given does not get back.
            held = [Curve(counts=(c.counts[at],), errors=(0.0,)) if k == g else c for k, c in enumerate(curves)]
            tried = given_back(held, (*counts[:g], curve.counts[at], *counts[g + 1 :]), lambda c: over(c) <= limit)
            if any(a > b for a, b in zip(tried, counts, strict=True)):
                found[tried] = None
    lost = [dict(zip(c.counts, c.rising().errors, strict=True)) for c in curves]
    return sorted(found, key=lambda t: (sum(errors[n] for errors, n in zip(lost, t, strict=True)), t))


def channels_kept(score: Array, free: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Return which channels stay: all that are not `free`, and the best of the others up to `count` in all.

    Args:
        score: (channels,) importance; of equals the first stay.
        free: (channels,) which may go.
        count: at least the number of channels that may not.
    """
    order = np.argsort(np.where(free, -score, -np.inf), kind="stable")
    keep = np.zeros(score.size, bool)
    keep[order[:count]] = True
    return keep | ~free
