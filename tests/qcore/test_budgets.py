"""Budgets: three outcomes for times, two for sizes, and never a pass on what was not measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.budgets import Budgets, budget_checks
from qcore.derived import cost_metrics, latency_of, ratio_of
from qcore.errors import GateRefused
from qcore.gate import decide
from qcore.measured import Download, MeasuredModel, Rounds
from qcore.policy import GatePolicy
from qcore.report import BUDGETS, EvaluationReport, MeasuredData, Samples, decision_from_json
from qcore.report_file import report_from_json

NAMES = tuple(Budgets.model_fields)


def costed(one, every, starts) -> EvaluationReport:
    """Return a report with these rounds: pairs of columns, baseline first."""
    named = zip(("latency", "latency_all_cores", "cold_start"), (one, every, starts), strict=True)
    rounds = {name: Rounds(baseline=tuple(b), candidate=tuple(c)) for name, (b, c) in named}

    def model(digest, who, scale):
        times = {name: latency_of(getattr(r, who)) for name, r in rounds.items()}
        return MeasuredModel(
            sha256=digest * 64,
            size_bytes=100 * scale,
            latency_ms=times["latency"],
            package_bytes=80 * scale,
            latency_all_cores_ms=times["latency_all_cores"],
            cold_start_ms=times["cold_start"],
            peak_memory_bytes=1000 * scale,
        )

    return EvaluationReport(
        model=model("a", "candidate", 1),
        baseline=model("b", "baseline", 4),
        data=MeasuredData(name="d", split="evaluation", task="none", sha256="c" * 64),
        n=2,
        metrics={"output_sqnr_db": 30.0},
        paired=None,
        samples=Samples(index=(0, 1), label=None, baseline=None, candidate=None),
        runtime={},
        qcore_version="0",
        measured_at="2026-11-27T12:00:00Z",
        rounds=rounds,
        ratios={name: ratio_of(r) for name, r in rounds.items()},
        machine={"cpu": "x"},
        download=Download(released_sha256="e" * 64, delta_bytes=60),
    )


def column(median, spread, n):
    return median * np.exp(spread * np.random.default_rng(n).normal(size=n))


def typical(spread=0.05, n=100):
    one = (column(2, 0, n), column(1, spread, n))
    return costed(one, one, (column(20, 0, 5), column(12, spread, 5)))


GENEROUS = {
    "size_bytes": 100,
    "size_ratio": 0.25,
    "package_bytes": 80,
    "package_ratio": 0.25,
    "download_bytes": 60,
    "latency_ms": 1.2,
    "latency_ratio": 0.6,
    "latency_all_cores_ratio": 0.6,
    "cold_start_ms": 20,
    "memory_bytes": 1000,
    "memory_ratio": 0.25,
}


def outcomes(report, limits):
    return {c.name: c.outcome for c in budget_checks(report, Budgets(**limits), 0.95)}


def test_every_budget_is_a_check_and_an_upper_limit():
    assert set(GENEROUS) == set(NAMES) == set(BUDGETS)
    assert set(outcomes(typical(), GENEROUS).values()) == {"pass"}
    tight = {k: (v - 1 if isinstance(v, int) else v / 3) for k, v in GENEROUS.items()} | {"cold_start_ms": 5}
    assert set(outcomes(typical(), tight).values()) == {"fail"}


def test_a_median_that_is_inside_by_less_than_its_interval_is_inconclusive_and_says_what_would_do():
    report = typical(spread=0.3, n=40)
    limit = report.ratios["latency"].value * 1.001
    (check,) = budget_checks(report, Budgets(latency_ratio=limit), 0.95)
    assert check.outcome == "inconclusive"
    assert check.observed <= limit < check.bound
    assert check.needs_runs is None or f"about {check.needs_runs} more would decide" in check.reason
    (clear,) = budget_checks(report, Budgets(latency_ratio=report.ratios["latency"].high), 0.95)
    assert clear.outcome == "pass"
    assert clear.bound == report.ratios["latency"].high  # at 95 % the gate and the report say the same


def test_too_few_runs_for_the_confidence_never_pass():
    starts = typical().rounds["cold_start"].candidate
    (check,) = budget_checks(typical(), Budgets(cold_start_ms=2 * max(starts)), 0.99)
    assert (check.outcome, check.needs_runs) == ("inconclusive", 2)  # 7 runs bound a median at 99 %


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_measured_is_refused(name):
    whole = typical()
    bare = {"package_bytes": None, "latency_all_cores_ms": None, "cold_start_ms": None, "peak_memory_bytes": None}
    lacks = replace(
        whole,
        model=replace(whole.model, **bare),
        baseline=replace(whole.baseline, **bare),
        rounds={},
        ratios={},
        download=None,
    )
    policy = GatePolicy(output_sqnr_db=10, budgets=Budgets(**{name: GENEROUS[name]}))
    assert decide(report_from_json(json.loads(json.dumps(whole.to_json()))), policy).outcome == "pass"
    if name.startswith("size"):
        assert decide(lacks, policy).outcome == "pass"
        return
    with pytest.raises(GateRefused, match=f"limits {name}, .*; run `qcore evaluate"):
        decide(lacks, policy)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=50), st.integers(0, 49), st.floats(0, 3), st.floats(0.2, 5))
def test_a_slower_run_never_turns_a_fail_into_a_pass(values, which, more, limit):
    order = ["fail", "inconclusive", "pass"]
    ones = [1.0] * len(values)
    slower = [v + more * (k == which % len(values)) for k, v in enumerate(values)]
    before, after = (
        outcomes(costed((ones, column), (ones, ones), (ones, ones)), {"latency_ratio": limit})["latency_ratio"]
        for column in (values, slower)
    )
    assert order.index(after) <= order.index(before)


@pytest.mark.parametrize("n", [20, 200])
def test_a_candidate_at_the_limit_passes_as_rarely_as_stated(n):
    rng, passed, times = np.random.default_rng(n), 0, 1500
    for _ in range(times):
        noise = rng.gamma(50, 1 / 50, (2, n)) * np.where(rng.random((2, n)) < 0.1, 1 + rng.pareto(1.1, (2, n)), 1)
        one = tuple(noise.tolist())
        passed += outcomes(costed(one, one, one), {"latency_ratio": 1.0})["latency_ratio"] == "pass"
    assert passed / times <= 0.05 + 3 * (0.05 * 0.95 / times) ** 0.5


CHANGES = {
    "ratio of latency": lambda r: {"ratios": {**r.ratios, "latency": replace(r.ratios["latency"], high=0.01)}},
    "latency of the candidate": lambda r: {"model": replace(r.model, latency_ms=latency_of([0.1] * 100))},
    "cold_start of the baseline": lambda r: {"baseline": replace(r.baseline, cold_start_ms=latency_of([99.0] * 5))},
    "latency_all_cores of the candidate": lambda r: {"model": replace(r.model, latency_all_cores_ms=None)},
    "rounds and ratios": lambda r: {"rounds": {"latency": r.rounds["latency"]}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_costs_that_do_not_follow_from_their_rounds_are_refused(what):
    report = typical()
    with pytest.raises(GateRefused, match=what):
        decide(replace(report, **CHANGES[what](report)), GatePolicy(output_sqnr_db=10))


def test_a_decision_keeps_the_runs_that_it_lacks_and_metrics_have_units():
    report = typical(spread=0.3, n=40)
    policy = GatePolicy(output_sqnr_db=10, budgets=Budgets(latency_ratio=report.ratios["latency"].value * 1.001))
    decision = decide(report, policy)
    assert decision_from_json(json.loads(json.dumps(decision.to_json()))) == decision
    metrics = cost_metrics(report)
    assert metrics["latency_ratio_low"] <= metrics["latency_ratio"] <= metrics["latency_ratio_high"]
    assert (metrics["package_bytes"], metrics["download_bytes"], metrics["peak_memory_bytes"]) == (80, 60, 1000)


def test_a_package_is_judged_by_its_file_and_without_one_the_share_is_named():
    limits = Budgets(package_bytes=100)
    (share,) = budget_checks(typical(), limits, 0.95)
    assert (share.outcome, share.observed) == ("pass", 80)
    assert "the model's share of a package" in share.reason
    (whole,) = budget_checks(typical(), limits, 0.95, package_bytes=101)
    assert (whole.outcome, whole.observed) == ("fail", 101)
    assert "the whole download of a new device" in whole.reason


def test_the_released_model_is_named_by_the_option_that_exists():
    with pytest.raises(GateRefused, match="--champion FILE"):
        budget_checks(replace(typical(), download=None), Budgets(download_bytes=1), 0.95)
