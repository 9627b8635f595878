"""What is released is a rival too: candidate against champion, first releases, and the age of what was measured."""

import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import WRONG, anomalies, classified, damaged, errors, grouped, places, report, valued, with_champion
from pydantic import ValidationError

from qcore.derived import mean
from qcore.errors import GateRefused
from qcore.gate import decide
from qcore.policy import (
    ErrorLimit,
    GatePolicy,
    GroupLimit,
    MetricLimit,
    ParityLimit,
    ValueLimit,
    champion_checks,
    for_choosing,
)
from qcore.report import decision_from_json
from qcore.report_file import report_from_json

AGAINST = GatePolicy(top1=MetricLimit(max_drop_champion=0.01))
NOW = datetime(2026, 11, 27, 13, tzinfo=UTC)


def released(wins, losses, n):
    """Return a report whose candidate equals its baseline and has so many wins and losses against the champion."""
    label = (0,) * n
    candidate = (0,) * (n - losses) + (1,) * losses
    champion = (1,) * wins + (0,) * (n - wins)
    return with_champion(classified(label, candidate, candidate), champion)


@pytest.mark.parametrize(
    ("wins", "losses", "n", "outcome"),
    [(0, 0, 400, "pass"), (0, 0, 100, "inconclusive"), (1, 4, 400, "inconclusive"), (0, 5, 400, "fail")],
)
def test_a_champion_is_held_to_the_same_bounds_as_the_baseline(wins, losses, n, outcome):
    decision = decide(released(wins, losses, n), AGAINST)
    (check,) = decision.checks
    assert (check.name, check.outcome) == ("top1_champion_drop", outcome)
    as_baseline = decide(report(wins, losses, n), GatePolicy(top1=MetricLimit(max_drop=0.01))).checks[0]
    assert (check.observed, check.bound, check.needs_samples) == (
        as_baseline.observed,
        as_baseline.bound,
        as_baseline.needs_samples,
    )
    assert decision.champion_sha256 == "e" * 64
    assert decision_from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_what_is_fine_against_float_may_be_a_step_back_from_what_is_released():
    half_point = classified((0,) * 2000, (0,) * 1990 + (1,) * 10, (0,) * 1985 + (1,) * 15)
    better = with_champion(half_point, (0,) * 2000)
    policy = GatePolicy(top1=MetricLimit(max_drop=0.01, max_drop_champion=0.005))
    outcomes = {c.name: c.outcome for c in decide(better, policy).checks}
    assert outcomes == {"top1_drop": "pass", "top1_champion_drop": "fail"}


def test_without_a_champion_limits_against_it_fail_by_name():
    decision = decide(report(0, 0, 1000), GatePolicy(top1=MetricLimit(max_drop=0.01, max_drop_champion=0.01)))
    assert decision.outcome == "fail"
    assert [(c.name, c.outcome) for c in decision.checks] == [("top1_drop", "pass"), ("champion", "fail")]
    assert (
        "asks top1_champion_drop and the report has no champion; evaluate with --champion" in decision.checks[1].reason
    )
    assert decision.champion_sha256 is None
    assert decide(report(0, 0, 1000), GatePolicy(top1=MetricLimit(max_drop=0.01))).outcome == "pass"


FIRST = GatePolicy(top1=MetricLimit(max_drop=0.01, max_drop_champion=0.01), first_release=True)


def test_a_first_release_is_stated_and_shown():
    decision = decide(report(0, 0, 1000), FIRST)
    assert decision.outcome == "pass"
    said = decision.checks[1]
    assert (said.name, said.outcome) == ("champion", "pass")
    assert said.reason.startswith("first release, as the policy states")
    assert said.reason.endswith("not judged: top1_champion_drop")
    there = decide(with_champion(report(0, 0, 1000), (0,) * 1000), FIRST)
    assert [c.name for c in there.checks] == ["top1_drop", "top1_champion_drop"]
    worse = decide(released(0, 50, 1000), FIRST)
    assert {c.name: c.outcome for c in worse.checks}["top1_champion_drop"] == "fail"


