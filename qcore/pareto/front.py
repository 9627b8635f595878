"""The Pareto front over error, file size and latency. Pure, standard library only."""

import math
from collections.abc import Sequence
from typing import Protocol


class Costs(Protocol):
    """What a result costs; less is better. `latency_ms` is None where it was not measured."""

    @property
    def error(self) -> float:
        """How far it is from the float model, in the unit of its search."""

    @property
    def size_bytes(self) -> int:
        """The bytes of the file."""

    @property
    def latency_ms(self) -> float | None:
        """One inference, where the target is this machine."""


def pareto_front(results: Sequence[Costs]) -> tuple[int, ...]:
    """Return the positions of the `results` that no other one dominates, smallest file first; equals all stay.

    One whose error is infinite is none.
    """
    usable = [b for b in results if math.isfinite(b.error)]
    front = [k for k, a in enumerate(results) if math.isfinite(a.error) and not any(dominates(b, a) for b in usable)]
    return tuple(sorted(front, key=lambda k: (results[k].size_bytes, results[k].error, k)))


def dominates(a: Costs, b: Costs) -> bool:
    """Say whether `a` is at least as good as `b` in all that was measured of both, and better in something."""
    pairs: list[tuple[float, float]] = [(a.error, b.error), (a.size_bytes, b.size_bytes)]
    if a.latency_ms is not None and b.latency_ms is not None:
        pairs.append((a.latency_ms, b.latency_ms))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)
