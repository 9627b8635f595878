"""The facts of a review: the verdict, what each candidate gains and loses, whose answers changed. Plain values.

Nothing is measured or decided here; every number comes from a report, a decision or another file of `source.py`.
Standard library only, so that tasks which only describe a run stay light.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qcore.canonical import Digest, Json
from qcore.measured import MeasuredModel
from qcore.pareto.front import pareto_front
from qcore.report import Check, EvaluationReport, GateDecision, MeasuredData, Outcome
from qcore.review.source import Candidate, Sources
from qcore.review.wording import by_name, count, cut, listed, percent, points

REVIEW_SCHEMA = "qcore.review/1"
SURE = 3
"""Checks that the sentence on how sure a verdict is speaks of."""

UNCHECKED = "Signature not checked here: `qcore gate verify` does."

Kind = Literal["share", "value", "decibel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What candidates are compared by on this task: the name of the metric, in words, and what kind of number it is."""

    key: str
    words: str
    kind: Kind
    higher: bool

    def worth(self, value: float) -> str:
        """Return a value as people read it."""
        return percent(value) if self.kind == "share" else by_name(self.key, value)

    def change(self, value: float) -> str:
        """Return a difference of two values as people read it, with its sign."""
        return points(value) if self.kind == "share" else f"{value:+.4g}"


