"""The repository of releases: who may publish what, and the one function that publishes.

One TUF repository per tenant. `targets` (offline keys) delegates `models-<family>` to the gate key AND the publisher
key, and `channel-<name>` to one online key per channel. A release is a package, its evidence and, in the same commit,
the channel's pointer to it. Everything is recomputed from bytes and from signed metadata; the caller's word counts for
nothing. How a commit is made safe is in `metadata.py`, what the gate's key may sign in `cosign.py`.

Removing, revoking, rolling out in steps and rotating keys are not here yet.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets

from qcore.canonical import Digest, Json, canonical_json, sha256_bytes
from qcore.errors import ReleaseError
from qcore.files import write_atomic
from qcore.release.cosign import Proof, check_evidence, cosign, evidence_path, max_counter
from qcore.release.keys import ROOT_THRESHOLD, KeyRing
from qcore.release.manifest import check_name
from qcore.release.metadata import (
    TIMESTAMP_KEY,
    Change,
    Draft,
    Trusted,
    first_commit,
    is_due,
    lifetime,
    load_current,
    load_root,
    load_trusted,
    sign_root,
    transact,
    utc,
)
from qcore.release.store import ObjectStore
from qcore.release.subject import opened_package

POINTER_SCHEMA = 1
FLOOR = 0
"""Security floor of new releases: no counter is below it. Raising it is `revoke`, not here yet."""
ALL_DEVICES = 10_000
"""`permyriad` of a release that every device of the channel takes."""
GATE_KEYIDS = "x-qcore-gate-keyids"
"""Field of a `models-*` delegation, signed offline: which of its keys is the gate's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What is to be published: a package file, its evidence, and the channel that shall point at it."""

    package: Path
    evidence: bytes
    channel: str = "stable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A release as the signed repository states it; `metadata_version` is that of the timestamp that was read."""

    family: str
    version: str
    counter: int
    channel: str
    target: str
    sha256: Digest
    size_bytes: int
    model_sha256: Digest
    evidence_target: str
    metadata_version: int

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleStatus:
    """One role: its version, when it expires, what is left of that, and how many of its keys must sign."""

    role: str
    version: int
    expires: datetime
    remaining: timedelta
    keys: int
    threshold: int

    def to_json(self) -> Json:
        """Return the JSON form for `--json`: times in ISO 8601, `remaining_s` in seconds."""
        return {
            "role": self.role,
            "version": self.version,
            "expires": self.expires.isoformat(),
            "remaining_s": int(self.remaining.total_seconds()),
            "keys": self.keys,
            "threshold": self.threshold,
        }


def init_repository(store: ObjectStore, keys: KeyRing, channels: Sequence[str], *, now: datetime) -> bytes:
    """Return the root metadata of a new repository, also pinned beside the keys; devices are given these bytes.

    Run again after a crash it completes the same repository, with the root that it made before.

    Raises:
        ReleaseError: there is a repository, the ring lacks a key, or a channel name is not allowed.
    """
    now = utc(now)
    for channel in channels:
        check_name("channel", channel, ReleaseError)
    if store.get(TIMESTAMP_KEY) is not None:
        raise ReleaseError("this store holds a repository already; publish to it, or choose an empty store")
    root_bytes = _first_root(store, keys, now)
    root = Metadata[Root].from_bytes(root_bytes).signed
    targets = Targets()
    for channel in channels:
        key = keys.channel(channel).public_key
        _delegate(targets, f"channel-{channel}", [key], [f"channels/{channel}/*/*"])
    drafts = {"targets": Draft(role=targets, signers=keys.root)}
    drafts |= {f"channel-{c}": Draft(role=Targets(), signers=[keys.channel(c)]) for c in channels}
    write_atomic(keys.pinned_root, root_bytes)
    if not first_commit(store, root, drafts, keys, now):
        raise ReleaseError("another process made a repository in this store just now; publish to that one")
    return root_bytes


