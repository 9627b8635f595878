"""Signed repository state: read and verified from the pinned root downwards, changed by one compare-and-swap.

Every metadata file except `timestamp.json` is created once under its version and never changed; replacing
`timestamp.json` is the whole transaction, so a reader or a crash sees the old state or the new one. A version number
taken by a crashed or losing writer is skipped. Calls that do not wait for each other are made together, because a store
may be far away. What a change means (families, releases, channels) is in `repository.py`.

Source: TUF specification 1.0.31, sections 4 (formats) and 6 (consistent snapshots).
"""

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar, cast

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from qcore.canonical import Json, sha256_bytes
from qcore.errors import DoubtfulWriteError, ReleaseError
from qcore.release.canary import TIMESTAMP_KEY, refuse_unreadable
from qcore.release.keys import KeyRing
from qcore.release.records import AUDIT, new_record, record_key
from qcore.release.store import ObjectStore

LIFETIMES: Mapping[str, timedelta] = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    "models": timedelta(days=90),
    "channel": timedelta(days=30),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(hours=48),
}
"""How long a signature of each kind of role counts."""
RESIGN_AFTER = 1 / 8
"""The share of its life after which `refresh` signs a role again: 6 h for the timestamp."""
MAX_ATTEMPTS = 50
MAX_PROBES = 1000
MAX_REREADS = 6
"""How often a commit is read back, over 1.5 s, before the store is said to serve stale reads."""
CALLS_AT_ONCE = 8
"""Requests at a time: a release takes 11 round trips of a store that is far away, not one for every file."""

