"""Automatic mixed precision: which layers get more than 8 bits, so that an error budget holds at the least cost.

A pure search: layers come ranked by sensitivity, trials are the caller's. Layers are promoted from the most sensitive
on, and how many is found by bisection; what turns out not to be needed is demoted again. An answer that says the
budget holds was itself tried.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from qcore.canonical import Json
from qcore.target import Precision

LADDER: tuple[Precision, ...] = ("int16", "float16", "float")
"""What a layer can be promoted to from int8, cheapest first."""
MAX_DEMOTIONS = 16

Assignment = Mapping[str, Precision]
"""What layers run in instead of int8, by node name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one assignment costs: `error` in the unit of the budget, file size, and latency where it was measured."""

    error: float
    size_bytes: int
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An assignment that was tried, and what came out."""

    precision: Assignment
    trial: Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionSearch:
    """The end of a search.

    Invariant: `chosen` is among `attempts`, and if the budget is `met`, `chosen.trial.error <= max_error`. If not, it
    is the attempt of least error. `why` says in words what was chosen and why the search stopped.
    """

    met: bool
    max_error: float
    chosen: Attempt
    attempts: tuple[Attempt, ...]
    why: str

    @property
    def pareto(self) -> tuple[Attempt, ...]:
        """The attempts that no other one beats in error, size and latency at once, smallest file first."""
        front = [a for a in self.attempts if not any(_dominates(b.trial, a.trial) for b in self.attempts)]
        return tuple(sorted(front, key=lambda a: (a.trial.size_bytes, a.trial.error)))

    def to_json(self) -> Json:
        """Return the JSON form; the Pareto front as positions in `attempts`."""
        value = asdict(self)
        return {**value, "pareto": [self.attempts.index(a) for a in self.pareto]}


def search_precision(
    ranked: Sequence[str],
    run: Callable[[Assignment], Trial],
    precisions: Sequence[Precision],
    max_error: float,
    max_demotions: int = MAX_DEMOTIONS,
) -> PrecisionSearch:
    """Return the assignment of least promotion found whose error is at most `max_error`.

    With n layers and p precisions at most `1 + p (2 + log2 n) + max_demotions` trials run, none twice.

    Args:
        ranked: layers, the most sensitive first.
        run: tries an assignment; layers that it does not name run in int8.
        precisions: what the device knows besides int8.
        max_error: the budget, in the unit of `Trial.error`.
        max_demotions: most trials that take back single promotions.
    """
    search = _Search(ranked=tuple(ranked), run=run, max_error=max_error, attempts={})
    levels: list[Precision | None] = [None, *(p for p in LADDER if p in precisions)]
    top = next((k for k in range(len(levels)) if _holds(search, _all_at(search.ranked, levels[k]))), None)
    if top is None:
        best = min(search.attempts.values(), key=lambda a: a.trial.error)
        allowed = ", ".join(str(p) for p in levels[1:]) or "nothing"
        why = f"the budget does not hold with all layers promoted; the device allows {allowed} besides int8"
        return _finished(search, best.precision, False, why)
    assignment = _fewest(search, levels[: top + 1])
    assignment = _demoted(search, assignment, max_demotions)
    counts = ", ".join(f"{list(assignment.values()).count(p)} in {p}" for p in LADDER if p in assignment.values())
    why = f"{counts} of {len(ranked)} layers" if counts else "int8 everywhere"
    error = _tried(search, assignment).trial.error
    return _finished(search, assignment, True, f"{why}: error {error:.4g}, budget {max_error:.4g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """The question, and what was tried, in order, by assignment."""

    ranked: tuple[str, ...]
    run: Callable[[Assignment], Trial]
    max_error: float
    attempts: dict[tuple[tuple[str, Precision], ...], Attempt]


def _tried(search: _Search, assignment: Assignment) -> Attempt:
    """Return the attempt at `assignment`, run if it is new."""
    key = tuple(sorted(assignment.items()))
    if key not in search.attempts:
        search.attempts[key] = Attempt(precision=dict(key), trial=search.run(dict(key)))
    return search.attempts[key]


def _holds(search: _Search, assignment: Assignment) -> bool:
    return _tried(search, assignment).trial.error <= search.max_error


def _all_at(nodes: Sequence[str], level: Precision | None) -> dict[str, Precision]:
    return {} if level is None else dict.fromkeys(nodes, level)


def _fewest(search: _Search, levels: Sequence[Precision | None]) -> dict[str, Precision]:
    """Return an assignment that holds: a prefix of the ranking at the last level, the next layers one level lower ...

    All layers at the last of `levels` are known to hold.
    """
    done: dict[str, Precision] = {}
    rest = search.ranked
    for upper, lower in zip(reversed(levels[1:]), reversed(levels[:-1]), strict=True):
        low, high = 0, len(rest)
        while low < high:
            middle = (low + high) // 2
            split = {**done, **_all_at(rest[:middle], upper), **_all_at(rest[middle:], lower)}
            low, high = (low, middle) if _holds(search, split) else (middle + 1, high)
        done |= _all_at(rest[:high], upper)
        rest = rest[high:]
    return done


def _demoted(search: _Search, assignment: dict[str, Precision], most: int) -> dict[str, Precision]:
    """Return `assignment` without the promotions that the budget can spare, tried from the least sensitive layer on."""
    promoted = [node for node in reversed(search.ranked) if node in assignment]
    for node in promoted[:most]:
        without = {k: v for k, v in assignment.items() if k != node}
        if _holds(search, without):
            assignment = without
    return assignment


def _finished(search: _Search, assignment: Assignment, met: bool, why: str) -> PrecisionSearch:
    return PrecisionSearch(
        met=met,
        max_error=search.max_error,
        chosen=_tried(search, assignment),
        attempts=tuple(search.attempts.values()),
        why=why,
    )


def _dominates(a: Trial, b: Trial) -> bool:
    """Say whether `a` is at least as good as `b` in all that was measured of both, and better in something."""
    pairs = [(a.error, b.error), (a.size_bytes, b.size_bytes)]
    if a.latency_ms is not None and b.latency_ms is not None:
        pairs.append((a.latency_ms, b.latency_ms))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)
