"""Waivers on files: a key for whoever may override, and a signed waiver of failed checks."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.steps.guard import read_evidence, refuse_overwrite

if TYPE_CHECKING:
    from qcore.waiver import Waiver


def waive(
    *,
    evidence: Path,
    checks: Sequence[str],
    owner: str,
    reason: str,
    days: int,
    key: Path,
    out: Path,
    now: datetime | None = None,
) -> "Waiver":
    """Return the waiver of `checks`, signed into `out` with the private key file `key` of `owner`.

    It is about exactly the decision in `evidence`, and of use only for a gate that decides the same again; so the
    signature of the evidence need not be known here.

    Args:
        evidence: what `gate` wrote.
        checks: names of checks that did not pass.
        owner: name of the owner as the policy has it.
        reason: one line that reviewers read.
        days: how long it holds, from `now` on.
        key: private ed25519 key (PEM) of the owner.
        out: where the waiver goes.
        now: aware; None: the time of the call.

    Raises:
        GateRefused: the policy does not let this owner waive these checks for so long, or a check needs no waiver.
        ReleaseError: the key cannot be used.
    """
    from qcore.errors import GateRefused
    from qcore.files import write_atomic
    from qcore.release.evidence import claimed_decision
    from qcore.release.keys import load_signer
    from qcore.release.waivers import new_waiver, owner_key, sign_waiver
    from qcore.waiver import MAX_DAYS, Owner

    refuse_overwrite(out, evidence, key)
    if not 1 <= days <= MAX_DAYS:
        raise GateRefused(f"a waiver of {days} days is not allowed; allowed: 1 to {MAX_DAYS}; correct --days")
    decision, signer = claimed_decision(read_evidence(evidence)), load_signer(key)
    person = Owner(name=owner, key=owner_key(signer.public_key))
    lifetime = (now or datetime.now(UTC), timedelta(days=days))
    waiver = new_waiver(decision, checks, person, reason, lifetime)
    write_atomic(out, sign_waiver(waiver, signer))
    return waiver


def make_owner_key(*, out: Path) -> str:
    """Return the public key, as a policy holds it, of a new private key in `out` (PEM, readable by the owner only).

    Raises:
        ReleaseError: `out` exists or cannot be written.
    """
    from qcore.release.keys import create_key
    from qcore.release.waivers import owner_key

    return owner_key(create_key(out).public_key)
