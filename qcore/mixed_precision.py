"""Automatic mixed precision: which layers get more than 8 bits, so that an error budget holds at the least cost.

A pure search: layers come ranked by sensitivity, trials are the caller's, and so is the budget: a trial says whether
it holds, be that a number or a gate's decision. Layers are promoted from the most sensitive on, and how many is found
by bisection; what turns out not to be needed is demoted again. An answer that says the budget holds was itself tried.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from qcore.canonical import Json
from qcore.pareto.front import dominates, pareto_front
from qcore.target import Precision

LADDER: tuple[Precision, ...] = ("int16", "float16", "float")
"""What a layer can be promoted to from what the recipe makes of it, cheapest first."""
MAX_DEMOTIONS = 16

Assignment = Mapping[str, Precision]
"""What layers run in instead of what the recipe makes of them, by node name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one assignment costs: error, file size, and latency where it was measured.

    `holds` says whether the budget does; `error` tells which of two that do not is nearer. It is infinite, and the
    size 0, where the model gives no finite numbers.
    """

    error: float
    size_bytes: int
    holds: bool
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """An assignment that was tried, and what came out."""

    precision: Assignment
    trial: Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionSearch:
    """The end of a search.

    Invariant: `chosen` is among `attempts`, and if the budget is `met`, `chosen.trial.holds`. If not, it is the attempt
    of least error. `budget` says in words what had to hold, `why` what was chosen, why the search stopped, and which
    attempt is better in all that was measured, if one is.
    """

    met: bool
    budget: str
    chosen: Attempt
    attempts: tuple[Attempt, ...]
    why: str

    @property
    def pareto(self) -> tuple[int, ...]:
        """The positions of the attempts that no other one beats in error, size and latency at once."""
        return pareto_front([a.trial for a in self.attempts])

    def to_json(self) -> Json:
        """Return the JSON form; `chosen` and the Pareto front as positions in `attempts`, an infinite error as null."""
        attempts = [{"precision": dict(a.precision), **_trial_json(a.trial)} for a in self.attempts]
        position, better = self.attempts.index(self.chosen), _better(self.chosen, self.attempts)
        return {
            "met": self.met,
            "budget": self.budget,
            "why": self.why,
            "attempts": attempts,
            "chosen": position,
            "dominated_by": None if better is None else self.attempts.index(better),
            "pareto": list(self.pareto),
        }


def search_precision(
    ranked: Sequence[str],
    run: Callable[[Assignment], Trial],
    precisions: Sequence[Precision],
    budget: str,
    max_demotions: int = MAX_DEMOTIONS,
) -> PrecisionSearch:
    """Return the assignment of least promotion found that holds the budget.

    With n layers and p precisions at most `1 + p (2 + log2 n) + max_demotions` trials run, none twice.

    Args:
        ranked: layers, the most sensitive first.
        run: tries an assignment; layers that it does not name are as the recipe makes them.
        precisions: what the device knows besides.
        budget: in words, what a trial holds.
        max_demotions: most trials that take back single promotions.
    """
    search = _Search(ranked=tuple(ranked), run=run, budget=budget, attempts={})
    levels: list[Precision | None] = [None, *(p for p in LADDER if p in precisions)]
    top = next((k for k in range(len(levels)) if _holds(search, _all_at(search.ranked, levels[k]))), None)
    if top is None:
        best = min(search.attempts.values(), key=lambda a: a.trial.error)
        allowed = ", ".join(str(p) for p in levels[1:]) or "nothing"
        why = (
            f"{budget} does not hold with all layers promoted; the device allows {allowed} besides what the recipe "
            f"gives (least error {best.trial.error:.3g})"
        )
        return _finished(search, best.precision, False, why)
    assignment = _fewest(search, levels[: top + 1])
    assignment = _demoted(search, assignment, max_demotions)
    error, why = _tried(search, assignment).trial.error, in_words(assignment, len(ranked))
    return _finished(search, assignment, True, f"{why}: error {error:.3g}, {budget}")


def in_words(assignment: Assignment, layers: int) -> str:
    """Return how many of all `layers` run in what."""
    precisions = list(assignment.values())
    counts = ", ".join(f"{precisions.count(p)} in {p}" for p in LADDER if p in precisions)
    return f"{counts} of {layers} layers" if counts else "the recipe everywhere"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """The question, and what was tried, in order, by assignment."""

    ranked: tuple[str, ...]
    run: Callable[[Assignment], Trial]
    budget: str
    attempts: dict[tuple[tuple[str, Precision], ...], Attempt]


def _tried(search: _Search, assignment: Assignment) -> Attempt:
    """Return the attempt at `assignment`, run if it is new."""
    key = tuple(sorted(assignment.items()))
    if key not in search.attempts:
        search.attempts[key] = Attempt(precision=dict(key), trial=search.run(dict(key)))
    return search.attempts[key]


def _holds(search: _Search, assignment: Assignment) -> bool:
    return _tried(search, assignment).trial.holds


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
    chosen, attempts = _tried(search, assignment), tuple(search.attempts.values())
    if (better := _better(chosen, attempts)) is not None:
        words, trial = in_words(better.precision, len(search.ranked)), better.trial
        why += (
            f"; {words} is better in all that was measured (error {trial.error:.3g}, {trial.size_bytes:,} bytes "
            f"against {chosen.trial.size_bytes:,}): fewer promotions pay only if the device gains by them"
        )
    return PrecisionSearch(met=met, budget=search.budget, chosen=chosen, attempts=attempts, why=why)


def _better(chosen: Attempt, attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the attempt of least error among those that dominate the `chosen` one, or None."""
    better = [a for a in attempts if math.isfinite(a.trial.error) and dominates(a.trial, chosen.trial)]
    return min(better, key=lambda a: (a.trial.error, a.trial.size_bytes), default=None)


def _trial_json(trial: Trial) -> Json:
    return {**asdict(trial), "error": trial.error if math.isfinite(trial.error) else None}
