"""The gate: is the candidate good enough, given what was measured and how sure we are?

Three outcomes. `pass`: the confidence bound is inside the limit. `fail`: the observed value itself is outside.
`inconclusive`: the observed value is inside but the bound is not; the check says how many more samples would decide.
Only pass releases. Pure and deterministic; anything missing is a refusal, never a pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from pydantic import Field, model_validator

from qcore.budgets import Budgets, budget_checks
from qcore.config import Config
from qcore.errors import GateRefused
from qcore.groups import Counts, Family, judge_groups
from qcore.numerics.bounds import (
    Estimate,
    Floats,
    mean_of,
    paired_lower_bound,
    rate_lower_bound,
    roc_areas,
    upper_bound,
)
from qcore.recount import refuse_contradictions
from qcore.report import Check, EvaluationReport, GateDecision, Outcome, PairedCounts

MAX_SAMPLES = 10_000_000
FEWEST_VALUES = 100
"""Below it the bound of a mean is not conservative where differences are skewed."""
FEWEST_OF_A_KIND = 20
"""Anomalies, and normal samples, below which the bound of an area is not conservative."""


class MetricLimit(Config):
    """Limits of one metric, as fractions of 1: `min` for its own value, `max_drop` against the float baseline."""

    min: float | None = Field(default=None, gt=0, le=1)
    max_drop: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _something(self) -> "MetricLimit":
        if self.min is None and self.max_drop is None:
            raise ValueError("a metric limit holds min, max_drop, or both")
        return self


class ErrorLimit(Config):
    """Limits of the mean absolute error, in the unit of the targets: its own, and its increase against the baseline."""

    max: float | None = Field(default=None, gt=0)
    max_increase: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _something(self) -> "ErrorLimit":
        if self.max is None and self.max_increase is None:
            raise ValueError("an error limit holds max, max_increase, or both")
        return self


class ValueLimit(Config):
    """How much worse the mean of a metric of the user may be than the baseline's, in its own unit."""

    max_loss: float = Field(gt=0)


class GroupLimit(Config):
    """How much top-1 each slice or class may lose, as a fraction of 1, shown for all of them together (Holm).

    Groups of fewer than `min_support` samples are listed as not judged; with `require` that fails the check.
    """

    max_drop: float = Field(gt=0, lt=1)
    min_support: int = Field(default=50, gt=0)
    require: bool = False


class GatePolicy(Config):
    """What a release must satisfy.

    `confidence` is one-sided and holds for every check by itself; `slices` and `classes` are one check each, over all
    their groups. `top1`, `top5`, `slices` and `classes` need labels, `mae` a regression, `auc` (area under the ROC
    curve) anomalies; `metrics` names metrics of the user. `agreement` (share of samples
    on which candidate and baseline name the same class) has no drop, only a minimum. `output_sqnr_db` is the least
    ratio of the outputs' power to the power of their error, in dB, over all samples and in every output; it has no
    confidence bound.
    """

    name: str = "default"
    confidence: float = Field(default=0.95, ge=0.8, lt=1)
    top1: MetricLimit | None = None
    top5: MetricLimit | None = None
    agreement: MetricLimit | None = None
    output_sqnr_db: float | None = Field(default=None, ge=-300, le=300)
    mae: ErrorLimit | None = None
    auc: MetricLimit | None = None
    metrics: dict[str, ValueLimit] = Field(default_factory=dict)
    slices: GroupLimit | None = None
    classes: GroupLimit | None = None
    budgets: Budgets = Budgets()

    @model_validator(mode="after")
    def _asks_something(self) -> "GatePolicy":
        fields = ("top1", "top5", "agreement", "output_sqnr_db", "mae", "auc", "slices", "classes")
        if not self.metrics and all(getattr(self, name) is None for name in fields):
            raise ValueError(
                f"a policy limits at least one of {', '.join(fields)}, metrics; asking nothing would pass everything"
            )
        if self.agreement is not None and self.agreement.max_drop is not None:
            raise ValueError("agreement has no max_drop; set min")
        return self


