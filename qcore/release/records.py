"""Audit records: what was done to a repository, by which keys, each naming the one before it.

A record is a create-only object `audit/<sha256>.json`. The signed snapshot holds the digest of the newest, so a commit
and its record become visible together, a crash loses neither, and a record that is changed or missing breaks the chain.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from qcore.canonical import Digest, Json, canonical_json, sha256_bytes
from qcore.errors import ReleaseError
from qcore.release.store import ObjectStore
from qcore.waiver import format_time

AUDIT = "x-qcore-audit"
"""Field of the snapshot: digest of the newest record."""
RECORD_SCHEMA = "qcore.audit/1"
MAX_RECORDS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRecord:
    """One change: when, what (`action` and its words), the keys that signed each changed role, the record before."""

    time: str
    action: str
    said: Mapping[str, Json]
    signed_by: Mapping[str, Sequence[str]]
    previous: Digest | None

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.audit/1`)."""
        return {"schema": RECORD_SCHEMA, **asdict(self)}


def new_record(
    what: Mapping[str, Json], signed_by: Mapping[str, Sequence[str]], previous: Digest | None, now: datetime
) -> bytes:
    """Return the bytes of the record of `what`, which holds `action` and its words, behind the record `previous`."""
    said = {k: v for k, v in what.items() if k != "action"}
    action = str(what["action"])
    record = AuditRecord(time=format_time(now), action=action, said=said, signed_by=signed_by, previous=previous)
    return canonical_json(record.to_json()) + b"\n"


def record_key(digest: Digest) -> str:
    """Return the store key of the record of this digest."""
    return f"audit/{digest}.json"


def read_records(store: ObjectStore, newest: object) -> tuple[AuditRecord, ...]:
    """Return the records from `newest` (the snapshot's field) back to the first.

    Raises:
        ReleaseError: one is missing or was changed.
    """
    records: list[AuditRecord] = []
    digest = newest
    while digest is not None:
        found = store.get(record_key(str(digest))) if isinstance(digest, str) and len(digest) == 64 else None
        if found is None or sha256_bytes(found.data) != digest or len(records) == MAX_RECORDS:
            raise ReleaseError(
                f"audit: record {str(digest)[:12]} is missing or changed, {len(records)} newer ones are whole; restore "
                "audit/ from a backup, and find out who can write there"
            )
        value = json.loads(found.data)
        records.append(AuditRecord(**{k: v for k, v in value.items() if k != "schema"}))
        digest = records[-1].previous
    return tuple(records)
