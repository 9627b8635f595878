"""Confidence bounds of a median from order statistics: no assumption about how values are spread.

What is timed has outliers of any size and no known distribution; the median and its bounds do not see how far out they
are. Pure functions; `tests/qcore/numerics/test_order.py` checks the error rates on drifting, disturbed series.
"""

from collections.abc import Sequence

from scipy.special import bdtr

MOST_RUNS = 1_000_000


def median_rank(n: int, confidence: float) -> int | None:
    """Return the rank, from 1 in ascending order, of the value that is an upper bound of the median; None: too few.

    The k-th of n independent values lies below the median with probability P(Binomial(n, 1/2) >= k), whatever their
    distribution, so the smallest k with P(Binomial(n, 1/2) < k) >= `confidence` is never more sure than stated by
    more than the lattice of ranks costs. The lower bound is the value of rank n + 1 - k.

    Args:
        n: number of values.
        confidence: one-sided, in (0.5, 1).

    Source: Thompson 1936, Annals of Mathematical Statistics 7:122-128; David and Nagaraja, Order Statistics, 7.1.
    """
    low, high = n // 2, n + 1  # of n + 1 ranks none would be enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bdtr(middle - 1, n, 0.5) >= confidence else (middle, high)
    return high if high <= n else None


def median_bounds(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Return the lower and the upper one-sided bound of the median of what `values` are drawn from; None: too few."""
    k = median_rank(len(values), confidence)
    if k is None:
        return None
    ordered = sorted(values)
    return ordered[len(values) - k], ordered[k - 1]


def runs_needed(inside: int, n: int, confidence: float) -> int | None:
    """Return the total of values at which the upper bound reaches a limit that `inside` of `n` do not exceed.

    The share that is inside is taken to stay what it is. None: it is half of them or fewer, or more than a million
    would be needed.
    """
    if 2 * inside <= n:
        return None

    def enough(total: int) -> bool:
        k = median_rank(total, confidence)
        return k is not None and k * n <= inside * total

    high = max(n, 1)
    while not enough(high):
        high *= 2
        if high > MOST_RUNS:
            return None
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
