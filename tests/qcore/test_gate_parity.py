"""Parity in the gate: judged where the policy asks, refused where it is about something else, never passed damaged."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import WRONG, damaged, places, report
from pydantic import ValidationError

from qcore.errors import GateRefused
from qcore.gate import decide
from qcore.parity import CONDITIONS
from qcore.parity_report import CONDITION_NAMES, ConditionResult, ParityOf, ParityReport, parity_from_json, verdict_of
from qcore.policy import GatePolicy, MetricLimit, ParityLimit
from qcore.report import decision_from_json

GOOD = report(1, 1, 1000)
ONE_POINT = MetricLimit(max_drop=0.01)
ASKS = GatePolicy(top1=ONE_POINT, parity=ParityLimit(agreement=0.9, sqnr_db=15))


def condition(name, agreement=1.0, sqnr_db=300.0):
    return ConditionResult(
        name=name,
        verdict=verdict_of(agreement, sqnr_db),
        agreement=agreement,
        top1=0.9,
        sqnr_db=sqnr_db,
        meaning="m",
        advice="a",
    )


def parity(**worse):
    """Return a parity report on the model and data of `GOOD`; `worse` gives agreement and SQNR by condition."""
    measured = ParityOf(
        model="q.onnx",
        model_sha256=GOOD.model.sha256,
        target=None,
        data=GOOD.data.name,
        split=GOOD.data.split,
        data_sha256="9" * 64,
        split_sha256=GOOD.data.sha256,
        n=64,
        runtime={"onnxruntime": "1"},
        qcore_version="0",
    )
    found = tuple(condition(name, *worse.get(name.replace("-", "_"), ())) for name in CONDITION_NAMES)
    return ParityReport(measured=measured, top1=0.9, conditions=found)


def test_the_known_conditions_are_those_that_run():
    assert tuple(c.name for c in CONDITIONS) == CONDITION_NAMES


def test_the_worst_condition_is_held_against_the_limits():
    decision = decide(GOOD, ASKS, parity(saturating_pairs=(0.93, 21.0), exact_integers=(0.99, 18.0)))
    assert decision.outcome == "pass"
    found = {c.name: c for c in decision.checks}
    assert list(found) == ["top1_drop", "parity_conditions", "parity_agreement", "parity_sqnr_db"]
    assert (found["parity_agreement"].observed, found["parity_sqnr_db"].observed) == (0.93, 18.0)
    assert found["parity_agreement"].reason == "saturating-pairs, the worst of 7 conditions over 64 samples"
    assert found["parity_sqnr_db"].reason.startswith("dB under exact-integers")
    assert decision.parity_sha256 == parity(saturating_pairs=(0.93, 21.0), exact_integers=(0.99, 18.0)).sha256
    assert decision_from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize(
    ("worse", "failed"), [((0.5, 21.0), ["parity_agreement"]), ((0.5, 3.0), ["parity_agreement", "parity_sqnr_db"])]
)
def test_a_model_that_is_far_elsewhere_does_not_pass(worse, failed):
    decision = decide(GOOD, ASKS, parity(saturating_pairs=worse))
    assert decision.outcome == "fail"
    assert [c.name for c in decision.checks if c.outcome == "fail"] == failed


def test_only_the_conditions_of_the_policy_are_judged():
    policy = GatePolicy(top1=ONE_POINT, parity=ParityLimit(agreement=0.9, conditions=("exact-integers", "one-thread")))
    collapsed = parity(saturating_pairs=(0.5, 3.0))
    assert decide(GOOD, policy, collapsed).outcome == "pass"
    cut = replace(collapsed, conditions=tuple(c for c in collapsed.conditions if c.name != "one-thread"))
    decision = decide(GOOD, policy, cut)
    (failed,) = [c for c in decision.checks if c.outcome == "fail"]
    assert failed.name == "parity_conditions"
    assert "lacks one-thread; run `qcore parity` again" in failed.reason


def test_what_the_policy_asks_and_nobody_measured_fails_by_name():
    decision = decide(GOOD, ASKS)
    assert decision.outcome == "fail"
    (failed,) = [c for c in decision.checks if c.outcome == "fail"]
    assert (failed.name, failed.reason) == (
        "parity",
        "the policy asks for parity and none was given; run `qcore parity`",
    )
    unasked = decide(GOOD, GatePolicy(top1=ONE_POINT), parity(saturating_pairs=(0.5, 3.0)))
    assert unasked.outcome == "pass"
    assert unasked.parity_sha256 is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_sha256": "7" * 64}, "about model 7{12}, the evaluation"),
        ({"split_sha256": "7" * 64}, "about data 777"),
        ({"data": "other"}, "about data card and split other/evaluation"),
        ({"split": "test"}, "about data card and split d/test"),
    ],
)
@pytest.mark.parametrize("policy", [ASKS, GatePolicy(top1=ONE_POINT)])
def test_parity_of_another_model_or_split_is_refused(change, says, policy):
    given_ = parity()
    with pytest.raises(GateRefused, match=says):
        decide(GOOD, policy, replace(given_, measured=replace(given_.measured, **change)))


def test_outputs_that_name_no_class_have_no_agreement():
    given_ = parity()
    unnamed = tuple(replace(c, agreement=None) for c in given_.conditions)
    with pytest.raises(GateRefused, match=r"limits parity\.agreement but the outputs name no class"):
        decide(GOOD, ASKS, replace(given_, conditions=unnamed))
    noise = GatePolicy(top1=ONE_POINT, parity=ParityLimit(sqnr_db=15))
    assert decide(GOOD, noise, replace(given_, conditions=unnamed)).outcome == "pass"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"agreement": 0},
        {"sqnr_db": 20, "conditions": []},
        {"sqnr_db": 20, "conditions": ["vnni"]},
        {"sqnr_db": 20, "conditions": ["one-thread", "one-thread"]},
    ],
)
def test_a_limit_that_asks_nothing_or_the_unknown_is_refused(fields):
    with pytest.raises(ValidationError):
        ParityLimit.model_validate(fields)


EXPECTED = json.loads(json.dumps(parity(saturating_pairs=(0.97, 25.0)).to_json()))
FREE = ("name", "target", "qcore_version", "meaning", "advice", "onnxruntime", "runtime")
"""Names and texts that nothing else in the file repeats: another one is another fact, not damage."""


def test_it_reads_what_it_wrote():
    assert parity_from_json(EXPECTED).to_json() == EXPECTED
    with pytest.raises(GateRefused, match=r"schema qcore\.parity/2, found qcore\.parity/1; run `qcore parity` again"):
        parity_from_json({**EXPECTED, "schema": "qcore.parity/1"})


def test_no_field_can_be_left_out_and_none_added():
    for path in places(EXPECTED):
        if path[:1] == ("runtime",) and len(path) > 1:
            continue
        with contextlib.suppress(GateRefused):
            left = parity_from_json(damaged(EXPECTED, path, "deleted"))
            assert path in (("conditions", 0), ("conditions", 6))  # a whole condition: the policy names what it needs
            assert decide(GOOD, ASKS, left).outcome == "fail"
    for extra in ({**EXPECTED, "x": 1}, {**EXPECTED, "model": {**EXPECTED["model"], "x": 1}}):
        with pytest.raises(GateRefused, match="holds more"):
            parity_from_json(extra)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_nothing_passes_with_any_field_missing_or_damaged(data):
    path = data.draw(st.sampled_from(list(places(EXPECTED))))
    how = data.draw(st.sampled_from(WRONG))
    with contextlib.suppress(GateRefused):
        broken = damaged(EXPECTED, path, how)
        if broken == EXPECTED or decide(GOOD, ASKS, parity_from_json(broken)).outcome != "pass":
            return
        assert path[-1] in FREE


def test_a_verdict_that_its_numbers_do_not_give_is_refused():
    value = damaged(EXPECTED, ("conditions", 6, "verdict"), "equal")
    with pytest.raises(GateRefused, match="verdict of saturating-pairs is 'equal'; allowed: near"):
        parity_from_json(value)
