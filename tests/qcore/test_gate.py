from dataclasses import replace

import pytest
from pydantic import ValidationError

from qcore.errors import GateRefused
from qcore.gate import (
    Budgets,
    GatePolicy,
    MetricLimit,
    decide,
    default_policy,
)
from qcore.numerics.bounds import paired_lower_bound
from qcore.report import (
    EvaluationReport,
    Latency,
    MeasuredData,
    MeasuredModel,
    PairedCounts,
    Samples,
    decision_from_json,
    report_from_json,
)

ONE_POINT = GatePolicy(top1=MetricLimit(max_drop=0.01))


def measured(digest: str, size: int = 100, p50: float = 1.0) -> MeasuredModel:
    return MeasuredModel(sha256=digest * 64, size_bytes=size, latency_ms=Latency(p50=p50, p95=2 * p50, runs=20))


def report(wins: int, losses: int, n: int, *, both_wrong: int = 0, labelled: bool = True) -> EvaluationReport:
    """Return a report with these counts: classes 0 and 1, every label 0."""
    right = n - wins - losses - both_wrong
    candidate = (0,) * (right + wins) + (1,) * (losses + both_wrong)
    baseline = (0,) * right + (1,) * wins + (0,) * losses + (1,) * both_wrong
    agreement = (n - wins - losses) / n
    metrics = {"agreement": agreement, "output_sqnr_db": 30.0}
    if labelled:
        metrics |= {
            "top1": (right + wins) / n,
            "baseline_top1": (right + losses) / n,
            "top1_delta": (wins - losses) / n,
        }
    return EvaluationReport(
        model=measured("a"),
        baseline=measured("b", 400, 2.0),
        data=MeasuredData(name="d", split="evaluation", task="classification" if labelled else "none", sha256="c" * 64),
        n=n,
        metrics=metrics,
        paired=PairedCounts(
            both_right=right, only_candidate_right=wins, only_baseline_right=losses, both_wrong=both_wrong
        )
        if labelled
        else None,
        samples=Samples(
            index=tuple(range(n)), label=(0,) * n if labelled else None, baseline=baseline, candidate=candidate
        ),
        runtime={},
        qcore_version="0",
    )


@pytest.mark.parametrize(
    ("wins", "losses", "n", "outcome"),
    [
        (0, 0, 400, "pass"),
        (0, 0, 100, "inconclusive"),  # nothing lost, but 100 samples cannot show one point
        (69, 79, 10_000, "pass"),
        (4, 0, 400, "pass"),
        (1, 4, 400, "inconclusive"),
        (0, 5, 400, "fail"),  # 1.25 points lost
        (10, 300, 10_000, "fail"),
    ],
)
def test_three_outcomes(wins, losses, n, outcome):
    assert decide(report(wins, losses, n), ONE_POINT).outcome == outcome


def test_inconclusive_says_how_many_more_samples_would_decide():
    decision = decide(report(1, 4, 400), ONE_POINT)
    more = decision.checks[0].needs_samples
    assert more is not None
    scale = (400 + more) / 400
    assert paired_lower_bound(1 * scale, 4 * scale, 400 * scale, 0.95) >= -0.01
    scale = (400 + more - 1) / 400
    assert paired_lower_bound(1 * scale, 4 * scale, 400 * scale, 0.95) < -0.01


def test_floors_and_budgets_are_checks_of_their_own():
    policy = GatePolicy(
        top1=MetricLimit(max_drop=0.01, min=0.9),
        agreement=MetricLimit(min=0.9),
        budgets=Budgets(size_bytes=99, size_ratio=0.3, latency_ratio=0.6),
    )
    decision = decide(report(2, 2, 2000), policy)
    assert {c.name: c.outcome for c in decision.checks} == {
        "top1_drop": "pass",
        "top1_min": "pass",
        "agreement_min": "pass",
        "size_bytes": "fail",
        "size_ratio": "pass",
        "latency_ratio": "pass",
    }
    assert decision.outcome == "fail"


def test_without_labels_agreement_decides():
    unlabelled = report(1, 1, 1000, labelled=False)
    assert [c.name for c in decide(unlabelled, default_policy(unlabelled)).checks] == [
        "agreement_min",
        "output_sqnr_db",
    ]
    assert decide(unlabelled, default_policy(unlabelled)).outcome == "pass"
    with pytest.raises(GateRefused, match="data has no labels"):
        decide(unlabelled, ONE_POINT)


