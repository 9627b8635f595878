"""The gate: is the candidate good enough, given what was measured and how sure we are?

Three outcomes. `pass`: the confidence bound is inside the limit. `fail`: the observed value itself is outside.
`inconclusive`: the observed value is inside but the bound is not; the check says how many more samples would decide.
Only pass releases. Pure and deterministic; anything missing is a refusal, never a pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field, model_validator

from qcore.config import Config
from qcore.errors import GateRefused
from qcore.numerics.bounds import paired_lower_bound, rate_lower_bound
from qcore.report import Check, EvaluationReport, GateDecision, Outcome, PairedCounts

MAX_SAMPLES = 10_000_000
ROUNDING = 1e-12  # of a share that was computed twice in float64


class MetricLimit(Config):
    """Limits of one metric, as fractions of 1: `min` for its own value, `max_drop` against the float baseline."""

    min: float | None = Field(default=None, gt=0, le=1)
    max_drop: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _something(self) -> "MetricLimit":
        if self.min is None and self.max_drop is None:
            raise ValueError("a metric limit holds min, max_drop, or both")
        return self


class Budgets(Config):
    """Upper limits that have no sampling error: file size in bytes, and ratios candidate / baseline."""

    size_bytes: int | None = Field(default=None, gt=0)
    size_ratio: float | None = Field(default=None, gt=0)
    latency_ratio: float | None = Field(default=None, gt=0)


class GatePolicy(Config):
    """What a release must satisfy.

    `confidence` is one-sided and holds for every check by itself. `top1` needs labels. `agreement` (share of samples
    on which candidate and baseline name the same class) has no drop, only a minimum. `output_sqnr_db` is the least
    ratio of the outputs' power to the power of their error, in dB, over all samples and in every output; it has no
    confidence bound.
    """

    name: str = "default"
    confidence: float = Field(default=0.95, ge=0.8, lt=1)
    top1: MetricLimit | None = None
    agreement: MetricLimit | None = None
    output_sqnr_db: float | None = Field(default=None, ge=-300, le=300)
    budgets: Budgets = Budgets()

    @model_validator(mode="after")
    def _asks_something(self) -> "GatePolicy":
        if self.top1 is None and self.agreement is None and self.output_sqnr_db is None:
            raise ValueError("a policy limits top1, agreement or output_sqnr_db; asking nothing would pass everything")
        if self.agreement is not None and self.agreement.max_drop is not None:
            raise ValueError("agreement has no max_drop; set min")
        return self


def default_policy(report: EvaluationReport) -> GatePolicy:
    """Return the policy used when none is given.

    With labels, one point of top-1. Without, 97 % agreement and an output error of at most a tenth of the outputs'
    power (10 dB); where outputs name no class, a hundredth (20 dB), since nothing else speaks for the candidate.
    """
    if report.paired is not None:
        return GatePolicy(top1=MetricLimit(max_drop=0.01))
    if "agreement" in report.metrics:
        return GatePolicy(agreement=MetricLimit(min=0.97), output_sqnr_db=10)
    return GatePolicy(output_sqnr_db=20)


def decide(report: EvaluationReport, policy: GatePolicy) -> GateDecision:
    """Return the decision on the candidate of `report`.

    Raises:
        GateRefused: the policy limits something that was not measured, or the report contradicts itself.
    """
    _check_consistent(report)
    checks = [
        *_top1_checks(report, policy),
        *_agreement_checks(report, policy),
        *_output_checks(report, policy),
        *_budget_checks(report, policy),
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


def _check_consistent(report: EvaluationReport) -> None:
    """Refuse a report whose numbers do not follow from its own samples."""
    s = report.samples
    lengths = {len(s.index), len(s.baseline), len(s.candidate), *([len(s.label)] if s.label is not None else [])}
    if lengths != {report.n} or report.n == 0:
        raise GateRefused(
            f"the report says n={report.n} but holds {sorted(lengths)} samples; run `qcore evaluate` again"
        )
    if len(set(s.index)) != report.n:
        raise GateRefused("the report counts a sample twice; run `qcore evaluate` again")
    if any(not math.isfinite(v) for v in report.metrics.values()):
        raise GateRefused("the report holds a metric that is not finite; run `qcore evaluate` again")
    if (report.paired is None) != (s.label is None):
        raise GateRefused("the report has labels without paired counts; run `qcore evaluate` again")
    derived = {"agreement": sum(a == b for a, b in zip(s.baseline, s.candidate, strict=True)) / report.n}
    if report.paired is not None:
        p = recount(report)
        if report.paired != p:
            raise GateRefused("the report's paired counts do not follow from its samples; run `qcore evaluate` again")
        derived["top1"] = (p.both_right + p.only_candidate_right) / report.n
        derived["baseline_top1"] = (p.both_right + p.only_baseline_right) / report.n
        derived["top1_delta"] = (p.only_candidate_right - p.only_baseline_right) / report.n
    for name, value in derived.items():
        if abs(report.metrics.get(name, value) - value) > ROUNDING:
            raise GateRefused(f"the report's {name} does not follow from its samples; run `qcore evaluate` again")


def recount(report: EvaluationReport) -> PairedCounts:
    """Return the paired counts that the report's own samples give; without labels all are zero."""
    s = report.samples
    labels = s.label if s.label is not None else ()
    pairs = [(c == y, b == y) for c, b, y in zip(s.candidate, s.baseline, labels, strict=bool(labels))]
    return PairedCounts(
        both_right=pairs.count((True, True)),
        only_candidate_right=pairs.count((True, False)),
        only_baseline_right=pairs.count((False, True)),
        both_wrong=pairs.count((False, False)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """Is the one-sided bound of an estimate at least `limit`?

    `bound_at(n)` is the bound if the observed rates held for n samples; `counts` says what was seen, in words.
    """

    name: str
    observed: float
    limit: float
    bound_at: Callable[[float], float]
    counts: str


def _top1_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit, n = policy.top1, report.n
    if limit is None:
        return []
    paired = report.paired
    if paired is None:
        raise GateRefused("the policy limits top1 but the data has no labels; limit agreement instead")
    checks = []
    if limit.max_drop is not None:
        wins, losses = paired.only_candidate_right, paired.only_baseline_right
        question = _Question(
            name="top1_drop",
            observed=(wins - losses) / n,
            limit=-limit.max_drop,
            bound_at=lambda m: paired_lower_bound(wins / n * m, losses / n * m, m, policy.confidence),
            counts=f"{losses} lost and {wins} won of {n} samples",
        )
        checks.append(_answer(question, n))
    if limit.min is not None:
        right = paired.both_right + paired.only_candidate_right
        checks.append(_answer(_rate_question("top1_min", right, limit.min, report, policy), n))
    return checks


def _agreement_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    if policy.agreement is None or policy.agreement.min is None:
        return []
    if "agreement" not in report.metrics:
        raise GateRefused(
            "the policy limits agreement but the outputs name no class (one value per sample); limit output_sqnr_db"
        )
    agreed = round(report.metrics["agreement"] * report.n)
    return [_answer(_rate_question("agreement_min", agreed, policy.agreement.min, report, policy), report.n)]


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


def _rate_question(name: str, hits: int, limit: float, report: EvaluationReport, policy: GatePolicy) -> _Question:
    n = report.n
    return _Question(
        name=name,
        observed=hits / n,
        limit=limit,
        bound_at=lambda m: rate_lower_bound(hits / n * m, m, policy.confidence),
        counts=f"{hits} of {n} samples",
    )


def _answer(question: _Question, n: int) -> Check:
    bound = question.bound_at(n)
    outcome: Outcome
    needs, reason = None, question.counts
    if bound >= question.limit:
        outcome = "pass"
    elif question.observed < question.limit:
        outcome, reason = "fail", f"{question.counts}: the observed value is outside the limit"
    else:
        outcome, reason = "inconclusive", f"{question.counts}: inside the limit, but too few samples to be sure"
        total = _samples_needed(question.bound_at, question.limit, n)
        needs = None if total is None else total - n
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


def _budget_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    model, baseline, budgets = report.model, report.baseline, policy.budgets
    observed = {
        "size_bytes": (float(model.size_bytes), budgets.size_bytes, "bytes of the model file"),
        "size_ratio": (model.size_bytes / baseline.size_bytes, budgets.size_ratio, "of the baseline's file size"),
        "latency_ratio": (
            model.latency_ms.p50 / baseline.latency_ms.p50,
            budgets.latency_ratio,
            f"of the baseline's median latency over {model.latency_ms.runs} interleaved runs",
        ),
    }
    return [
        Check(
            name=name,
            outcome="pass" if value <= limit else "fail",
            observed=value,
            bound=value,
            limit=float(limit),
            reason=what,
        )
        for name, (value, limit, what) in observed.items()
        if limit is not None
    ]