_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trusted:
    """One state of the repository after verification; `etag` is what the next change must find unchanged.

    `files` holds the bytes that it was verified from, by store key: every root behind the pinned one, and each role.
    """

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    delegated: Mapping[str, Targets]
    etag: str
    files: Mapping[str, bytes]

    def roles(self) -> Mapping[str, Signed]:
        """Return every role by its name."""
        top = {"root": self.root, "targets": self.targets, "snapshot": self.snapshot, "timestamp": self.timestamp}
        return {**top, **self.delegated}


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A targets role as it shall become, and who signs it; version and expiry are still open.

    Unless `signed` says otherwise: the same role with signatures that were made elsewhere, over its version and expiry
    as they stand. Those of `signers` are added.
    """

    role: Targets
    signers: Sequence[Signer]
    signed: Metadata[Targets] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """New content of roles by name, and the objects (by store key) that must exist before anything names them.

    `record` says for the audit what is done (`records.py`). `life` is how long the new snapshot and timestamp count
    at least; None: as long as always.
    """

    drafts: Mapping[str, Draft] = field(default_factory=dict)
    objects: Mapping[str, bytes] = field(default_factory=dict)
    record: Mapping[str, Json] | None = None
    life: timedelta | None = None


def transact(store: ObjectStore, keys: KeyRing, now: datetime, decide: Callable[[Trusted], Change | None]) -> Trusted:
    """Return the verified state after the change that `decide` asks for is committed.

    `decide` sees a verified state and is asked again, on the winner's state, after a lost race. None means that
    nothing is to be done. An empty change renews the timestamp (and the snapshot when it is due).

    Raises:
        ReleaseError: the store does not verify, a key is missing or not the trusted one, the races were all lost,
            the store does not show what was committed, or clients cannot read it (`canary.py`).
    """
    wait = random.SystemRandom()
    for attempt in range(MAX_ATTEMPTS):
        trusted = load_current(store, keys, now)
        change = decide(trusted)
        if change is None:
            return trusted
        with suppress(DoubtfulWriteError):  # asked again like after a lost race: `decide` sees what is there
            if _commit(store, trusted, change, keys, now):
                return _confirmed(store, keys, now, trusted, change)
        time.sleep(wait.uniform(0, 0.01 * 2 ** min(attempt, 5)))
    raise ReleaseError(f"other publishers were faster {MAX_ATTEMPTS} times; nothing was published; publish again")


def _confirmed(store: ObjectStore, keys: KeyRing, now: datetime, before: Trusted, change: Change) -> Trusted:
    """Return the state after the commit, once it was read back as clients do."""
    after = _load_committed(store, keys, now, before.timestamp.version + 1)
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        found = dict(zip(change.objects, pool.map(store.get, change.objects), strict=True))
    for key, data in change.objects.items():
        if getattr(found[key], "data", None) != data:
            raise ReleaseError(f"committed, but {key} does not read as it was written; check the store, publish again")
    paths: list[str] = []
    for name, draft in change.drafts.items():
        old = {} if name not in before.delegated else before.delegated[name].targets
        targets = draft.role.targets
        paths += [p for p, t in targets.items() if old.get(p) != t] or list(targets)[:1]
    refuse_unreadable(read_pinned(keys), before.files, after.files, paths, now)
    return after


def _load_committed(store: ObjectStore, keys: KeyRing, now: datetime, version: int) -> Trusted:
    """Return a state at least as new as the timestamp `version` that was just committed."""
    for attempt in range(MAX_REREADS):
        time.sleep(0.1 * attempt)
        trusted = load_current(store, keys, now)
        if trusted.timestamp.version >= version:
            return trusted
    raise ReleaseError(
        f"timestamp version {version} is committed, and the store still shows version {trusted.timestamp.version}: "
        "stale reads; run `qcore repo doctor`"
    )


def read_pinned(keys: KeyRing) -> bytes:
    """Return the root metadata that is pinned beside the keys; there is no trust on first use.

    Raises:
        ReleaseError: it is missing.
    """
    try:
        return keys.pinned_root.read_bytes()
    except OSError as e:
        raise ReleaseError(
            f"trusted root {keys.pinned_root} cannot be read: {e.strerror}; "
            "make the repository with `qcore repo init`, or copy its root.json there"
        ) from e


def load_current(store: ObjectStore, keys: KeyRing, now: datetime) -> Trusted:
    """Return the state verified from the root that is pinned beside the keys.

    Raises:
        ReleaseError: no pinned root, no repository, it does not verify, or its root expired.
    """
    trusted = load_trusted(store, read_pinned(keys))
    if trusted.root.is_expired(now):
        raise ReleaseError(f"the root role expired at {trusted.root.expires}; sign a new root with the root keys")
    return trusted


def load_trusted(store: ObjectStore, pinned: bytes) -> Trusted:
    """Return the state that `timestamp.json` names, every file checked by signature, digest and version.

    Expiry is not asked here: an expired role can still be signed again.

    Raises:
        ReleaseError: there is no repository, or a file is missing, forged or not the one that is named.
    """
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        asked = pool.submit(store.get, TIMESTAMP_KEY)
        root, files = _root_chain(store, pinned)
        found = asked.result()
        if found is None:
            raise ReleaseError("no repository in this store (no timestamp.json); make one with `qcore repo init`")
        timestamp = _verified(Timestamp, found.data, root, "timestamp")
        data = _fetched(store, "snapshot", timestamp.snapshot_meta)
        snapshot = _checked(Snapshot, root, "snapshot", timestamp.snapshot_meta, data)
        roles = {name.removesuffix(".json"): meta for name, meta in sorted(snapshot.meta.items())}
        if "targets" not in roles:
            raise ReleaseError("repository: the snapshot names no targets role; restore the store from a backup")
        read = dict(zip(roles, pool.map(partial(_fetched, store), roles, roles.values()), strict=True))
    targets = _checked(Targets, root, "targets", roles["targets"], read["targets"])
    delegated = {n: _checked(Targets, targets, n, m, read[n]) for n, m in roles.items() if n != "targets"}
    files |= {TIMESTAMP_KEY: found.data, f"metadata/{timestamp.snapshot_meta.version}.snapshot.json": data}
    files |= {f"metadata/{roles[n].version}.{n}.json": d for n, d in read.items()}
    return Trusted(
        root=root,
        timestamp=timestamp,
        snapshot=snapshot,
        targets=targets,
        delegated=delegated,
        etag=found.etag,
        files=files,
    )


def lifetime(role: str) -> timedelta:
    """Return how long a new signature of `role` counts."""
    return LIFETIMES[role.split("-", 1)[0]]


def is_due(role: str, signed: Signed, now: datetime) -> bool:
    """Return whether `refresh` should sign `role` again at `now`."""
    return signed.expires - now < lifetime(role) * (1 - RESIGN_AFTER)


def utc(now: datetime) -> datetime:
    """Return `now` in UTC.

    Raises:
        ReleaseError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ReleaseError(f"time {now} has no zone; pass an aware time, e.g. datetime.now(UTC)")
    return now.astimezone(UTC)


def sign_root(root: Root, signers: Sequence[Signer]) -> bytes:
    """Return the bytes of `root`, signed by enough of the root keys that it names."""
    return _sign(root, signers, "root", root)


