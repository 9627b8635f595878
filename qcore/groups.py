"""Slices and classes judged together: each is shown not to have lost too much, with one error rate for all of them.

Holm's step-down correction over the family, at paired non-inferiority tests of the share of right answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcore.numerics.bounds import paired_lower_bound, paired_p_value
from qcore.report import Check, Group, Outcome

NOTHING_KNOWN = -1.0
"""The bound of a group that was not judged: everything may have been lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Samples of one group: all, those that only the candidate has right, those that only the baseline has right."""

    n: int
    wins: int
    losses: int

    @property
    def change(self) -> float:
        """The observed change of the share of right answers."""
        return (self.wins - self.losses) / self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What is asked of groups: how much each may lose, how many samples it needs to be judged, and the confidence.

    `require` makes a group that cannot be judged a failure. `total` is the number of all samples.
    """

    name: str
    max_drop: float
    min_support: int
    require: bool
    confidence: float
    total: int


def levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """Return the level that each p-value is held against: with it, all `p <= level` are shown at `alpha` together.

    The smallest of K is held against alpha / K, the next against alpha / (K - 1), and so on; from the first that is
    larger than its level on, all are held against that one's level and none is shown.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    order = sorted(range(len(p_values)), key=lambda k: (p_values[k], k))
    found = [0.0] * len(order)
    stopped: float | None = None
    for rank, k in enumerate(order):
        level = stopped if stopped is not None else alpha / (len(order) - rank)
        if p_values[k] > level:
            stopped = level
        found[k] = level
    return found


def judge_groups(family: Family, counted: Mapping[str, Counts]) -> Check:
    """Return the check on all groups; observed value and bound are those of the worst one.

    No group with enough samples: nothing is known, so the check does not pass.
    """
    judged = {name: c for name, c in counted.items() if c.n >= family.min_support}
    p_values = [paired_p_value(c.wins, c.losses, c.n, family.max_drop) for c in judged.values()]
    held = dict(zip(judged, zip(p_values, levels(p_values, 1 - family.confidence), strict=True), strict=True))
    groups = tuple(
        _judged(family, name, c, *held[name]) if name in held else _not_judged(family, name, c)
        for name, c in counted.items()
    )
    unjudged = len(groups) - len(judged)
    outcomes = [g.outcome for g in groups if g.outcome != "not judged"]
    outcome: Outcome = "pass"
    if "fail" in outcomes or (family.require and unjudged):
        outcome = "fail"
    elif "inconclusive" in outcomes or not judged:
        outcome = "inconclusive"
    worst = min((g for g in groups if g.bound is not None), key=lambda g: g.bound or 0.0, default=None)
    known = worst is not None and not (family.require and unjudged)
    return Check(
        name=family.name,
        outcome=outcome,
        observed=NOTHING_KNOWN if worst is None or worst.observed is None else worst.observed,
        bound=worst.bound if known and worst is not None and worst.bound is not None else NOTHING_KNOWN,
        limit=-family.max_drop,
        reason=_reason(groups, worst, family),
        needs_samples=_needed(family, counted, held) if outcome == "inconclusive" else None,
        groups=groups,
    )


def _judged(family: Family, name: str, c: Counts, p_value: float, level: float) -> Group:
    bound = paired_lower_bound(c.wins, c.losses, c.n, 1 - level)
    counts = f"{c.losses} lost and {c.wins} won of {c.n} samples"
    outcome: Outcome = "inconclusive"
    if p_value <= level and bound >= -family.max_drop:
        outcome = "pass"
    elif c.change < -family.max_drop:
        outcome = "fail"
    elif bound >= -family.max_drop:  # equal but for rounding, and the p-value says no
        bound = min(bound, -family.max_drop) - 1e-12
    return Group(name=name, support=c.n, outcome=outcome, observed=c.change, bound=bound, reason=counts)


def _not_judged(family: Family, name: str, c: Counts) -> Group:
    return Group(
        name=name,
        support=c.n,
        outcome="not judged",
        observed=c.change if c.n else None,
        bound=None,
        reason=f"{c.n} samples; {family.min_support} are needed",
    )


def _reason(groups: Sequence[Group], worst: Group | None, family: Family) -> str:
    """Return in words how many groups were judged, the worst one, and which were not."""
    left = [g.name for g in groups if g.outcome == "not judged"]
    few = f"not judged, with fewer than {family.min_support} samples: {', '.join(left[:5])}" if left else ""
    few += f" and {len(left) - 5} more" if len(left) > 5 else ""
    if worst is None:
        asked = "`require` asks for every group, and no group was judged" if family.require else "no group was judged"
        return "; ".join(part for part in (asked, few) if part)
    passed = sum(g.outcome == "pass" for g in groups)
    said = f"{passed} of {len(groups) - len(left)} judged pass; the worst is {worst.name}: {worst.reason}"
    if few and family.require:
        return f"`require` asks for every group, and {len(left)} cannot be judged: {few}; {said}"
    return f"{said}; {few}" if few else said


def _needed(family: Family, counted: Mapping[str, Counts], held: Mapping[str, tuple[float, float]]) -> int | None:
    """Return the further samples of the whole split that decide every open group at the observed rates."""
    most = 0.0
    for name, (p_value, level) in held.items():
        c, factor = counted[name], 1.0
        while p_value > level:
            factor *= 1.1
            p_value = paired_p_value(c.wins * factor, c.losses * factor, c.n * factor, family.max_drop)
            if factor > 1e4:
                return None
        most = max(most, factor)
    if not held:
        largest = max((c.n for c in counted.values()), default=0)
        most = family.min_support / largest if largest else 0.0
    return int(family.total * (most - 1)) + 1 if most > 1 else None
