"""Waivers: a failed check stands aside only by the signed word of whom the policy names, for one decision."""

import base64
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from simulators import about, decision, gated, make_world, now, waivable

from qcore.canonical import canonical_json
from qcore.errors import GateRefused
from qcore.release.envelope import PAYLOAD_TYPE
from qcore.release.evidence import sign_decision, verify_evidence
from qcore.release.proposal import Submission
from qcore.release.repository import publish_release
from qcore.release.waivers import new_waiver, overridden, owner_key, read_waiver, sign_waiver
from qcore.report import Check, GateDecision, Group, decision_from_json
from qcore.waiver import NOBODY, Override, Owner, SignedWaiver, format_time, waiver_from_json

ADA_KEY, BOB_KEY, GATE = (CryptoSigner.generate_ed25519() for _ in range(3))
ADA = Owner(name="Ada Example", key=owner_key(ADA_KEY.public_key))
BOB = Owner(name="Bob", key=owner_key(BOB_KEY.public_key))
NOW = now().replace(microsecond=0)
FAILED = waivable(ADA)
TEN_DAYS = timedelta(days=10)


def signed(
    of: GateDecision = FAILED, *names: str, days: int = 10, by: Owner = ADA, key: CryptoSigner = ADA_KEY
) -> bytes:
    waiver = new_waiver(of, names or ("top1",), by, "the new kernel lands soon", (NOW, timedelta(days=days)))
    return sign_waiver(waiver, key)


WAIVER = signed()


def resigned(
    change: Callable[[dict[str, Any]], object], key: CryptoSigner = ADA_KEY, kind: str = PAYLOAD_TYPE
) -> bytes:
    """Return the waiver, signed by `key` after `change` was done to what is signed."""
    statement = json.loads(base64.b64decode(json.loads(WAIVER)["payload"]))
    change(statement)
    envelope = Envelope(canonical_json(statement), kind, {})
    envelope.sign(key)
    return canonical_json(envelope.to_dict())


def test_a_waived_check_stays_failed_and_the_decision_passes_for_that_reason_alone() -> None:
    waived = overridden(FAILED, [WAIVER], NOW)
    assert (FAILED.outcome, waived.outcome) == ("fail", "pass")
    assert waived.checks == FAILED.checks
    assert waived.waived["top1"].owner == ADA
    assert replace(waived, waivers=(), outcome="fail") == FAILED
    assert decision_from_json(json.loads(canonical_json(waived.to_json()))) == waived
    until = format_time(NOW + TEN_DAYS)
    assert waived.who_may_override() == (
        f"Ada Example waived top1 until {until}: the new kernel lands soon. "
        "Ada Example may waive top1 by a signed waiver, each for at most 14 days; nothing else."
    )


def test_foreign_tools_see_a_warning_and_the_failed_check() -> None:
    evidence = sign_decision(overridden(FAILED, [WAIVER], NOW), GATE)
    predicate = json.loads(base64.b64decode(json.loads(evidence)["payload"]))["predicate"]
    assert (predicate["result"], predicate["failedTests"], predicate["passedTests"]) == ("WARNED", ["top1"], [])
    assert predicate["configuration"][-1]["name"] == "waiver of Ada Example"


def test_without_rules_nobody_may_override_and_the_sentence_says_so() -> None:
    assert decision("a" * 64).who_may_override() == "Nobody may override: the policy allows no waivers."
    for refused in (
        lambda: overridden(replace(FAILED, override=NOBODY), [WAIVER], NOW),
        lambda: signed(replace(FAILED, override=NOBODY)),
    ):
        with pytest.raises(GateRefused, match="Nobody may override"):
            refused()


def test_a_waiver_holds_until_the_second_it_expires() -> None:
    for moment in (NOW - timedelta(minutes=4), NOW, NOW + TEN_DAYS - timedelta(seconds=1)):
        assert overridden(FAILED, [WAIVER], moment).outcome == "pass"
    with pytest.raises(GateRefused, match="expired at"):
        overridden(FAILED, [WAIVER], NOW + TEN_DAYS)
    with pytest.raises(GateRefused, match="in the future"):
        overridden(FAILED, [WAIVER], NOW - timedelta(minutes=6))