def default_policy(report: EvaluationReport) -> GatePolicy:
    """Return the policy used when none is given.

    With classes, one point of top-1; for anomalies, one point of the area under the ROC curve; of a regression, a
    twentieth more mean absolute error than the baseline's. Without labels, 97 % agreement and an output error of at
    most a tenth of the outputs' power (10 dB); where outputs name no class, a hundredth (20 dB), since nothing else
    speaks for the candidate.
    """
    if report.paired is not None:
        return GatePolicy(top1=MetricLimit(max_drop=0.01))
    if "auc" in report.metrics:
        return GatePolicy(auc=MetricLimit(max_drop=0.01))
    if (error := report.metrics.get("baseline_mae", 0.0)) > 0:
        return GatePolicy(mae=ErrorLimit(max_increase=error / 20))
    if "agreement" in report.metrics:
        return GatePolicy(agreement=MetricLimit(min=0.97), output_sqnr_db=10)
    return GatePolicy(output_sqnr_db=20)


def decide(report: EvaluationReport, policy: GatePolicy) -> GateDecision:
    """Return the decision on the candidate of `report`.

    Raises:
        GateRefused: the policy limits something that was not measured, or the report contradicts itself.
    """
    refuse_contradictions(report)
    checks = [
        *_accuracy_checks(report, policy),
        *_agreement_checks(report, policy),
        *_output_checks(report, policy),
        *_error_checks(report, policy),
        *_area_checks(report, policy),
        *_user_checks(report, policy),
        *_group_checks(report, policy),
        *budget_checks(report, policy.budgets, policy.confidence),
    ]
    outcomes = {c.outcome for c in checks}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    return GateDecision(
        outcome=outcome,
        checks=tuple(checks),
        confidence=policy.confidence,
        n=report.n,
        model_sha256=report.model.sha256,
        baseline_sha256=report.baseline.sha256,
        data_sha256=report.data.sha256,
        policy_sha256=policy.sha256,
        report_sha256=report.sha256,
        qcore_version=report.qcore_version,
        metrics=dict(report.metrics),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """Is the one-sided bound of an estimate at least `limit`?

    `bound_at(n)` is the bound if the observed rates held for n samples; `counts` says what was seen, in words. Of
    fewer than `fewest` samples the bound is not to be trusted, whatever it says.
    """

    name: str
    observed: float
    limit: float
    bound_at: Callable[[float], float]
    counts: str
    fewest: int = 1


def _accuracy_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    checks = []
    five = report.details.top5 if report.details is not None else None
    for name, limit, paired in (("top1", policy.top1, report.paired), ("top5", policy.top5, five)):
        if limit is None:
            continue
        if paired is None:
            why = "the data has no labels" if report.paired is None else "the model tells five classes apart or fewer"
            raise GateRefused(f"the policy limits {name} but {why}; limit agreement or top1 instead")
        checks += _share_checks(name, limit, paired, policy)
    return checks


def _share_checks(name: str, limit: MetricLimit, paired: PairedCounts, policy: GatePolicy) -> list[Check]:
    checks, n = [], paired.n
    if limit.max_drop is not None:
        wins, losses = paired.only_candidate_right, paired.only_baseline_right
        question = _Question(
            name=f"{name}_drop",
            observed=(wins - losses) / n,
            limit=-limit.max_drop,
            bound_at=lambda m: paired_lower_bound(wins / n * m, losses / n * m, m, policy.confidence),
            counts=f"{losses} lost and {wins} won of {n} samples",
        )
        checks.append(_answer(question, n))
    if limit.min is not None:
        right = paired.both_right + paired.only_candidate_right
        checks.append(_answer(_rate_question(f"{name}_min", right, limit.min, (n, policy)), n))
    return checks


def _agreement_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    if policy.agreement is None or policy.agreement.min is None:
        return []
    if "agreement" not in report.metrics:
        raise GateRefused(
            "the policy limits agreement but the outputs name no class (one value per sample); limit output_sqnr_db"
        )
    agreed = round(report.metrics["agreement"] * report.n)
    return [_answer(_rate_question("agreement_min", agreed, policy.agreement.min, (report.n, policy)), report.n)]


def _output_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.output_sqnr_db
    if limit is None:
        return []
    if "output_sqnr_db" not in report.metrics:
        raise GateRefused("the policy limits output_sqnr_db, which the report lacks; run `qcore evaluate` again")
    observed = report.metrics["output_sqnr_db"]
    return [
        Check(
            name="output_sqnr_db",
            outcome="pass" if observed >= limit else "fail",
            observed=observed,
            bound=observed,
            limit=limit,
            reason=f"dB of the worst output over {report.n} samples",
        )
    ]


def _rate_question(name: str, hits: int, limit: float, of: tuple[int, GatePolicy]) -> _Question:
    n, policy = of
    return _Question(
        name=name,
        observed=hits / n,
        limit=limit,
        bound_at=lambda m: rate_lower_bound(hits / n * m, m, policy.confidence),
        counts=f"{hits} of {n} samples",
    )


def _error_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.mae
    if limit is None:
        return []
    if report.data.task != "regression":
        raise GateRefused(f"the policy limits mae but the task is {report.data.task}; limit what that task measures")
    errors = report.samples.values["absolute_error"]
    theirs, ours = (np.array(column, np.float64) for column in (errors.baseline, errors.candidate))
    checks = []
    if limit.max_increase is not None:
        checks.append(_upper("mae_increase", ours - theirs, limit.max_increase, policy.confidence))
    if limit.max is not None:
        checks.append(_upper("mae_max", ours, limit.max, policy.confidence))
    return checks


def _upper(name: str, column: Floats, limit: float, confidence: float) -> Check:
    """Return the check that the mean of `column` is at most `limit`."""
    lower = _lower("least", column, -limit, confidence)
    return replace(lower, name=name, observed=0.0 - lower.observed, bound=0.0 - lower.bound, limit=limit)


def _lower(name: str, losses: Floats, limit: float, confidence: float) -> Check:
    """Return the check that the mean of `losses`, seen as a change for the worse, is at most `-limit`."""
    n = len(losses)
    if n < 2:
        raise GateRefused(f"{name} of {n} sample says nothing; allowed: at least {FEWEST_VALUES}; add samples")
    estimate = mean_of(losses)
    question = _Question(
        name=name,
        observed=0.0 - estimate.value,
        limit=limit,
        bound_at=lambda m: 0.0 - upper_bound(estimate, m / n, confidence),
        counts=f"mean of {n} samples, {int(np.sum(losses > 0))} of them worse and {int(np.sum(losses < 0))} better",
        fewest=FEWEST_VALUES,
    )
    return _answer(question, n)


def _area_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.auc
    if limit is None:
        return []
    label = report.samples.label
    if report.data.task != "anomaly" or label is None:
        raise GateRefused(f"the policy limits auc but the task is {report.data.task}; limit what that task measures")
    positive, scores = np.array(label) == 1, report.samples.values["score"]
    odd = int(positive.sum())
    scarcer = min(odd, report.n - odd)
    if scarcer < 2:
        raise GateRefused(f"auc rests on {scarcer} sample; allowed: {FEWEST_OF_A_KIND} of 0 and of 1; add samples")
    areas = roc_areas(positive, *(np.array(c, np.float64) for c in (scores.baseline, scores.candidate)))
    asked = []
    if limit.max_drop is not None:
        asked.append(("auc_drop", areas.drop, areas.candidate - areas.baseline, -limit.max_drop, 0.0))
    if limit.min is not None:
        asked.append(("auc_min", areas.missing, areas.candidate, limit.min, 1.0))
    checks = []
    for name, estimate, observed, least, whole in asked:
        question = _Question(
            name=name,
            observed=observed,
            limit=least,
            bound_at=partial(_area_bound, estimate, whole, (report.n, policy.confidence)),
            counts=f"{odd} anomalies among {report.n} samples",
            fewest=math.ceil(FEWEST_OF_A_KIND * report.n / scarcer),
        )
        checks.append(_answer(question, report.n))
    return checks


def _area_bound(estimate: Estimate, whole: float, of: tuple[int, float], m: float) -> float:
    n, confidence = of
    return whole - upper_bound(estimate, m / n, confidence)


def _user_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    checks = []
    for name, limit in policy.metrics.items():
        direction = report.user_metrics.get(name)
        if direction is None:
            known = ", ".join(report.user_metrics) or "none"
            raise GateRefused(f"the policy limits metric {name!r}, which was not measured; known: {known}; add it")
        values = report.samples.values[name]
        worse = np.array(values.baseline, np.float64) - np.array(values.candidate, np.float64)
        worse = worse if direction == "higher" else -worse
        checks.append(_lower(f"{name}_change", worse, -limit.max_loss, policy.confidence))
    return checks


def _group_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    if policy.slices is None and policy.classes is None:
        return []
    s = report.samples
    if report.paired is None or s.label is None:
        raise GateRefused("the policy limits slices or classes of top-1 but the data has no classes; leave them out")
    label, theirs, ours = (np.array(c, np.int64) for c in (s.label, s.baseline, s.candidate))
    won, lost = (ours == label) & (theirs != label), (ours != label) & (theirs == label)
    checks = []
    if policy.slices is not None:
        if not report.slices:
            raise GateRefused("the policy limits slices but the data card has none; add `slices` and evaluate again")
        chosen = {name: np.array(places, np.int64) for name, places in report.slices.items()}
        counted = {
            name: Counts(n=len(k), wins=int(won[k].sum()), losses=int(lost[k].sum())) for name, k in chosen.items()
        }
        checks.append(judge_groups(_family("slices_drop", policy.slices, report.n, policy.confidence), counted))
    if policy.classes is not None:
        columns = [np.bincount(label, weights=w).astype(np.int64).tolist() for w in (None, won, lost)]
        rows = enumerate(zip(*columns, strict=True))
        by_class = {f"class {k}": Counts(n=n, wins=w, losses=b) for k, (n, w, b) in rows if n}
        checks.append(judge_groups(_family("classes_drop", policy.classes, report.n, policy.confidence), by_class))
    return checks


def _family(name: str, limit: GroupLimit, total: int, confidence: float) -> Family:
    return Family(
        name=name,
        max_drop=limit.max_drop,
        min_support=limit.min_support,
        require=limit.require,
        confidence=confidence,
        total=total,
    )


def _answer(question: _Question, n: int) -> Check:
    bound = question.bound_at(n)
    few = n < question.fewest
    outcome: Outcome
    needs, reason = None, question.counts
    if question.observed < question.limit:
        outcome, reason = "fail", f"{question.counts}: the observed value is outside the limit"
        bound = min(bound, question.observed)
    elif bound >= question.limit and not few:
        outcome = "pass"
    else:
        outcome, reason = "inconclusive", f"{question.counts}: inside the limit, but too few samples to be sure"
        total = _samples_needed(question.bound_at, question.limit, max(n, question.fewest))
        needs = None if total is None else total - n
        bound = min(bound, math.nextafter(question.limit, -math.inf)) if few else bound
    return Check(
        name=question.name,
        outcome=outcome,
        observed=question.observed,
        bound=bound,
        limit=question.limit,
        reason=reason,
        needs_samples=needs,
    )


def _samples_needed(bound_at: Callable[[float], float], limit: float, n: int) -> int | None:
    """Return the smallest total at which the bound reaches the limit, None beyond ten million."""
    enough = n
    while bound_at(enough) < limit:
        enough *= 2
        if enough > MAX_SAMPLES:
            return None
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if bound_at(middle) >= limit else (middle, enough)
    return enough
