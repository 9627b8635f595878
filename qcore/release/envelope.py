"""DSSE envelopes of in-toto statements: one way to sign them, and one reader that trusts nothing before the signature.

Gate decisions (`evidence.py`) and waivers (`waivers.py`) are such statements; a `Kind` says which of them is meant, so
that one never passes for the other.

Source: DSSE v1 (protocol and envelope); in-toto attestation spec v1, statement.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer

from qcore.canonical import Json, canonical_json
from qcore.errors import GateRefused

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of statement: what messages call it, its predicate type, and what to do for a good one."""

    name: str
    predicate_type: str
    again: str


def sign_statement(statement: Json, signer: Signer) -> bytes:
    """Return the envelope of `statement`, signed, as canonical JSON with a closing newline."""
    envelope = Envelope(canonical_json(statement), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def open_statement(data: bytes, kind: Kind, keys: Sequence[Key]) -> tuple[dict[str, Any], str, Envelope]:
    """Return the statement inside the envelope `data` after `keys` vouched for every byte of it, by whom, and where.

    Every signature of a key in `keys` must fit, and there must be one; the second value is the id of such a key.

    Raises:
        GateRefused: not JSON, not an envelope, unsigned, signed by none of `keys`, changed after signing, or of
            another type.
    """
    envelope = parse_envelope(data, kind)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise GateRefused(f"{kind.name}: payloadType {envelope.payload_type!r}; allowed: {PAYLOAD_TYPE}; {kind.again}")
    keyid = check_signature(envelope, kind, keys)
    statement = read_payload(envelope, kind)
    found, predicate_type = statement.get("_type"), statement.get("predicateType")
    if (found, predicate_type) != (STATEMENT_TYPE, kind.predicate_type):
        raise GateRefused(f"{kind.name}: statement type {found!r}, predicateType {predicate_type!r}; {kind.again}")
    return statement, keyid, envelope


def parse_envelope(data: bytes, kind: Kind) -> Envelope:
    """Return the envelope in `data`, **without checking who signed it**.

    Raises:
        GateRefused: too large, not JSON, not an envelope, or without any signature.
    """
    if len(data) > MAX_BYTES:
        raise GateRefused(f"{kind.name}: {len(data)} bytes; allowed: {MAX_BYTES}; {kind.again}")
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise GateRefused(f"{kind.name}: not JSON; expected a signed envelope; {kind.again}") from e
    if not isinstance(value, dict) or not {"payload", "payloadType", "signatures"} <= set(value):
        what = value.get("schema", "an object") if isinstance(value, dict) else type(value).__name__
        raise GateRefused(f"{kind.name}: unsigned: found {what}, expected a DSSE envelope; {kind.again}")
    if not value["signatures"]:
        raise GateRefused(f"{kind.name}: unsigned: the envelope holds no signature; {kind.again}")
    try:
        if any(not isinstance(s["keyid"], str) for s in value["signatures"]):
            raise ValueError("a keyid is no text")
        return Envelope.from_dict(value)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise GateRefused(f"{kind.name}: malformed envelope ({e}); {kind.again}") from e


def read_payload(envelope: Envelope, kind: Kind) -> dict[str, Any]:
    """Return the JSON object that `envelope` carries.

    Raises:
        GateRefused: the payload is something else.
    """
    try:
        statement = json.loads(envelope.payload)
    except (ValueError, RecursionError) as e:
        raise GateRefused(f"{kind.name}: the payload is not an in-toto statement ({e}); {kind.again}") from e
    if not isinstance(statement, dict):
        what = type(statement).__name__
        raise GateRefused(f"{kind.name}: the payload is {what}, not an in-toto statement; {kind.again}")
    return statement


def check_signature(envelope: Envelope, kind: Kind, keys: Sequence[Key]) -> str:
    """Return the id of a key in `keys` that signed `envelope`.

    Raises:
        GateRefused: none did, or the signature of one does not fit.
    """
    trusted = {k.keyid: k for k in keys}
    known = [s for keyid, s in envelope.signatures.items() if keyid in trusted]
    if not known:
        by = ", ".join(k[:8] for k in envelope.signatures)
        allowed = ", ".join(k[:8] for k in trusted) or "none"
        raise GateRefused(f"{kind.name}: signed by unknown key {by}; trusted: {allowed}; sign with a trusted key")
    pae = envelope.pae()
    for signature in known:
        try:
            trusted[signature.keyid].verify_signature(signature, pae)
        except UnverifiedSignatureError as e:
            raise GateRefused(
                f"{kind.name}: signature of key {signature.keyid[:8]} does not fit: changed after signing; {kind.again}"
            ) from e
    return known[0].keyid