OTHER = "9" * 64
DIFFERENT: list[tuple[str, Callable[[GateDecision], GateDecision]]] = [
    *(
        (f"is about {n} ", lambda d, n=n: replace(d, **{f"{n}_sha256": OTHER}))
        for n in ("model", "baseline", "data", "policy", "report")
    ),
    ("other values", lambda d: replace(d, checks=(replace(d.checks[0], observed=0.5),))),
    ("other values", lambda d: replace(d, checks=(replace(d.checks[0], limit=0.99),))),
    (
        "other values",
        lambda d: replace(d, outcome="inconclusive", checks=(replace(d.checks[0], outcome="inconclusive"),)),
    ),
    ("which this decision does not ask", lambda d: replace(d, checks=(replace(d.checks[0], name="top5"),))),
    ("needs no waiver", lambda d: replace(decision("a" * 64), override=d.override)),
    ("is foreign|unknown key", lambda d: replace(d, override=replace(d.override, owners=(BOB,)))),
    ("waives too much", lambda d: replace(d, override=replace(d.override, checks=("top5",)))),
    ("holds for 10 days; the policy allows 9", lambda d: replace(d, override=replace(d.override, max_days=9))),
]


@pytest.mark.parametrize(("reason", "change"), DIFFERENT)
def test_a_waiver_replayed_on_any_other_decision_is_refused(
    reason: str, change: Callable[[GateDecision], GateDecision]
) -> None:
    with pytest.raises(GateRefused, match=reason) as e:
        overridden(change(FAILED), [WAIVER], NOW)
    assert "\n" not in str(e.value)


def test_a_waiver_of_evidence_without_package_is_not_one_for_a_package(tmp_path: Path) -> None:
    package = make_world(tmp_path).package()
    with pytest.raises(GateRefused, match="about package none"):
        overridden(replace(FAILED, package=gated(package)), [WAIVER], NOW)


FORGED: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (
        canonical_json(
            waiver_from_json(json.loads(base64.b64decode(json.loads(WAIVER)["payload"]))["predicate"]).to_json()
        ),
        "unsigned",
    ),
    (resigned(lambda s: None, BOB_KEY), "signed by unknown key"),
    (resigned(lambda s: None, kind="application/json"), "payloadType 'application/json'"),
    (sign_decision(FAILED, ADA_KEY), "predicateType 'https://in-toto.io/attestation/test-result"),
    (resigned(lambda s: s.update(_type="x")), "statement type 'x'"),
    (resigned(lambda s: s["subject"][0]["digest"].update(sha256=OTHER)), "statement contradicts the waiver"),
    (resigned(lambda s: s.update(extra=1)), "statement contradicts the waiver"),
    (resigned(lambda s: s["predicate"].update(expires="never")), "time 'never'"),
    (resigned(lambda s: s["predicate"].update(expires=s["predicate"]["issued"])), "allowed: later"),
    (resigned(lambda s: s["predicate"].update(reason="a\nb")), "one line"),
    (resigned(lambda s: s["predicate"].update(reason=" ")), "one line"),
    (resigned(lambda s: s["predicate"].update(checks=[])), "at least one check"),
    (resigned(lambda s: s["predicate"].update(checks=s["predicate"]["checks"] * 2)), "each once"),
    (resigned(lambda s: s["predicate"]["checks"][0].update(outcome="pass")), "'pass'; allowed"),
    (resigned(lambda s: s["predicate"]["checks"][0].update(observed=True)), "finite numbers"),
    (resigned(lambda s: s["predicate"]["owner"].update(name="Bob")), "is foreign"),
]


@pytest.mark.parametrize(("waiver", "reason"), FORGED, ids=[reason for _, reason in FORGED])
def test_a_forged_or_malformed_waiver_has_its_own_one_line_refusal(waiver: bytes, reason: str) -> None:
    with pytest.raises(GateRefused, match=reason) as e:
        overridden(FAILED, [waiver], NOW)
    assert "\n" not in str(e.value)


def test_an_owner_cannot_sign_in_the_name_of_another() -> None:
    both = replace(FAILED, override=replace(FAILED.override, owners=(ADA, BOB)))
    with pytest.raises(GateRefused, match="another owner signed it"):
        overridden(both, [resigned(lambda s: None, BOB_KEY)], NOW)
    with pytest.raises(GateRefused, match="this key is not that of Ada Example"):
        signed(both, key=BOB_KEY)


