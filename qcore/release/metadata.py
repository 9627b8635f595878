"""Signed repository state: read and verified from the pinned root downwards, changed by one compare-and-swap.

Every metadata file except `timestamp.json` is created once under its version and never changed; replacing
`timestamp.json` is the whole transaction, so a reader or a crash sees the old state or the new one. A version number
taken by a crashed or losing writer is skipped. What a change means (families, releases, channels) is in
`repository.py`.

Source: TUF specification 1.0.31, sections 4 (formats) and 6 (consistent snapshots).
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from qcore.canonical import sha256_bytes
from qcore.errors import DoubtfulWriteError, ReleaseError
from qcore.release.keys import KeyRing
from qcore.release.store import ObjectStore

TIMESTAMP_KEY = "metadata/timestamp.json"
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

MAX_SIDE_BY_SIDE = 8
"""Requests at a time: a release takes 11 round trips of a store that is far away, not one for every file."""

_T = TypeVar("_T")
_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trusted:
    """One state of the repository after verification; `etag` is what the next change must find unchanged."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    delegated: Mapping[str, Targets]
    etag: str

    def roles(self) -> Mapping[str, Signed]:
        """Return every role by its name."""
        top = {"root": self.root, "targets": self.targets, "snapshot": self.snapshot, "timestamp": self.timestamp}
        return {**top, **self.delegated}


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A targets role as it shall become, version and expiry still open, and who signs it."""

    role: Targets
    signers: Sequence[Signer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """New content of roles by name, and the objects (by store key) that must exist before anything names them."""

    drafts: Mapping[str, Draft] = field(default_factory=dict)
    objects: Mapping[str, bytes] = field(default_factory=dict)


def transact(
    store: ObjectStore,
    keys: KeyRing,
    now: datetime,
    decide: Callable[[Trusted], Change | None],
    known: Trusted | None = None,
) -> Trusted:
    """Return the verified state after the change that `decide` asks for is committed.

    `decide` sees a verified state (`known`, if it was just loaded) and is asked again, on the winner's state, after a
    lost race. None means that nothing is to be done. An empty change renews the timestamp (and the snapshot when it
    is due).

    Raises:
        ReleaseError: the store does not verify, a key is missing or not the trusted one, the races were all lost, or
            the store does not show what was committed.
    """
    wait = random.SystemRandom()
    for attempt in range(MAX_ATTEMPTS):
        trusted = known if known is not None and attempt == 0 else load_current(store, keys, now)
        change = decide(trusted)
        if change is None:
            return trusted
        with suppress(DoubtfulWriteError):  # asked again like after a lost race: `decide` sees what is there
            if _commit(store, trusted, change, keys, now):
                return _load_committed(store, keys, now, trusted.timestamp.version + 1)
        time.sleep(wait.uniform(0, 0.01 * 2 ** min(attempt, 5)))
    raise ReleaseError(f"other publishers were faster {MAX_ATTEMPTS} times; nothing was published; publish again")


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
    with ThreadPoolExecutor(1) as beside:
        chain = beside.submit(load_root, store, pinned)
        found = store.get(TIMESTAMP_KEY)
        root = chain.result()
    if found is None:
        raise ReleaseError("no repository in this store (no timestamp.json); make one with `qcore repo init`")
    timestamp = _verified(Timestamp, found.data, root, "timestamp")
    meta = timestamp.snapshot_meta
    snapshot = _named(Snapshot, _fetch(store, "snapshot", meta), root, "snapshot", meta)
    metas = {name.removesuffix(".json"): meta for name, meta in sorted(snapshot.meta.items())}
    if "targets" not in metas:
        raise ReleaseError("repository: the snapshot names no targets role; restore the store from a backup")
    files = dict(
        zip(metas, _at_once([partial(_fetch, store, name, meta) for name, meta in metas.items()]), strict=True)
    )
    targets = _named(Targets, files["targets"], root, "targets", metas["targets"])
    return Trusted(
        root=root,
        timestamp=timestamp,
        snapshot=snapshot,
        targets=targets,
        delegated={n: _named(Targets, files[n], targets, n, m) for n, m in metas.items() if n != "targets"},
        etag=found.etag,
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
        delegator = delegators.get(name, drafts["targets"].role)
        sign = partial(_sign, draft.role, draft.signers, name, delegator)
        metas[f"{name}.json"] = _put_next(store, name, draft.role, sign, now)
    timestamp = _new_timestamp(store, root, Snapshot(version=1, meta=metas), keys, now)
    return store.put_if_absent(TIMESTAMP_KEY, _sign(timestamp, [keys.signer("timestamp")], "timestamp", root))


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
    _at_once([partial(put_object, store, key, data) for key, data in change.objects.items()])
    metas = dict(trusted.snapshot.meta)
    targets = change.drafts["targets"].role if "targets" in change.drafts else trusted.targets
    for name, draft in change.drafts.items():
        delegator = trusted.root if name == "targets" else targets
        sign = partial(_sign, draft.role, draft.signers, name, delegator)
        metas[f"{name}.json"] = _put_next(store, name, draft.role, sign, now)
    if change.drafts or is_due("snapshot", trusted.snapshot, now):
        snapshot = Snapshot(version=trusted.snapshot.version + 1, meta=metas)
        timestamp = _new_timestamp(store, trusted.root, snapshot, keys, now)
    else:
        timestamp = Timestamp(snapshot_meta=trusted.timestamp.snapshot_meta)
        timestamp.expires = now + lifetime("timestamp")
    timestamp.version = trusted.timestamp.version + 1
    data = _sign(timestamp, [keys.signer("timestamp")], "timestamp", trusted.root)
    return store.put_if_match(TIMESTAMP_KEY, data, trusted.etag)


def _new_timestamp(store: ObjectStore, root: Root, snapshot: Snapshot, keys: KeyRing, now: datetime) -> Timestamp:
    sign = partial(_sign, snapshot, [keys.signer("snapshot")], "snapshot", root)
    meta = _put_next(store, "snapshot", snapshot, sign, now)
    return Timestamp(expires=now + lifetime("timestamp"), snapshot_meta=meta)


def _put_next(store: ObjectStore, name: str, signed: Signed, sign: Callable[[], bytes], now: datetime) -> MetaFile:
    """Create the role's file under the first free version at or above its own; gaps are legal except for root."""
    signed.expires = now + lifetime(name)
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


