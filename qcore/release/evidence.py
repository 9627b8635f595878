"""Gate evidence: the decision as a signed statement about one digest, and the reader that trusts nothing else.

DSSE envelope around an in-toto Statement v1 with the test-result predicate, so that foreign tools read it too; our own
decision travels whole inside the predicate. Whose key counts is the caller's question (`repository.py` takes it from
signed metadata); whether the outcome is a pass is asked there as well.

Source: in-toto attestation spec v1, predicate test-result v0.1; DSSE v1.
"""

import json
from collections.abc import Sequence
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer

from qcore.canonical import Json, canonical_json
from qcore.errors import GateRefused
from qcore.release.manifest import MODEL
from qcore.report import GateDecision, decision_from_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
MAX_EVIDENCE_BYTES = 1 << 20
RESULTS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "WARNED"}

_AGAIN = "pass the evidence file that `qcore gate` wrote"


def sign_decision(decision: GateDecision, signer: Signer) -> bytes:
    """Return the evidence: `decision` as a signed in-toto statement in a DSSE envelope, canonical JSON."""
    envelope = Envelope(canonical_json(_statement(decision)), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def verify_evidence(envelope: bytes, keys: Sequence[Key]) -> GateDecision:
    """Return the decision inside `envelope` after one of `keys` vouched for every byte of it.

    Raises:
        GateRefused: not JSON, not an envelope, unsigned, signed by none of `keys`, changed after signing, of another
            type, or the statement contradicts the decision inside it.
    """
    parsed = _parse(envelope)
    if parsed.payload_type != PAYLOAD_TYPE:
        raise GateRefused(f"evidence: payloadType {parsed.payload_type!r}; allowed: {PAYLOAD_TYPE}; {_AGAIN}")
    _check_signature(parsed, keys)
    try:
        statement = json.loads(parsed.payload)
        found, predicate_type = statement["_type"], statement["predicateType"]
        decision = decision_from_json(statement["predicate"]["decision"])
    except (ValueError, KeyError, TypeError) as e:
        raise GateRefused(f"evidence: the signed payload is not an in-toto statement ({e!r}); {_AGAIN}") from e
    if (found, predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise GateRefused(f"evidence: statement type {found!r}, predicateType {predicate_type!r}; {_AGAIN}")
    expected = _statement(decision)
    for field in ("subject", "predicate"):
        if statement[field] != expected[field]:
            raise GateRefused(f"evidence: {field} contradicts the decision inside it; run `qcore gate` again")
    return decision


def claimed_decision(envelope: bytes) -> GateDecision:
    """Return the decision that `envelope` claims, **without checking who signed it**.

    For builders that stop early on a failed gate; what is published is decided by `verify_evidence`.

    Raises:
        GateRefused: not an envelope of a decision.
    """
    parsed = _parse(envelope)
    try:
        return decision_from_json(json.loads(parsed.payload)["predicate"]["decision"])
    except (ValueError, KeyError, TypeError) as e:
        raise GateRefused(f"evidence: the payload is not a gate decision ({e!r}); {_AGAIN}") from e


def _statement(decision: GateDecision) -> dict[str, Json]:
    def tests(outcome: str) -> list[str]:
        return [c.name for c in decision.checks if c.outcome == outcome]

    def resource(name: str, digest: str) -> Json:
        return {"name": name, "digest": {"sha256": digest}}

    return {
        "_type": STATEMENT_TYPE,
        "subject": [resource(MODEL, decision.model_sha256)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "result": RESULTS[decision.outcome],
            "configuration": [
                resource("policy", decision.policy_sha256),
                resource("data", decision.data_sha256),
                resource("baseline", decision.baseline_sha256),
            ],
            "passedTests": tests("pass"),
            "warnedTests": tests("inconclusive"),
            "failedTests": tests("fail"),
            "decision": json.loads(canonical_json(decision.to_json())),  # tuples as lists, as they come back
        },
    }


def _parse(envelope: bytes) -> Envelope:
    if len(envelope) > MAX_EVIDENCE_BYTES:
        raise GateRefused(f"evidence: {len(envelope)} bytes; allowed: {MAX_EVIDENCE_BYTES}; {_AGAIN}")
    try:
        value: Any = json.loads(envelope)
    except (ValueError, RecursionError) as e:
        raise GateRefused(f"evidence: not JSON; expected a signed envelope; {_AGAIN}") from e
    if not isinstance(value, dict) or not {"payload", "payloadType", "signatures"} <= set(value):
        what = value.get("schema", "an object") if isinstance(value, dict) else type(value).__name__
        raise GateRefused(f"evidence: unsigned: found {what}, expected a DSSE envelope; {_AGAIN}")
    if not value["signatures"]:
        raise GateRefused(f"evidence: unsigned: the envelope holds no signature; {_AGAIN}")
    try:
        return Envelope.from_dict(value)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise GateRefused(f"evidence: malformed envelope ({e}); {_AGAIN}") from e


def _check_signature(envelope: Envelope, keys: Sequence[Key]) -> None:
    trusted = {k.keyid: k for k in keys}
    known = [s for keyid, s in envelope.signatures.items() if keyid in trusted]
    if not known:
        by = ", ".join(k[:8] for k in envelope.signatures)
        allowed = ", ".join(k[:8] for k in trusted) or "none"
        raise GateRefused(f"evidence: signed by unknown key {by}; trusted: {allowed}; gate with a trusted key")
    pae = envelope.pae()
    for signature in known:
        try:
            trusted[signature.keyid].verify_signature(signature, pae)
        except UnverifiedSignatureError as e:
            raise GateRefused(
                f"evidence: signature of key {signature.keyid[:8]} does not fit: changed after signing; "
                "run `qcore gate` again"
            ) from e