def test_a_check_is_waived_once() -> None:
    with pytest.raises(GateRefused, match="waived twice"):
        overridden(FAILED, [WAIVER, WAIVER], NOW)


def test_what_was_not_measured_cannot_be_waived() -> None:
    group = Group(name="night", support=3, outcome="not judged", observed=0.0, bound=None, reason="3 samples")
    check = replace(FAILED.checks[0], groups=(group,))
    with pytest.raises(GateRefused, match="data that are missing cannot be waived"):
        signed(replace(FAILED, checks=(check,)))


def test_a_waiver_is_refused_where_it_is_made_too() -> None:
    for change, says in (
        ({"days": 15}, "allows 14"),
        ({"by": BOB, "key": BOB_KEY}, "is foreign"),
        ({"by": Owner(name="Eve", key=ADA.key)}, "is foreign"),
    ):
        with pytest.raises(GateRefused, match=says):
            signed(FAILED, **change)  # type: ignore[arg-type]  # options by name
    with pytest.raises(GateRefused, match="has no check nothing; allowed: top1"):
        signed(FAILED, "nothing")
    with pytest.raises(GateRefused, match="waives too much"):
        signed(replace(FAILED, override=replace(FAILED.override, checks=("top5",))))


@given(st.data())
def test_a_decision_passes_exactly_if_every_check_passes_or_is_waived(data: st.DataObject) -> None:
    names = ("one", "two", "three")
    told = {n: data.draw(st.sampled_from(("pass", "fail", "inconclusive"))) for n in names}
    by_outcome = {o: decision("a" * 64, o).checks[0] for o in ("pass", "fail", "inconclusive")}  # type: ignore[arg-type]
    checks = tuple(replace(by_outcome[told[n]], name=n) for n in names)
    failing = [n for n in names if told[n] != "pass"]
    outcome = "fail" if "fail" in told.values() else "inconclusive" if failing else "pass"
    judged = replace(waivable(ADA, names), checks=checks, outcome=outcome)
    chosen = [n for n in failing if data.draw(st.booleans())]
    waivers = [signed(judged, n) for n in chosen]
    found = overridden(judged, waivers, NOW)
    left = [told[n] for n in failing if n not in chosen]
    assert found.outcome == ("fail" if "fail" in left else "inconclusive" if left else "pass")
    forged = {**json.loads(canonical_json(found.to_json())), "outcome": "pass"}
    if left:  # whatever a file says
        with pytest.raises(GateRefused, match="decision says pass but"):
            decision_from_json(forged)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field and list item below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        yield (*path, k)
        yield from places(v, (*path, k))