def first_commit(store: ObjectStore, root: Root, drafts: Mapping[str, Draft], keys: KeyRing, now: datetime) -> bool:
    """Return whether the first state was committed; False if a repository is there already."""
    metas: dict[str, MetaFile] = {}
    delegators: dict[str, Root | Targets] = {"targets": root}
    for name, draft in drafts.items():  # targets first: it is what the others are verified against
        metas[f"{name}.json"] = _put_draft(store, name, draft, delegators.get(name, drafts["targets"].role), now)
    snapshot = Snapshot(version=1, meta=metas)
    record = new_record({"action": "init"}, {n: _signers_of(d) for n, d in drafts.items()}, None, now)
    snapshot.unrecognized_fields[AUDIT] = sha256_bytes(record)
    put_object(store, record_key(sha256_bytes(record)), record)
    snapshot.expires = now + lifetime("snapshot")
    meta = _put_snapshot(store, root, snapshot, keys)
    timestamp = Timestamp(expires=now + lifetime("timestamp"), snapshot_meta=meta)
    return store.put_if_absent(TIMESTAMP_KEY, _sign(timestamp, keys.for_role("timestamp", root), "timestamp", root))


def put_object(store: ObjectStore, key: str, data: bytes) -> None:
    """Create the object, or find that the same bytes are there already.

    Raises:
        ReleaseError: other bytes are there.
    """
    if not store.put_if_absent(key, data):
        found = store.get(key)
        if found is None or found.data != data:
            raise ReleaseError(
                f"store: {key} exists with other bytes; someone else wrote it: check who can write there"
            )


def _commit(store: ObjectStore, trusted: Trusted, change: Change, keys: KeyRing, now: datetime) -> bool:
    fields = dict(trusted.snapshot.unrecognized_fields)
    objects = dict(change.objects)
    if change.record is not None:
        signed_by = {name: _signers_of(draft) for name, draft in change.drafts.items()}
        record = new_record(change.record, signed_by, fields.get(AUDIT), now)
        fields[AUDIT] = sha256_bytes(record)
        objects[record_key(fields[AUDIT])] = record
    targets = change.drafts["targets"].role if "targets" in change.drafts else trusted.targets
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        list(pool.map(partial(put_object, store), objects, objects.values()))

        def put(name: str) -> MetaFile:
            return _put_draft(store, name, change.drafts[name], trusted.root if name == "targets" else targets, now)

        drafted = dict(zip(change.drafts, pool.map(put, change.drafts), strict=True))
    metas = {**trusted.snapshot.meta, **{f"{name}.json": meta for name, meta in drafted.items()}}
    if change.drafts or change.record is not None or is_due("snapshot", trusted.snapshot, now):
        snapshot = Snapshot(version=trusted.snapshot.version + 1, meta=metas, unrecognized_fields=fields)
        snapshot.expires = _end("snapshot", now, change.life)
        timestamp = Timestamp(snapshot_meta=_put_snapshot(store, trusted.root, snapshot, keys))
    else:
        timestamp = Timestamp(snapshot_meta=trusted.timestamp.snapshot_meta)
    timestamp.expires = _end("timestamp", now, change.life)
    timestamp.version = trusted.timestamp.version + 1
    data = _sign(timestamp, keys.for_role("timestamp", trusted.root), "timestamp", trusted.root)
    return store.put_if_match(TIMESTAMP_KEY, data, trusted.etag)


def _end(role: str, now: datetime, life: timedelta | None) -> datetime:
    return now + max(lifetime(role), life or timedelta(0))


def _signers_of(draft: Draft) -> list[str]:
    elsewhere = [] if draft.signed is None else list(draft.signed.signatures)
    return sorted({*elsewhere, *(s.public_key.keyid for s in draft.signers)})


def _put_snapshot(store: ObjectStore, root: Root, snapshot: Snapshot, keys: KeyRing) -> MetaFile:
    sign = partial(_sign, snapshot, keys.for_role("snapshot", root), "snapshot", root)
    return _put_next(store, "snapshot", snapshot, sign)


def _put_draft(store: ObjectStore, name: str, draft: Draft, delegator: Root | Targets, now: datetime) -> MetaFile:
    if draft.signed is not None:
        return _put_signed(store, name, draft, delegator)
    draft.role.expires = now + lifetime(name)
    return _put_next(store, name, draft.role, partial(_sign, draft.role, draft.signers, name, delegator))