def add_family(store: ObjectStore, keys: KeyRing, family: str, *, now: datetime) -> None:
    """Delegate `models/<family>/*` to gate key and publisher key, both required; done already is success.

    Raises:
        ReleaseError: the family is new and the ring does not hold the offline keys.
    """
    check_name("family", family, ReleaseError)
    now = utc(now)
    name = f"models-{family}"

    def decide(trusted: Trusted) -> Change | None:
        if name in trusted.delegated:
            return None
        if len(keys.root) < ROOT_THRESHOLD:
            raise ReleaseError(
                f"family {family!r} is new here and needs the offline root keys once ({len(keys.root)} of "
                f"{ROOT_THRESHOLD} held); add the family where they are, then publish again"
            )
        targets = _next_version(trusted.targets, now + lifetime("targets"))
        signers = [keys.signer("gate"), keys.signer("publisher")]
        role = _delegate(targets, name, [s.public_key for s in signers], [f"models/{family}/*"])
        role.unrecognized_fields[GATE_KEYIDS] = [signers[0].public_key.keyid]
        drafts = {"targets": Draft(role=targets, signers=keys.root), name: Draft(role=Targets(), signers=signers)}
        return Change(drafts=drafts)

    transact(store, keys, now, decide)


def publish_release(store: ObjectStore, submission: Submission, keys: KeyRing, *, now: datetime) -> Release:
    """Return the release after package, evidence and channel pointer are public in one commit.

    Publishing the same bytes again is success and changes nothing; a channel that points at a newer release is not
    turned back by it.

    Raises:
        PackageError: the package is not one that we made.
        GateRefused: no signed pass for exactly this package, or a waiver that it rests on expired.
        ReleaseError: the version exists with other bytes, a key or a delegation is missing, or the store failed.
    """
    now = utc(now)
    check_name("channel", submission.channel, ReleaseError)
    candidate = _inspect(submission)
    manifest = candidate.proof.manifest
    trusted = load_current(store, keys, now)
    _channel_role(trusted, submission.channel)
    is_new = f"models-{manifest.family}" not in trusted.delegated
    if is_new:
        check_evidence(candidate.proof, [keys.signer("gate").public_key], now)  # a refused release must leave no trace
        add_family(store, keys, manifest.family, now=now)
    known = None if is_new else trusted
    trusted = transact(store, keys, now, lambda current: _plan(current, candidate, keys, now), known)
    return _release(trusted, manifest.family, manifest.version, submission.channel)


def refresh(store: ObjectStore, keys: KeyRing, *, now: datetime) -> tuple[str, ...]:
    """Return the roles that were signed again: each that has lived an eighth of its life and whose keys are held.

    Root is never among them: a new root is a ceremony. `status` shows what is left of it.

    Raises:
        ReleaseError: the repository does not verify or the online keys are missing.
        GateRefused: the gate does not co-sign a refresh.
    """
    now = utc(now)
    renewed: list[str] = []

    def decide(trusted: Trusted) -> Change | None:
        renewed.clear()
        due = [n for n, signed in trusted.roles().items() if n != "root" and is_due(n, signed, now)]
        drafts: dict[str, Draft] = {}
        for name in due:
            signers = _held_signers(keys, name)
            if name in ("snapshot", "timestamp") or not signers:
                continue
            old = trusted.targets if name == "targets" else trusted.delegated[name]
            new = _next_version(old, now + lifetime(name))
            if name.startswith("models-"):
                cosign(old, new, {}, _gate_keys(trusted, name), now)
            drafts[name] = Draft(role=new, signers=signers)
        if not drafts and not {"snapshot", "timestamp"} & set(due):
            return None
        renewed.extend([*drafts, *(["snapshot"] if drafts or "snapshot" in due else []), "timestamp"])
        return Change(drafts=drafts)

    transact(store, keys, now, decide)
    return tuple(renewed)


def status(store: ObjectStore, *, now: datetime) -> tuple[RoleStatus, ...]:
    """Return one row per role, in the order of trust.

    The root is taken from the store itself, so this is for reading, not for trusting.

    Raises:
        ReleaseError: there is no repository or it does not verify.
    """
    now = utc(now)
    first = store.get("metadata/1.root.json")
    if first is None:
        raise ReleaseError("no repository in this store (no 1.root.json); make one with `qcore repo init`")
    trusted = load_trusted(store, first.data)
    rows = []
    for name, signed in trusted.roles().items():
        delegator = trusted.targets if name in trusted.delegated else trusted.root
        role = delegator.get_delegated_role(name)
        rows.append(
            RoleStatus(
                role=name,
                version=signed.version,
                expires=signed.expires,
                remaining=signed.expires - now,
                keys=len(role.keyids),
                threshold=role.threshold,
            )
        )
    return tuple(rows)


