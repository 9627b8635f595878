"""Gate evidence: the decision as a signed statement about digests, and the reader that trusts nothing else.

DSSE envelope around an in-toto Statement v1 with the test-result predicate, so that foreign tools read it too; our own
decision travels whole inside the predicate. Its subjects are the model and, where there is one, the package and its
manifest. Whose key counts is the caller's question (`repository.py` takes it from signed metadata); whether the outcome
is a pass, and whether waivers still hold, is asked there as well.

Source: in-toto attestation spec v1, predicate test-result v0.1; DSSE v1.
"""

import json
from collections.abc import Sequence

from securesystemslib.signer import Key, Signer

from qcore.canonical import Json, canonical_json
from qcore.errors import GateRefused
from qcore.release.envelope import (
    STATEMENT_TYPE,
    Kind,
    open_statement,
    parse_envelope,
    read_payload,
    sign_statement,
)
from qcore.release.manifest import MODEL
from qcore.release.package import MANIFEST
from qcore.release.waivers import verify_waiver, waiver_digest
from qcore.report import GateDecision, decision_from_json

KIND = Kind(
    name="evidence",
    predicate_type="https://in-toto.io/attestation/test-result/v0.1",
    again="pass the evidence file that `qcore gate` wrote",
)
PACKAGE = "package.qpkg"
RESULTS = {"pass": "PASSED", "fail": "FAILED", "inconclusive": "WARNED"}
WAIVED_RESULT = "WARNED"
"""What a pass by waivers is for foreign tools: one that asks for PASSED does not take it."""


def sign_decision(decision: GateDecision, signer: Signer) -> bytes:
    """Return the evidence: `decision` as a signed in-toto statement in a DSSE envelope, canonical JSON."""
    return sign_statement(_statement(decision), signer)


def verify_evidence(envelope: bytes, keys: Sequence[Key]) -> GateDecision:
    """Return the decision inside `envelope` after one of `keys` vouched for every byte of it.

    Waivers in it are verified against the keys of their owners. Expiry is not asked here: what was signed stays true.

    Raises:
        GateRefused: not JSON, not an envelope, unsigned, signed by none of `keys`, changed after signing, of another
            type, the statement contradicts the decision inside it, or a waiver was not signed by its owner.
    """
    statement, _, _ = open_statement(envelope, KIND, keys)
    return _agreeing(statement)


def consistent_decision(envelope: bytes) -> GateDecision:
    """Return the decision that `envelope` claims, **without checking who signed it**, for showing it as a claim.

    Raises:
        GateRefused: not an envelope of a decision, the statement contradicts the decision inside it, or a waiver was
            not signed by its owner.
    """
    return _agreeing(read_payload(parse_envelope(envelope, KIND), KIND))


def _agreeing(statement: Json) -> GateDecision:
    """Return the decision inside `statement` if everything around it says the same."""
    decision = _decision(statement)
    expected = _statement(decision)
    for field in sorted(expected.keys() | statement.keys()):
        if statement.get(field) != expected.get(field):
            raise GateRefused(f"evidence: {field} contradicts the decision inside it; run `qcore gate` again")
    for signed in decision.waivers:
        verify_waiver(signed)
    return decision


def claimed_decision(envelope: bytes) -> GateDecision:
    """Return the decision that `envelope` claims, **without checking who signed it**.

    For looking up whose key to ask, and for waivers, which are held against the gate's own decision later; what is
    published is decided by `verify_evidence`.

    Raises:
        GateRefused: not an envelope of a decision.
    """
    return _decision(read_payload(parse_envelope(envelope, KIND), KIND))


def _decision(statement: Json) -> GateDecision:
    try:
        return decision_from_json(statement["predicate"]["decision"])
    except (KeyError, TypeError) as e:
        raise GateRefused(f"evidence: the payload is not a gate decision ({e!r}); {KIND.again}") from e


def _statement(decision: GateDecision) -> dict[str, Json]:
    def tests(outcome: str) -> list[str]:
        return [c.name for c in decision.checks if c.outcome == outcome]

    result = RESULTS[decision.outcome]
    if decision.outcome == "pass" and decision.waivers:
        result = WAIVED_RESULT
    optional = {"champion": decision.champion_sha256, "parity": decision.parity_sha256}
    waivers = [_resource(f"waiver of {s.waiver.owner.name}", waiver_digest(s.waiver)) for s in decision.waivers]
    return {
        "_type": STATEMENT_TYPE,
        "subject": _subjects(decision),
        "predicateType": KIND.predicate_type,
        "predicate": {
            "result": result,
            "configuration": [
                _resource("policy", decision.policy_sha256),
                _resource("data", decision.data_sha256),
                _resource("baseline", decision.baseline_sha256),
                _resource("report", decision.report_sha256),
                *(_resource(name, digest) for name, digest in optional.items() if digest is not None),
                *waivers,
            ],
            "passedTests": tests("pass"),
            "warnedTests": tests("inconclusive"),
            "failedTests": tests("fail"),
            "decision": json.loads(canonical_json(decision.to_json())),  # tuples as lists, as they come back
        },
    }


def _subjects(decision: GateDecision) -> list[Json]:
    model, package = _resource(MODEL, decision.model_sha256), decision.package
    if package is None:
        return [model]
    return [_resource(PACKAGE, package.sha256), model, _resource(MANIFEST, package.manifest_sha256)]


def _resource(name: str, digest: str) -> Json:
    return {"name": name, "digest": {"sha256": digest}}