@pytest.mark.parametrize(("sqnr", "outcome"), [(25.0, "pass"), (15.0, "fail")])
def test_where_outputs_name_no_class_their_error_decides(sqnr, outcome):
    values = replace(report(0, 0, 1000, labelled=False), metrics={"output_sqnr_db": sqnr})
    decision = decide(values, default_policy(values))
    assert [c.name for c in decision.checks] == ["output_sqnr_db"]
    assert decision.outcome == outcome
    with pytest.raises(GateRefused, match="outputs name no class"):
        decide(values, GatePolicy(agreement=MetricLimit(min=0.5)))


GOOD = report(1, 1, 500)


@pytest.mark.parametrize(
    "forged",
    [
        replace(GOOD, n=501),
        replace(GOOD, metrics={**GOOD.metrics, "agreement": 1.0}),
        replace(GOOD, metrics={**GOOD.metrics, "top1": float("nan")}),
        replace(GOOD, metrics={"top1": 1.0}),
        replace(GOOD, metrics={**GOOD.metrics, "baseline_top1": 0.0}),
        replace(GOOD, paired=replace(GOOD.paired, only_baseline_right=0, both_right=499)),
        replace(GOOD, paired=None),
        replace(GOOD, samples=replace(GOOD.samples, index=(0, *GOOD.samples.index[:-1]))),
        replace(GOOD, samples=replace(GOOD.samples, candidate=GOOD.samples.candidate[:-1])),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(forged):
    with pytest.raises(GateRefused, match="run `qcore evaluate` again"):
        decide(forged, ONE_POINT)


@pytest.mark.parametrize(
    "fields",
    [{}, {"top1": {}}, {"agreement": {"min": 0.9, "max_drop": 0.1}}, {"top1": {"max_drop": 0}}, {"confidence": 0.4}],
)
def test_a_policy_that_asks_nothing_or_nonsense_is_refused(fields):
    with pytest.raises(ValidationError):
        GatePolicy.model_validate(fields)


def test_report_and_decision_survive_json_and_bind_their_digests():
    decision = decide(GOOD, ONE_POINT)
    assert report_from_json(GOOD.to_json()) == GOOD
    assert decision_from_json(decision.to_json()) == decision
    assert (decision.model_sha256, decision.baseline_sha256, decision.data_sha256) == ("a" * 64, "b" * 64, "c" * 64)
    assert decision.policy_sha256 == ONE_POINT.sha256
    assert decision.report_sha256 == GOOD.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"n": 500.0},
        {"metrics": None},
        {"metrics": {"agreement": "1"}},
        {"model": {**GOOD.to_json()["model"], "sha256": 5}},
        {"model": {**GOOD.to_json()["model"], "size_bytes": 0}},
        {"latency_ms": {}, "baseline": {**GOOD.to_json()["baseline"], "latency_ms": {"p50": 0, "p95": 1, "runs": 1}}},
        {"data": {**GOOD.to_json()["data"], "task": "foo"}},
        {"extra": 1},
    ],
)
def test_a_report_of_another_form_is_refused(change):
    with pytest.raises(GateRefused):
        report_from_json({**GOOD.to_json(), **change})


def test_a_pass_cannot_be_claimed_for_failed_checks():
    value = decide(report(0, 30, 1000), ONE_POINT).to_json()
    assert value["outcome"] == "fail"
    with pytest.raises(GateRefused, match="decision says pass but its checks say top1_drop=fail"):
        decision_from_json({**value, "outcome": "pass"})
    with pytest.raises(GateRefused, match="no checks"):
        decision_from_json({**value, "outcome": "pass", "checks": []})


@pytest.mark.parametrize(
    "change", [{"bound": -0.5}, {"limit": 0.5}, {"observed": float("nan")}, {"bound": None}, {"outcome": "fine"}]
)
def test_a_passed_check_whose_numbers_say_otherwise_is_refused(change):
    value = decide(report(0, 0, 1000), ONE_POINT).to_json()
    value = {**value, "checks": [{**value["checks"][0], **change}]}
    with pytest.raises(GateRefused, match="check top1_drop"):
        decision_from_json(value)


def test_a_hundred_thousand_samples_are_judged_at_once():
    assert decide(report(300, 400, 100_000, both_wrong=1000), ONE_POINT).outcome == "pass"