def without(value: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for k in path[:-1]:
        at = at[k]
    del at[path[-1]]
    return changed


STATEMENT = json.loads(base64.b64decode(json.loads(WAIVER)["payload"]))
WAIVED = overridden(waivable(ADA, ("top1", "other")), [signed(waivable(ADA, ("top1", "other")), "top1", "other")], NOW)
EVIDENCE = sign_decision(WAIVED, GATE)
GATE_STATEMENT = json.loads(base64.b64decode(json.loads(EVIDENCE)["payload"]))
FREE = ("predicate", "decision", "metrics")
"""What the gate itself says and nothing else in the evidence repeats: only its signature can vouch for it."""


def sealed(statement: Any, key: CryptoSigner) -> bytes:
    envelope = Envelope(canonical_json(statement), PAYLOAD_TYPE, {})
    envelope.sign(key)
    return canonical_json(envelope.to_dict())


@pytest.mark.parametrize("path", list(places(STATEMENT)), ids=lambda p: ".".join(map(str, p)))
def test_a_waiver_that_lacks_any_field_is_refused_even_if_its_owner_signed_it(path: tuple[Any, ...]) -> None:
    with pytest.raises(GateRefused):
        overridden(FAILED, [sealed(without(STATEMENT, path), ADA_KEY)], NOW)


@pytest.mark.parametrize("path", list(places(GATE_STATEMENT)), ids=lambda p: ".".join(map(str, p)))
def test_evidence_that_lacks_any_field_is_refused_even_if_the_gate_signed_it(path: tuple[Any, ...]) -> None:
    changed = sealed(without(GATE_STATEMENT, path), GATE)
    if path[: len(FREE)] == FREE and len(path) > len(FREE):
        assert verify_evidence(changed, [GATE.public_key]).metrics == {}
        return
    with pytest.raises(GateRefused):
        verify_evidence(changed, [GATE.public_key])


@settings(deadline=None)
@given(st.integers(0, len(WAIVER) - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_waiver_is_refused_or_changes_nothing(position: int, flip: int) -> None:
    changed = bytearray(WAIVER)
    changed[position] ^= flip
    try:
        found = read_waiver(bytes(changed), FAILED.override)
    except GateRefused:
        return
    assert found == read_waiver(WAIVER, FAILED.override)


@settings(deadline=None)
@given(st.integers(0, len(EVIDENCE) - 1), st.integers(1, 255))
def test_any_changed_byte_of_evidence_with_waivers_is_refused_or_changes_nothing(position: int, flip: int) -> None:
    changed = bytearray(EVIDENCE)
    changed[position] ^= flip
    try:
        found = verify_evidence(bytes(changed), [GATE.public_key])
    except GateRefused:
        return
    assert found == WAIVED


def test_a_gate_cannot_make_up_a_waiver() -> None:
    forged = SignedWaiver(waiver=WAIVED.waivers[0].waiver, signature="00" * 64)
    with pytest.raises(GateRefused, match="waiver: signature of key"):
        verify_evidence(sign_decision(replace(WAIVED, waivers=(forged,)), GATE), [GATE.public_key])
    with pytest.raises(GateRefused, match="is about report"):
        replace(WAIVED, report_sha256=OTHER)  # nor carry one over


def test_publishing_asks_whether_waivers_still_hold(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    package = world.package()
    failed = replace(about(package, "fail"), override=FAILED.override)
    waiver = sign_waiver(new_waiver(failed, ["top1"], ADA, "soon", (NOW, TEN_DAYS)), ADA_KEY)
    gate = world.keys.signer("gate")
    refused = Submission(package=package.path, evidence=sign_decision(failed, gate))
    with pytest.raises(GateRefused, match=r"gate outcome is fail \(top1: fail\)"):
        publish_release(world.store, refused, world.keys, now=NOW)
    passed = sign_decision(overridden(failed, [waiver], NOW), gate)
    submission = Submission(package=package.path, evidence=passed)
    later = NOW + TEN_DAYS
    with pytest.raises(GateRefused, match="waiver of Ada Example expired"):
        publish_release(world.store, submission, world.keys, now=later)
    assert world.store.list("targets/") == []
    assert publish_release(world.store, submission, world.keys, now=NOW).sha256 == package.sha256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"owners": (ADA, replace(BOB, name=ADA.name))}, "names"),
        ({"owners": (ADA, replace(BOB, key=ADA.key))}, "keys"),
        ({"checks": ("a", "a")}, "checks"),
        ({"checks": ()}, "belong together"),
        ({"owners": ()}, "belong together"),
        ({"max_days": 0}, "belong together"),
        ({"max_days": 91}, "allowed: 1 to 90"),
        ({"max_days": True}, "allowed: 1 to 90"),
    ],
)
def test_rules_that_do_not_hold_together_cannot_be_built(change: dict[str, Any], says: str) -> None:
    with pytest.raises(GateRefused, match=says):
        replace(FAILED.override, **change)


def test_many_may_override_many_checks_in_words() -> None:
    rules = Override(owners=(ADA, BOB), checks=("a", "b", "c"), max_days=3)
    assert rules.sentence().startswith("Ada Example or Bob may waive a, b and c by a signed waiver, each for at most 3")


def test_a_check_with_numbers_that_are_whole_is_the_same_check() -> None:
    whole = Check(name="top1", outcome="fail", observed=0, bound=0, limit=1, reason="measured")
    judged = replace(FAILED, checks=(whole,))
    assert overridden(judged, [signed(judged)], NOW).outcome == "pass"


@pytest.mark.parametrize(
    "key",
    [
        "00" * 32,
        "00" * 31 + "80",
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "ee" + "ff" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    ],
)
def test_a_key_whose_signatures_anybody_can_make_names_no_owner(key):
    with pytest.raises(GateRefused, match="anybody can make"):
        Owner(name="Ada", key=key)