TOP1 = Measure(key="top1", words="top-1 accuracy", kind="share", higher=True)
MAE = Measure(key="mae", words="mean absolute error", kind="value", higher=False)
AUC = Measure(key="auc", words="area under ROC", kind="share", higher=True)
AGREEMENT = Measure(key="agreement", words="agreement with float", kind="share", higher=True)
SQNR = Measure(key="output_sqnr_db", words="output SQNR", kind="decibel", higher=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassChange:
    """One class: its number and name (empty: unknown), its samples, and how many either model names right."""

    label: int
    name: str
    support: int
    baseline_right: int
    candidate_right: int

    @property
    def change(self) -> float:
        """The change of the share of right answers, as a fraction of 1; 0 for a class without samples."""
        return (self.candidate_right - self.baseline_right) / self.support if self.support else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A sample whose answer changed: its place in the split's data, its class (None: unlabelled), both answers."""

    index: int
    label: int | None
    baseline: int
    candidate: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """All samples whose answer changed; `other` are those that are wrong both times, or have no label."""

    right_to_wrong: tuple[Flip, ...]
    wrong_to_right: tuple[Flip, ...]
    other: tuple[Flip, ...]

    def named(self) -> Mapping[str, tuple[Flip, ...]]:
        """Return all kinds by name, what was lost first."""
        return {
            "right -> wrong": self.right_to_wrong,
            "wrong -> right": self.wrong_to_right,
            "another answer": self.other,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One candidate with what follows from its samples; `loss` is how much worse than float it is in `Measure`.

    `classes` are those with samples, the largest loss first.
    """

    source: Candidate
    loss: float
    classes: tuple[ClassChange, ...]
    flips: Flips
    on_front: bool

    @property
    def label(self) -> str:
        """What people call it."""
        return self.source.label

    @property
    def outcome(self) -> Outcome | None:
        """The gate's outcome; None where it was not asked."""
        return None if self.source.decision is None else self.source.decision.outcome

    @property
    def stands(self) -> str:
        """The gate's outcome in words; a pass that needed waivers says so."""
        decision = self.source.decision
        if decision is None:
            return "not judged"
        return "pass by waiver" if decision.outcome == "pass" and decision.waivers else decision.outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """What a reviewer reads.

    `subject` is the position of the candidate that the verdict is about: the first that passed the gate, else the
    first that was judged, else the first one. `verdict` is one sentence, `sure` says how sure it is and why,
    `signature` that nobody checked who signed the decisions; empty where somebody did, or there are none.
    """

    title: str
    verdict: str
    sure: str
    signature: str
    subject: int
    measure: Measure
    baseline: MeasuredModel
    data: MeasuredData
    n: int
    candidates: tuple[Judged, ...]
    classes: Mapping[int, str]

    @property
    def judged(self) -> Judged:
        """The candidate that the verdict is about."""
        return self.candidates[self.subject]

    @property
    def outcome(self) -> Outcome | Literal["not judged"]:
        """The gate's outcome for that candidate."""
        return self.judged.outcome or "not judged"

    def class_name(self, label: int) -> str:
        """Return the name of a class, its number where it has none."""
        return f"{label} {self.classes[label]}" if label in self.classes else str(label)


@dataclass(frozen=True, slots=True)
class _Dot:
    error: float
    size_bytes: int
    latency_ms: float | None


def review(sources: Sources) -> Review:
    """Return the review of all candidates in `sources`."""
    first = sources.candidates[0].report
    measure = _measure(first)
    losses = [_loss(c.report, measure) for c in sources.candidates]
    dots = [
        _Dot(loss, c.report.model.size_bytes, c.report.model.latency_ms.p50)
        for loss, c in zip(losses, sources.candidates, strict=True)
    ]
    front = pareto_front(dots)
    candidates = tuple(
        Judged(
            source=c,
            loss=losses[k],
            classes=_class_changes(c.report, sources.classes),
            flips=_flips(c.report),
            on_front=k in front,
        )
        for k, c in enumerate(sources.candidates)
    )
    subject = _subject(candidates)
    return Review(
        title=sources.title or _title(sources),
        verdict=_verdict(candidates[subject], measure),
        sure=_sure(candidates[subject]),
        signature="" if sources.vouched or candidates[subject].outcome is None else UNCHECKED,
        subject=subject,
        measure=measure,
        baseline=first.baseline,
        data=first.data,
        n=first.n,
        candidates=candidates,
        classes=dict(sources.classes),
    )


def _title(sources: Sources) -> str:
    """Return what a layer report calls the float model, what a package calls itself, or the digest."""
    layers = [c.layers.baseline for c in sources.candidates if c.layers is not None]
    packages = [c.package.release for c in sources.candidates if c.package is not None]
    gated = [c.decision.package for c in sources.candidates if c.decision is not None]
    named = [*layers, *packages, *(f"{p.family} {p.version}" for p in gated if p is not None)]
    return named[0] if named else f"model {sources.candidates[0].report.baseline.sha256[:12]}"


def _measure(report: EvaluationReport) -> Measure:
    by_task = {"classification": TOP1, "regression": MAE, "anomaly": AUC}
    measure = by_task.get(report.data.task)
    if measure is not None and measure.key in report.metrics:
        return measure
    return AGREEMENT if "agreement" in report.metrics else SQNR


def _loss(report: EvaluationReport, measure: Measure) -> float:
    """Return how much worse the candidate is than float; what float has no number for is held against perfect."""
    value = report.metrics[measure.key]
    if measure is SQNR:
        return -value
    ideal = report.metrics.get(f"baseline_{measure.key}", 1.0)
    return ideal - value if measure.higher else value - ideal


def _subject(candidates: tuple[Judged, ...]) -> int:
    outcomes = [c.outcome for c in candidates]
    for wanted in ("pass", "inconclusive", "fail"):
        if wanted in outcomes:
            return outcomes.index(wanted)
    return 0


def _class_changes(report: EvaluationReport, names: Mapping[int, str]) -> tuple[ClassChange, ...]:
    if report.details is None:
        return ()
    changes = [
        ClassChange(
            label=c.label,
            name=names.get(c.label, ""),
            support=c.support,
            baseline_right=c.baseline_right,
            candidate_right=c.candidate_right,
        )
        for c in report.details.classes
        if c.support
    ]
    return tuple(sorted(changes, key=lambda c: (c.change, -c.support, c.label)))


def _flips(report: EvaluationReport) -> Flips:
    s = report.samples
    lost: list[Flip] = []
    won: list[Flip] = []
    other: list[Flip] = []
    if s.baseline is not None and s.candidate is not None:
        labels = s.label or (None,) * len(s.index)
        for index, label, theirs, ours in zip(s.index, labels, s.baseline, s.candidate, strict=True):
            if theirs != ours:
                kind = lost if theirs == label else won if ours == label else other
                kind.append(Flip(index=index, label=label, baseline=theirs, candidate=ours))
    return Flips(right_to_wrong=tuple(lost), wrong_to_right=tuple(won), other=tuple(other))


def _verdict(judged: Judged, measure: Measure) -> str:
    name, metrics = cut(judged.label, 60), judged.source.report.metrics
    value, floats = metrics[measure.key], metrics.get(f"baseline_{measure.key}")
    against = "" if floats is None else f", float has {measure.worth(floats)}"
    stands = f"its {measure.words} is {measure.worth(value)}{against}"
    decision = judged.source.decision
    if decision is None:
        return f"NOT JUDGED: no gate decision on {name} was given; {stands}."
    if decision.outcome == "pass":
        by = ", ".join(signed.waiver.owner.name for signed in decision.waivers)
        how = f" BY WAIVER of {cut(by, 80)}" if by else ""
        return f"PASS{how}: {name} may be released; {stands}."
    waived = decision.waived
    open_checks = [c.name for c in decision.checks if c.outcome == decision.outcome and c.name not in waived]
    which = listed(open_checks, 4) or "a policy without checks"
    if decision.outcome == "fail":
        return f"FAIL: {name} must not be released, because of {which}; {stands}."
    return f"INCONCLUSIVE: the evidence is too thin to release {name} ({which}); {stands}."


def urgent_first(decision: GateDecision) -> list[Check]:
    """Return the checks of a decision: those that fail, are open, are waived, then those that pass."""
    order = {"fail": 0, "inconclusive": 1, "pass": 3}
    waived = decision.waived
    return sorted(decision.checks, key=lambda c: 2 if c.name in waived else order[c.outcome])


def _sure(judged: Judged) -> str:
    decision = judged.source.decision
    if decision is None:
        return "How sure: unknown, since nothing was tested against a policy. Run qcore gate on the report."
    ranked = urgent_first(decision)
    open_ = [c for c in ranked if c.outcome != "pass"]
    bounded = [c for c in ranked if c.bound != c.observed]
    told = open_ or bounded
    parts = [f"How sure: {100 * decision.confidence:.4g} % one-sided confidence on {decision.n:,} paired samples"]
    if not bounded:
        parts = ["How sure: no check has a confidence bound; values are compared as they were measured"]
    parts += [_bound(c, c.name in decision.waived) for c in told[:SURE]]
    if len(told) > SURE:
        parts.append(f"and {len(told) - SURE} more")
    if bounded and (plain := [c.name for c in ranked if c.bound == c.observed and c not in told[:SURE]]):
        parts.append(f"without a bound, compared as measured: {listed(plain, 3)}")
    more = max((c.needs_samples or 0 for c in decision.checks), default=0)
    if decision.outcome == "inconclusive" and more:
        parts.append(f"about {count(more, 'further sample')} would decide it at the observed rates")
    return "; ".join(parts) + "."


def _bound(check: Check, waived: bool) -> str:
    """Return what a check saw and what is allowed; its outcome, too, where it is not a pass."""
    observed, bound, limit = (by_name(check.name, v) for v in (check.observed, check.bound, check.limit))
    outcome = "" if check.outcome == "pass" else f" ({check.outcome}{', waived' if waived else ''})"
    worst = "" if check.bound == check.observed else f" and is at worst {bound}"
    return f"{cut(check.name, 40)}{outcome} was seen at {observed}{worst}, where {limit} is allowed"


def digests(judged: Judged) -> Mapping[str, Digest]:
    """Return every digest that the candidate's evidence is bound to, by what it is of."""
    source, report = judged.source, judged.source.report
    found = {"candidate": report.model.sha256}
    if source.package is not None:
        found["package"] = source.package.sha256
    found |= {"float model": report.baseline.sha256, "samples": report.data.sha256}
    if source.decision is not None:
        stated = source.decision.to_json()
        said = {k.removesuffix("_sha256"): v for k, v in stated.items() if k.endswith("_sha256")}
        known = {"model", "baseline", "data"}
        found |= {k.replace("_", " "): v for k, v in said.items() if k not in known and isinstance(v, str) and v}
        if source.decision.package is not None:
            found["package that was judged"] = source.decision.package.sha256
    found.setdefault("report", report.sha256)
    if source.summary is not None:
        found["recipe"] = source.summary.recipe_sha256
    if source.ranges is not None:
        found |= {"calibrated model": source.ranges.calibrated, "calibration samples": source.ranges.data_sha256}
    return found


def machine(report: EvaluationReport) -> Mapping[str, str]:
    """Return what was measured on, and with what."""
    return {**report.runtime, **report.machine}


def costs(report: EvaluationReport) -> Mapping[str, tuple[float | None, float | None]]:
    """Return what float model and candidate cost, by name with the unit at its end; None where it was not measured.

    Whatever number a report holds about a model is there; more is shown as soon as more is measured.
    """
    value = report.to_json()
    sides = [dict(_flat(value[name], "")) for name in ("baseline", "model")]
    names = list(dict.fromkeys(k for side in reversed(sides) for k in side))
    return {name: (sides[0].get(name), sides[1].get(name)) for name in names}


def _flat(value: Json, prefix: str) -> list[tuple[str, float]]:
    """Return all numbers below `value` by their path: `latency_ms: {p50: 1.0}` is `latency_p50_ms`."""
    found: list[tuple[str, float]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            stem, unit = (key[:-3], "_ms") if key.endswith("_ms") else (key, "")
            inner = _flat(item, "")
            found += [(f"{prefix}{stem}_{k}{unit if type(v) is float else ''}", v) for k, v in inner]
        elif type(item) in (int, float):
            found.append((f"{prefix}{key}", item))
    return found