def trusted_gate_keys(store: ObjectStore, pinned: bytes, family: str | None) -> tuple[Key, ...]:
    """Return the gate keys that the repository's offline roles name, verified from the `pinned` root metadata.

    Args:
        store: where the metadata lie.
        pinned: trusted root metadata.
        family: whose gate is asked for; None: of every family.

    Raises:
        ReleaseError: it does not verify, or has no such family. Expiry is not asked: what was signed stays true.
    """
    trusted = load_trusted(store, pinned)
    roles = [n for n in trusted.delegated if n.startswith("models-") and family in (None, n.removeprefix("models-"))]
    if not roles:
        raise ReleaseError(f"this repository has no gate key for family {family or 'of any name'}; pass --key gate.pub")
    return tuple({k.keyid: k for name in roles for k in _gate_keys(trusted, name)}.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A submission after its bytes were read once and checked."""

    package: bytes
    proof: Proof
    channel: str


def _inspect(submission: Submission) -> _Candidate:
    with opened_package(submission.package) as opened:
        proof = Proof(sha256=opened.sha256, manifest=opened.manifest, evidence=submission.evidence)
        return _Candidate(package=opened.data, proof=proof, channel=submission.channel)


def _plan(trusted: Trusted, candidate: _Candidate, keys: KeyRing, now: datetime) -> Change | None:
    """Return what must change so that the candidate is released and pointed at, None if nothing must."""
    manifest = candidate.proof.manifest
    name = f"models-{manifest.family}"
    gate_keys = _gate_keys(trusted, name)
    check_evidence(candidate.proof, gate_keys, now)
    drafts: dict[str, Draft] = {}
    objects: dict[str, bytes] = {}
    path = f"models/{manifest.family}/{manifest.version}.qpkg"
    found = trusted.delegated[name].targets.get(path)
    if found is None:
        new = _with_release(trusted.delegated[name], path, candidate, now)
        cosign(trusted.delegated[name], new, {path: candidate.proof}, gate_keys, now)
        drafts[name] = Draft(role=new, signers=[keys.signer("gate"), keys.signer("publisher")])
        objects[_object_key(new.targets[path])] = candidate.package
        objects[_object_key(new.targets[evidence_path(path)])] = candidate.proof.evidence
        found = new.targets[path]
    elif found.hashes["sha256"] != candidate.proof.sha256:
        raise ReleaseError(
            f"{manifest.family} {manifest.version} is published already with other bytes "
            f"({found.hashes['sha256'][:12]}, not {candidate.proof.sha256[:12]}); choose a new version"
        )
    channel = _channel_role(trusted, candidate.channel)
    pointer_path = f"channels/{candidate.channel}/{manifest.family}/release.json"
    pointer = _custom(channel.targets[pointer_path]) if pointer_path in channel.targets else {"epoch": 0, "counter": 0}
    if pointer["counter"] < _custom(found)["counter"]:
        role = _next_version(channel, now + lifetime("channel"))
        content = canonical_json(_pointer(found, manifest.family, pointer["epoch"] + 1))
        role.targets[pointer_path] = _target(pointer_path, content, json.loads(content))
        drafts[f"channel-{candidate.channel}"] = Draft(role=role, signers=[keys.channel(candidate.channel)])
        objects[_object_key(role.targets[pointer_path])] = content
    return Change(drafts=drafts, objects=objects) if drafts else None


def _with_release(old: Targets, path: str, candidate: _Candidate, now: datetime) -> Targets:
    proof = candidate.proof
    new = _next_version(old, now + lifetime("models"))
    custom = {
        "counter": max_counter(old) + 1,
        "model_sha256": proof.manifest.model_sha256,
        "evidence": evidence_path(path),
        "compat": proof.manifest.compat.to_json(),
        "flash_bytes": proof.manifest.flash_bytes,
        "floor": FLOOR,
    }
    new.targets[path] = _target(path, candidate.package, custom)
    new.targets[evidence_path(path)] = _target(evidence_path(path), proof.evidence, None)
    return new


def _pointer(package: TargetFile, family: str, epoch: int) -> Json:
    return {
        "schema": POINTER_SCHEMA,
        "epoch": epoch,
        "state": "done",
        "release": package.path,
        "counter": _custom(package)["counter"],
        "permyriad": ALL_DEVICES,
        "salt": f"{family}:{epoch}",
        "floor": FLOOR,
    }


def _release(trusted: Trusted, family: str, version: str, channel: str) -> Release:
    path = f"models/{family}/{version}.qpkg"
    target = trusted.delegated[f"models-{family}"].targets[path]
    custom = _custom(target)
    return Release(
        family=family,
        version=version,
        counter=custom["counter"],
        channel=channel,
        target=path,
        sha256=target.hashes["sha256"],
        size_bytes=target.length,
        model_sha256=custom["model_sha256"],
        evidence_target=custom["evidence"],
        metadata_version=trusted.timestamp.version,
    )


def _gate_keys(trusted: Trusted, name: str) -> list[Key]:
    """Return the keys that the offline-signed delegation names as the gate's."""
    role = trusted.targets.get_delegated_role(name)
    keyids = role.unrecognized_fields.get(GATE_KEYIDS, [])
    return [trusted.targets.get_key(k) for k in keyids if k in role.keyids]


def _channel_role(trusted: Trusted, channel: str) -> Targets:
    if f"channel-{channel}" not in trusted.delegated:
        known = ", ".join(n.removeprefix("channel-") for n in trusted.delegated if n.startswith("channel-"))
        raise ReleaseError(f"channel {channel!r} does not exist here; allowed: {known}; publish to one of these")
    return trusted.delegated[f"channel-{channel}"]


def _held_signers(keys: KeyRing, role: str) -> Sequence[Signer]:
    """Return the signers of `role` if the ring holds all that it needs, else none."""
    if role == "targets":
        return keys.root if len(keys.root) >= ROOT_THRESHOLD else ()
    names = ("gate", "publisher") if role.startswith("models-") else (role,)
    return [keys.signers[n] for n in names] if all(n in keys.signers for n in names) else ()


def _first_root(store: ObjectStore, keys: KeyRing, now: datetime) -> bytes:
    """Return root version 1: the one that a crashed run left here if the ring's keys made it, else a new one."""
    key = "metadata/1.root.json"
    if len(keys.root) < ROOT_THRESHOLD:
        raise ReleaseError(f"a new repository needs the root keys ({len(keys.root)} of {ROOT_THRESHOLD} held)")
    root = Root(expires=now + lifetime("root"), consistent_snapshot=True)
    for role in ("root", "targets"):
        for signer in keys.root:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = ROOT_THRESHOLD
    for role in ("snapshot", "timestamp"):
        root.add_key(keys.signer(role).public_key, role)
    data = sign_root(root, keys.root)
    if store.put_if_absent(key, data):
        return data
    found = store.get(key)
    left = load_root(store, found.data) if found is not None else root
    if (left.keys, left.roles) != (root.keys, root.roles) or found is None:
        raise ReleaseError("this store holds a root made with other keys; use those keys, or choose an empty store")
    return found.data


def _delegate(targets: Targets, name: str, keys: Sequence[Key], paths: list[str]) -> DelegatedRole:
    """Add to `targets` and return a terminating delegation that needs every one of `keys`."""
    targets.delegations = targets.delegations or Delegations(keys={}, roles={})
    role = DelegatedRole(name, [k.keyid for k in keys], len(keys), True, paths)
    targets.delegations.roles = {**(targets.delegations.roles or {}), name: role}
    targets.delegations.keys.update({k.keyid: k for k in keys})
    return role


def _next_version(role: Targets, expires: datetime) -> Targets:
    new = copy.deepcopy(role)
    new.version += 1
    new.expires = expires
    return new


def _target(path: str, data: bytes, custom: Json) -> TargetFile:
    fields = {} if custom is None else {"custom": custom}
    return TargetFile(len(data), {"sha256": sha256_bytes(data)}, path, fields)


def _custom(target: TargetFile) -> Mapping[str, Any]:
    """Return the signed custom data of a package or a pointer."""
    custom = target.custom
    if not isinstance(custom, dict) or type(custom.get("counter")) is not int:
        raise ReleaseError(f"{target.path}: its signed custom data hold no counter; it was not made by qcore publish")
    return custom


def _object_key(target: TargetFile) -> str:
    return f"targets/{target.get_prefixed_paths()[0]}"