def test_a_first_release_that_asks_nothing_else_is_refused():
    with pytest.raises(ValidationError, match="limit something against the baseline too"):
        GatePolicy(top1=MetricLimit(max_drop_champion=0.01), first_release=True)
    with pytest.raises(ValidationError, match="limit something against the baseline too"):
        GatePolicy(metrics={"m": ValueLimit(max_loss_champion=0.01)}, first_release=True)
    for kind in (MetricLimit, ErrorLimit, ValueLimit, GroupLimit, ParityLimit):
        with pytest.raises(ValidationError):
            kind()


def test_recipes_are_chosen_without_what_belongs_to_a_release():
    asked = GatePolicy(
        top1=MetricLimit(max_drop=0.01, max_drop_champion=0.01), parity=ParityLimit(sqnr_db=20), max_age_days=1
    )
    assert decide(report(0, 0, 1000), asked, now=NOW).outcome == "fail"
    assert decide(report(0, 0, 1000), for_choosing(asked)).outcome == "pass"
    assert for_choosing(AGAINST) is None


def test_agreement_is_compared_with_the_champions():
    base = (0,) * 1000
    ours, theirs = (0,) * 990 + (1,) * 10, (0,) * 950 + (1,) * 50
    policy = GatePolicy(agreement=MetricLimit(max_drop_champion=0.01))
    for candidate, champion, outcome in ((ours, theirs, "pass"), (theirs, ours, "fail")):
        found = with_champion(classified(None, base, candidate), champion)
        assert found.metrics["champion_agreement"] == champion.count(0) / 1000
        (check,) = decide(found, policy).checks
        assert (check.name, check.outcome) == ("agreement_champion_drop", outcome)


def regression(n, more):
    plain = errors(n, 0.0)
    ours = np.array(plain.samples.values["absolute_error"].candidate)
    rng = np.random.default_rng(1)
    return with_champion(plain, {"absolute_error": np.maximum(ours - more + 0.05 * rng.normal(size=n), 0)})


@pytest.mark.parametrize(("more", "outcome"), [(0.0, "pass"), (0.1, "fail")])
def test_a_regression_may_not_err_much_more_than_the_champion(more, outcome):
    decision = decide(regression(1000, more), GatePolicy(mae=ErrorLimit(max_increase_champion=0.05)))
    (check,) = decision.checks
    assert (check.name, check.outcome) == ("mae_champion_increase", outcome)
    assert decision_from_json(decision.to_json()) == decision


def anomaly(noise):
    plain = anomalies(300, 1000, 0.01)
    ours = np.array(plain.samples.values["score"].candidate)
    candidate = ours + noise * np.random.default_rng(5).normal(size=ours.size)
    changed = valued("anomaly", plain.samples.label, score=(ours, candidate))
    return with_champion(changed, {"score": ours})


@pytest.mark.parametrize(("noise", "outcome"), [(0.02, "pass"), (2.0, "fail")])
def test_anomalies_may_not_be_ranked_worse_than_by_the_champion(noise, outcome):
    (check,) = decide(anomaly(noise), GatePolicy(auc=MetricLimit(max_drop_champion=0.02))).checks
    assert (check.name, check.outcome) == ("auc_champion_drop", outcome)


def own(base, ours, champion, direction="higher"):
    given_ = valued("none", iou=(base, ours))
    metrics = {"iou": mean(tuple(map(float, ours))), "baseline_iou": mean(tuple(map(float, base)))}
    named = replace(given_, user_metrics={"iou": direction}, metrics={**given_.metrics, **metrics})
    return named if champion is None else with_champion(named, {"iou": champion})


def test_metrics_of_the_user_are_compared_with_the_champions():
    base = np.random.default_rng(0).normal(size=500)
    policy = GatePolicy(metrics={"iou": ValueLimit(max_loss=0.1, max_loss_champion=0.1)})
    checks = decide(own(base, base + 0.01, base + 0.3), policy).checks
    assert [(c.name, c.outcome) for c in checks] == [("iou_change", "pass"), ("iou_champion_change", "fail")]