def _put_signed(store: ObjectStore, name: str, draft: Draft, delegator: Root | Targets) -> MetaFile:
    """Create the file of a role that was signed elsewhere, under its own version: signatures cover that."""
    metadata = copy.deepcopy(cast("Metadata[Targets]", draft.signed))
    data = _sign(draft.role, draft.signers, name, delegator, metadata)
    version = metadata.signed.version
    key = f"metadata/{version}.{name}.json"
    if not store.put_if_absent(key, data):
        found = store.get(key)
        with _reading(name):
            there = None if found is None else Metadata[Targets].from_bytes(found.data)
        if found is None or there is None or there.signed_bytes != metadata.signed_bytes:
            raise ReleaseError(f"{name}: version {version} is taken by another change; propose yours again")
        delegator.verify_delegate(name, there.signed_bytes, there.signatures)
        data = found.data  # the same role, signed by a try before this one
    return MetaFile(version=version, length=len(data), hashes={"sha256": sha256_bytes(data)})


def _put_next(store: ObjectStore, name: str, signed: Signed, sign: Callable[[], bytes]) -> MetaFile:
    """Create the role's file under the first free version at or above its own; gaps are legal except for root."""
    first = signed.version
    for version in range(first, first + MAX_PROBES):
        signed.version = version
        data = sign()
        key = f"metadata/{version}.{name}.json"
        if store.put_if_absent(key, data) or getattr(store.get(key), "data", None) == data:
            return MetaFile(version=version, length=len(data), hashes={"sha256": sha256_bytes(data)})
    raise ReleaseError(
        f"{name}: versions {first} to {version} are all taken; clean metadata/ of orphans, publish again"
    )


def _sign(
    signed: _Role,
    signers: Sequence[Signer],
    name: str,
    delegator: Root | Targets,
    metadata: Metadata[_Role] | None = None,
) -> bytes:
    metadata = metadata or Metadata[_Role](signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    try:
        delegator.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as e:
        raise ReleaseError(
            f"{name}: the keys held here are not those that the repository trusts ({e}); use its keys"
        ) from e
    return metadata.to_bytes()


def load_root(store: ObjectStore, pinned: bytes) -> Root:
    """Return the newest root that the chain from `pinned` reaches, each signed by the one before and by itself."""
    return _root_chain(store, pinned)[0]


def check_root(data: bytes, before: Root) -> Root:
    """Return the root in `data` if it may follow `before`: the next version, signed by both.

    Raises:
        ReleaseError: it may not.
    """
    newer = _verified(Root, data, before, "root")
    _verified(Root, data, newer, "root")
    if newer.version != before.version + 1:
        raise ReleaseError(f"root: version {newer.version} lies where {before.version + 1} must be; check the store")
    return newer


def _root_chain(store: ObjectStore, pinned: bytes) -> tuple[Root, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    with _reading("root"):
        metadata = Metadata[Root].from_bytes(pinned)
        root = metadata.signed
        root.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    while (found := store.get(f"metadata/{root.version + 1}.root.json")) is not None:
        root = check_root(found.data, root)
        files[f"metadata/{root.version}.root.json"] = found.data
    return root, files


def _fetched(store: ObjectStore, name: str, meta: MetaFile) -> bytes:
    found = store.get(f"metadata/{meta.version}.{name}.json")
    if found is None:
        raise ReleaseError(f"repository: {meta.version}.{name}.json is missing; restore the store from a backup")
    return found.data


def _checked(kind: type[_Role], delegator: Root | Targets, name: str, meta: MetaFile, data: bytes) -> _Role:
    with _reading(name):
        meta.verify_length_and_hashes(data)
    signed = _verified(kind, data, delegator, name)
    if signed.version != meta.version:
        raise ReleaseError(f"repository: {name} is version {signed.version}, named as {meta.version}; check the store")
    return signed


def _verified(kind: type[_Role], data: bytes, delegator: Root | Targets, name: str) -> _Role:
    with _reading(name):
        metadata = Metadata[_Role].from_bytes(data)
        if not isinstance(metadata.signed, kind):
            raise ValueError(f"is of type {metadata.signed.type}")
        delegator.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
        return metadata.signed


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryError, ValueError) as e:
        raise ReleaseError(f"repository: {name} does not verify ({e}); do not publish, find out who changed it") from e