def _sign(signed: _Role, signers: Sequence[Signer], name: str, delegator: Root | Targets) -> bytes:
    metadata = Metadata[_Role](signed)
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
    with _reading("root"):
        metadata = Metadata[Root].from_bytes(pinned)
        root = metadata.signed
        root.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        while (found := store.get(f"metadata/{root.version + 1}.root.json")) is not None:
            newer = _verified(Root, found.data, root, "root")
            _verified(Root, found.data, newer, "root")
            if newer.version != root.version + 1:
                raise ReleaseError(
                    f"root: version {newer.version} lies where {root.version + 1} must be; check the store"
                )
            root = newer
        return root


def _at_once(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return the results of calls that mostly wait for the store, made side by side."""
    with ThreadPoolExecutor(MAX_SIDE_BY_SIDE) as threads:
        return [made.result() for made in [threads.submit(call) for call in calls]]


def _fetch(store: ObjectStore, name: str, meta: MetaFile) -> bytes:
    found = store.get(f"metadata/{meta.version}.{name}.json")
    if found is None:
        raise ReleaseError(f"repository: {meta.version}.{name}.json is missing; restore the store from a backup")
    with _reading(name):
        meta.verify_length_and_hashes(found.data)
    return found.data


def _named(kind: type[_Role], data: bytes, delegator: Root | Targets, name: str, meta: MetaFile) -> _Role:
    """Return the role in `data` if it verifies and is of the version that `meta` names."""
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