def test_slices_and_classes_are_compared_with_the_champions():
    found = with_champion(grouped((1000, 1000), (0, 80)), (0,) * 2000)
    limit = GroupLimit(max_drop=0.2, max_drop_champion=0.02)
    checks = {c.name: c for c in decide(found, GatePolicy(slices=limit, classes=limit)).checks}
    assert {name: c.outcome for name, c in checks.items()} == {
        "slices_drop": "pass",
        "classes_drop": "pass",
        "slices_champion_drop": "fail",
        "classes_champion_drop": "fail",
    }
    assert "the worst is s1: 80 lost" in checks["slices_champion_drop"].reason


CHAMPIONS = {
    "classes": (
        with_champion(grouped((400, 400), (0, 0)), (0,) * 800),
        GatePolicy(
            top1=MetricLimit(max_drop_champion=0.02),
            slices=GroupLimit(max_drop_champion=0.03, require=True),
            classes=GroupLimit(max_drop_champion=0.03),
            max_age_days=1,
        ),
    ),
    "regression": (regression(300, 0.0), GatePolicy(mae=ErrorLimit(max_increase_champion=0.1))),
    "anomalies": (anomaly(0.01), GatePolicy(auc=MetricLimit(max_drop_champion=0.05))),
    "unlabelled": (
        with_champion(classified(None, (0, 1) * 300, (0, 1) * 300), (0, 1) * 300),
        GatePolicy(agreement=MetricLimit(max_drop_champion=0.05)),
    ),
    "own": (
        own((0.5, 1.0, 0.0) * 100, (0.5, 1.0, 0.01) * 100, (0.5, 1.0, 0.02) * 100),
        GatePolicy(metrics={"iou": ValueLimit(max_loss_champion=0.5)}),
    ),
}
EXPECTED = {name: json.loads(json.dumps(r.to_json())) for name, (r, _) in CHAMPIONS.items()}
FITS = {  # other facts, no damage: nothing else in the report repeats them
    **dict.fromkeys(("name", "split", "qcore_version"), ("x", "0", "deleted")),
    **dict.fromkeys(("output_sqnr_db", "champion_output_sqnr_db"), (-1, -0.5, True)),
    "machine": ({},),
    "cpu": ("x", "0", "deleted"),
    **dict.fromkeys(("package_bytes", "download"), (None,)),  # not measured; no policy here asks
}


def judged(name, value):
    return decide(report_from_json(value), CHAMPIONS[name][1], now=NOW)


@pytest.mark.parametrize("name", CHAMPIONS)
def test_every_check_against_the_champion_is_made_and_the_whole_report_passes(name):
    decision = judged(name, EXPECTED[name])
    assert decision.outcome == "pass"
    assert set(champion_checks(CHAMPIONS[name][1])) <= {c.name for c in decision.checks}


