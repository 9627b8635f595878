"""Waivers signed, read and applied: a decision that passes only because a named person said so, for a while.

A waiver is a DSSE-signed in-toto statement whose subject is the model. The decision keeps waiver and signature, so that
whoever verifies the evidence verifies the waiver with it, without another file. The clock is an argument everywhere.
What a waiver may say is in `qcore/waiver.py`.

Source: in-toto attestation spec v1 (statement with a predicate of our own); DSSE v1; RFC 8032 (ed25519).
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Key, Signature, Signer, SSlibKey

from qcore.canonical import Digest, Json, canonical_json, sha256_json
from qcore.errors import GateRefused
from qcore.release.envelope import PAYLOAD_TYPE, STATEMENT_TYPE, Kind, check_signature, open_statement, sign_statement
from qcore.release.manifest import MODEL
from qcore.report import GateDecision, outcome_of, waived_check
from qcore.waiver import (
    Override,
    Owner,
    SignedWaiver,
    Waiver,
    format_time,
    refuse_not_permitted,
    refuse_out_of_time,
    waiver_from_json,
)

KIND = Kind(
    name="waiver",
    predicate_type="urn:kfp-qcore:gate-waiver:v1",
    again="pass the file that `qcore gate waive` wrote",
)


def new_waiver(
    decision: GateDecision, checks: Sequence[str], owner: Owner, reason: str, lifetime: tuple[datetime, timedelta]
) -> Waiver:
    """Return the waiver of `checks` in `decision`; `lifetime` is when it is issued (aware) and how long it holds.

    Raises:
        GateRefused: the policy does not permit it, or a check passes, is not asked, or judged nothing.
    """
    known = {c.name: c for c in decision.checks}
    if odd := [name for name in checks if name not in known]:
        raise GateRefused(f"this decision has no check {', '.join(odd)}; allowed: {', '.join(known)}; correct --check")
    issued, holds = lifetime
    waiver = Waiver(
        owner=owner,
        reason=reason,
        issued=format_time(issued),
        expires=format_time(issued + holds),
        binding=decision.binding,
        checks=tuple(waived_check(known[name]) for name in checks),
    )
    refuse_not_permitted(waiver, decision.override)
    return waiver


def sign_waiver(waiver: Waiver, signer: Signer) -> bytes:
    """Return `waiver` signed by its owner: DSSE envelope, canonical JSON.

    Raises:
        GateRefused: the key is not the one that the waiver names.
    """
    if owner_key(signer.public_key) != waiver.owner.key:
        raise GateRefused(f"this key is not that of {waiver.owner.name}; pass the private key that belongs to it")
    return sign_statement(_statement(waiver), signer)


def read_waiver(envelope: bytes, override: Override) -> SignedWaiver:
    """Return the waiver inside `envelope` after the owner whom it names, one of those in `override`, vouched for it.

    Raises:
        GateRefused: nobody may override, not a waiver, unsigned, signed by somebody else, or changed after signing.
    """
    if not override.owners:
        raise GateRefused(f"waiver: {override.sentence()} Leave the waiver out, mend the model or change the policy")
    keys = [public_key(o) for o in override.owners]
    statement, keyid, opened = open_statement(envelope, KIND, keys)
    waiver = waiver_from_json(statement.get("predicate"))
    if public_key(waiver.owner).keyid != keyid:
        raise GateRefused(f"waiver: says it is of {waiver.owner.name} but another owner signed it; sign it again")
    if statement != _statement(waiver):
        raise GateRefused(f"waiver: the statement contradicts the waiver inside it; {KIND.again}")
    signature = bytes.fromhex(opened.signatures[keyid].signature).hex()
    signed = SignedWaiver(waiver=waiver, signature=signature)
    verify_waiver(signed)  # the payload as we write it, which is what decisions keep
    return signed


def verify_waiver(signed: SignedWaiver) -> None:
    """Refuse a waiver that the owner whom it names did not sign.

    Raises:
        GateRefused: the signature does not fit.
    """
    key = public_key(signed.waiver.owner)
    signature = {key.keyid: Signature(key.keyid, signed.signature)}
    check_signature(Envelope(canonical_json(_statement(signed.waiver)), PAYLOAD_TYPE, signature), KIND, [key])


def overridden(decision: GateDecision, envelopes: Sequence[bytes], now: datetime) -> GateDecision:
    """Return `decision` with the checks that `envelopes` waive taken out of its outcome, at `now` (aware).

    The checks stay as they are; the waivers stand beside them. A waiver that cannot be used refuses the whole: what it
    may say is for the decision itself to ask (`GateDecision`), its signature and its time are asked here.

    Raises:
        GateRefused: a waiver is forged, foreign, expired, about something else, or waives too much.
    """
    signed = tuple(read_waiver(e, decision.override) for e in envelopes)
    for s in signed:
        refuse_out_of_time(s.waiver, now)
    waived = [c.name for s in signed for c in s.waiver.checks]
    return replace(decision, outcome=outcome_of(decision.checks, waived), waivers=signed)


def refuse_expired(decision: GateDecision, now: datetime) -> None:
    """Refuse a decision whose waivers do not all hold at `now` (aware).

    Raises:
        GateRefused: one expired.
    """
    for signed in decision.waivers:
        refuse_out_of_time(signed.waiver, now)


def waiver_digest(waiver: Waiver) -> Digest:
    """Return the digest of what is signed."""
    return sha256_json(_statement(waiver))


def public_key(owner: Owner) -> Key:
    """Return the key of `owner`, with which signatures are verified."""
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(owner.key)))


def owner_key(key: Key) -> str:
    """Return the public `key` as a policy holds it.

    Raises:
        GateRefused: it is no ed25519 key.
    """
    if key.keytype != "ed25519":
        raise GateRefused(f"the key is of type {key.keytype}; allowed: ed25519; make one with `qcore gate owner-key`")
    return str(key.keyval["public"])


def _statement(waiver: Waiver) -> dict[str, Json]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": MODEL, "digest": {"sha256": waiver.binding.model}}],
        "predicateType": KIND.predicate_type,
        "predicate": _as_read(waiver),
    }


def _as_read(waiver: Waiver) -> Json:
    """Return the JSON form with lists where the value has tuples, as a reader sees it."""
    value = waiver.to_json()
    return {**value, "checks": list(value["checks"])}
