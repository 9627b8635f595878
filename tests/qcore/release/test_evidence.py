"""Evidence: only a decision that a trusted key signed comes out; every other input has its own refusal."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from simulators import decision

from qcore.canonical import canonical_json
from qcore.errors import GateRefused
from qcore.release.envelope import PAYLOAD_TYPE
from qcore.release.evidence import sign_decision, verify_evidence
from qcore.report import Outcome

GATE = CryptoSigner.generate_ed25519()
OTHER = CryptoSigner.generate_ed25519()
MODEL = "a" * 64


def signed(statement: object, payload_type: str = PAYLOAD_TYPE) -> bytes:
    envelope = Envelope(json.dumps(statement).encode(), payload_type, {})
    envelope.sign(GATE)
    return canonical_json(envelope.to_dict())


def statement() -> dict[str, Any]:
    payload = json.loads(sign_decision(decision(MODEL), GATE))["payload"]
    value: dict[str, Any] = json.loads(base64.b64decode(payload))
    return value


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return evidence that is signed by the gate after `change` was done to the statement."""
    value = statement()
    change(value)
    return signed(value)


@pytest.mark.parametrize(("outcome", "result"), [("pass", "PASSED"), ("fail", "FAILED"), ("inconclusive", "WARNED")])
def test_a_decision_comes_back_whole_and_reads_as_a_test_result(outcome: Outcome, result: str) -> None:
    evidence = sign_decision(decision(MODEL, outcome), GATE)
    assert verify_evidence(evidence, [OTHER.public_key, GATE.public_key]) == decision(MODEL, outcome)
    value = json.loads(base64.b64decode(json.loads(evidence)["payload"]))
    assert value["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert value["predicate"]["result"] == result
    assert value["subject"] == [{"name": "model.onnx", "digest": {"sha256": MODEL}}]
    assert {r["name"] for r in value["predicate"]["configuration"]} == {"policy", "data", "baseline", "report"}


def test_equal_decisions_give_equal_bytes() -> None:
    assert sign_decision(decision(MODEL), GATE) == sign_decision(decision(MODEL), GATE)


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        (b"", "not JSON"),
        (b"\x00\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "unsigned: found list"),
        (canonical_json(decision(MODEL).to_json()), "unsigned: found qcore.decision/3, expected a DSSE envelope"),
        (canonical_json({"payload": "", "payloadType": PAYLOAD_TYPE, "signatures": []}), "holds no signature"),
        (canonical_json({"payload": 3, "payloadType": PAYLOAD_TYPE, "signatures": [{}]}), "malformed envelope"),
        (canonical_json({"payload": "", "payloadType": PAYLOAD_TYPE, "signatures": [3]}), "malformed envelope"),
        (b" " * (1 << 20) + b"{}", "bytes; allowed"),
        (sign_decision(decision(MODEL), OTHER), "signed by unknown key"),
        (signed({}, "text/plain"), "payloadType 'text/plain'"),
        (signed({}), "statement type None"),
        (signed([]), "not an in-toto statement"),
        (edited(lambda s: s.update(_type="x")), "statement type 'x'"),
        (edited(lambda s: s.update(predicateType="https://slsa.dev/provenance/v1")), "predicateType 'https://slsa"),
        (edited(lambda s: s["subject"][0]["digest"].update(sha256="b" * 64)), "subject contradicts"),
        (edited(lambda s: s["predicate"].update(result="WARNED")), "predicate contradicts"),
        (edited(lambda s: s["predicate"]["decision"].update(outcome="fail")), "decision says fail but"),
        (edited(lambda s: s["predicate"]["decision"].pop("n")), "field 'n' is missing"),
    ],
)
def test_everything_else_has_its_own_one_line_refusal(evidence: bytes, message: str) -> None:
    with pytest.raises(GateRefused, match=message) as e:
        verify_evidence(evidence, [GATE.public_key])
    assert "\n" not in str(e.value)


def test_an_edited_payload_is_refused() -> None:
    value = json.loads(sign_decision(decision(MODEL, "fail"), GATE))
    payload = base64.b64decode(value["payload"]).replace(b'"fail"', b'"pass"').replace(b"FAILED", b"PASSED")
    value["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(GateRefused, match="changed after signing"):
        verify_evidence(json.dumps(value).encode(), [GATE.public_key])


def test_no_trusted_key_means_no_evidence() -> None:
    with pytest.raises(GateRefused, match="trusted: none"):
        verify_evidence(sign_decision(decision(MODEL), GATE), [])


EVIDENCE = sign_decision(decision(MODEL), GATE)


@given(st.integers(0, len(EVIDENCE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_changes_nothing(position: int, flip: int) -> None:
    changed = bytearray(EVIDENCE)
    changed[position] ^= flip
    try:
        found = verify_evidence(bytes(changed), [GATE.public_key])
    except GateRefused:
        return
    assert found == decision(MODEL)