@pytest.mark.parametrize("name", CHAMPIONS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_passes_with_any_field_missing_or_damaged(name, data):
    value = EXPECTED[name]
    path = data.draw(st.sampled_from(list(places(value))))
    how = data.draw(st.sampled_from(WRONG))
    if how in FITS.get(path[-1], ()):
        return
    with contextlib.suppress(GateRefused):
        broken = damaged(value, path, how)
        assert broken == value or judged(name, broken).outcome != "pass"


@pytest.mark.parametrize("name", CHAMPIONS)
def test_no_field_can_be_left_out(name):
    for path in (p for p in places(EXPECTED[name]) if p != ("machine", "cpu")):
        with pytest.raises(GateRefused):
            judged(name, damaged(EXPECTED[name], path, "deleted"))


def test_no_part_of_a_champion_can_be_left_out_with_the_rest_of_it_there():
    """Columns, counts and metrics of a champion hang together; without all of them there is none, and it fails."""
    given_, policy = CHAMPIONS["classes"]
    s = given_.samples
    for forged in (
        replace(given_, champion=None),
        replace(given_, champion=replace(given_.champion, paired=None)),
        replace(given_, samples=replace(s, champion=None)),
        replace(given_, samples=replace(s, champion=(1, *s.champion[1:]))),
        replace(given_, metrics={k: v for k, v in given_.metrics.items() if k != "champion_top1"}),
    ):
        with pytest.raises(GateRefused, match="run `qcore evaluate` again"):
            decide(forged, policy, now=NOW)
    plain = grouped((400, 400), (0, 0))
    assert decide(plain, policy, now=NOW).outcome == "fail"


AGED = GatePolicy(top1=MetricLimit(max_drop=0.01), max_age_days=7)


@pytest.mark.parametrize(
    ("days", "outcome"), [(-0.003, "pass"), (0, "pass"), (6.99, "pass"), (7, "pass"), (7.01, "fail"), (400, "fail")]
)
def test_what_is_too_old_does_not_pass(days, outcome):
    measured = datetime(2026, 11, 27, 12, tzinfo=UTC)
    decision = decide(report(0, 0, 1000), AGED, now=measured + timedelta(days=days))
    check = decision.checks[-1]
    assert (check.name, check.outcome) == ("age_days", outcome)
    assert check.observed == pytest.approx(max(days, 0))
    assert decision_from_json(decision.to_json()) == decision


def test_what_comes_from_the_future_or_meets_no_clock_is_refused():
    with pytest.raises(GateRefused, match="measured at 2026-11-27T12:00:00Z, which is not yet"):
        decide(report(0, 0, 1000), AGED, now=datetime(2026, 11, 27, 11, 54, tzinfo=UTC))
    with pytest.raises(GateRefused, match="the time is not known"):
        decide(report(0, 0, 1000), AGED)
    for wrong in ("2026-11-27", "2026-11-27T12:00:00", "2026-11-27T12:00:00+00:00", "2026-13-27T12:00:00Z", "now"):
        with pytest.raises(GateRefused, match="measured_at is"):
            report_from_json({**report(0, 0, 10).to_json(), "measured_at": wrong})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(300, 3000))
def test_more_losses_against_the_champion_never_help(wins, losses, n):
    order = ["fail", "inconclusive", "pass"]
    before, after = (decide(released(wins, k, n), AGAINST).outcome for k in (losses, losses + 1))
    assert order.index(after) <= order.index(before)


FULL = {
    "confidence": 0.95,
    "top1": {"min": 0.99, "max_drop": 0.01, "max_drop_champion": 0.01},
    "agreement": {"min": 0.99, "max_drop_champion": 0.01},
    "output_sqnr_db": 40.0,
    "slices": {"max_drop": 0.01, "max_drop_champion": 0.01, "min_support": 50, "require": True},
    "classes": {"max_drop": 0.01, "max_drop_champion": 0.01},
    "budgets": {"size_bytes": 1, "size_ratio": 0.001, "latency_ratio": 0.001},
    "parity": {"agreement": 0.9, "sqnr_db": 20.0, "conditions": ["exact-integers"]},
    "max_age_days": 0.001,
}


def test_no_field_of_a_policy_can_be_damaged_or_left_out_to_let_a_bad_model_pass():
    """What is left of the policy is asked all the same; what is no number is refused."""
    bad = with_champion(grouped((400, 400), (100, 100)), (0,) * 800)
    assert decide(bad, GatePolicy.model_validate(FULL), now=NOW).outcome == "fail"
    for path in places(FULL):
        for how in WRONG:
            with contextlib.suppress(ValidationError):
                assert decide(bad, GatePolicy.model_validate(damaged(FULL, path, how)), now=NOW).outcome != "pass"
        for how in (float("nan"), float("inf"), float("-inf"), "x"):
            with pytest.raises(ValidationError):
                GatePolicy.model_validate(damaged(FULL, path, how))
