"""The repository of releases: who may publish what, and the one function that publishes.

One TUF repository per tenant. `targets` (offline keys) delegates `models-<family>` to the gate key AND the publisher
key, says which policies and evaluation data are approved for it, and delegates `channel-<name>` to one online key per
channel. A release is a package, its evidence and, in the same commit, the channel's pointer to it. Everything is
recomputed from bytes and from signed metadata; the caller's word counts for nothing. How a commit is made safe is in
`metadata.py`, what the gate's key may sign in `cosign.py`; taking releases back is in `withdrawal.py`, new keys in
`rotation.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets

from qcore.canonical import Digest, Json, sha256_bytes
from qcore.errors import ReleaseError
from qcore.files import write_atomic
from qcore.release.approval import APPROVED, Approval, Grant, widened
from qcore.release.canary import TIMESTAMP_KEY
from qcore.release.cosign import check_evidence, cosign, floor_of
from qcore.release.keys import ROOT_THRESHOLD, KeyRing
from qcore.release.manifest import check_name
from qcore.release.metadata import (
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
from qcore.release.pointer import pointed_at, pointer_path, read_pointer, write_pointer
from qcore.release.proposal import Candidate, Submission, cosigned_draft, inspect, objects_of, terms_of, with_release
from qcore.release.roles import (
    approval_of,
    channel_role,
    custom_of,
    delegate,
    delegate_family,
    delegation,
    gate_keys,
    held_signers,
    known_family,
    next_version,
    object_key,
    retired_gate_keys,
)
from qcore.release.store import ObjectStore

Level = Literal["good", "half", "quarter", "expired"]


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
    provenance_target: str | None = None

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleStatus:
    """One role: its version, when it expires, what is left of that, and how many of its keys must sign.

    `level` says how much of a new signature's life is left: more than half (`good`), less (`half`), less than a quarter
    (`quarter`), or nothing.
    """

    role: str
    version: int
    expires: datetime
    remaining: timedelta
    keys: int
    threshold: int
    level: Level

    def to_json(self) -> Json:
        """Return the JSON form for `--json`: times in ISO 8601, `remaining_s` in seconds."""
        return {
            "role": self.role,
            "version": self.version,
            "expires": self.expires.isoformat(),
            "remaining_s": int(self.remaining.total_seconds()),
            "keys": self.keys,
            "threshold": self.threshold,
            "level": self.level,
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
        delegate(targets, f"channel-{channel}", [key], [f"channels/{channel}/*/*"])
    drafts = {"targets": Draft(role=targets, signers=keys.root)}
    drafts |= {f"channel-{c}": Draft(role=Targets(), signers=[keys.channel(c)]) for c in channels}
    write_atomic(keys.pinned_root, root_bytes)
    if not first_commit(store, root, drafts, keys, now):
        raise ReleaseError("another process made a repository in this store just now; publish to that one")
    return root_bytes


def approve(store: ObjectStore, keys: KeyRing, grant: Grant, *, now: datetime) -> Approval:
    """Return what is approved for the family of `grant` after it; a family that is new is delegated.

    Raises:
        ReleaseError: the ring does not hold the offline keys.
    """
    check_name("family", grant.family, ReleaseError)
    now = utc(now)

    def decide(trusted: Trusted) -> Change | None:
        targets = approved_targets(trusted, keys, grant, now)
        if targets is None:
            return None
        held = held_signers(keys, "targets")
        if not held:
            raise ReleaseError(
                f"approving needs the offline root keys ({len(keys.root)} of {ROOT_THRESHOLD} held); run this where "
                "they are, or write a draft for them with --draft"
            )
        record = {"action": "approve", "family": grant.family, "only": grant.only, **grant.approval.to_json()}
        return Change(drafts={"targets": Draft(role=targets, signers=held)}, record=record)

    trusted = transact(store, keys, now, decide)
    return approval_of(known_family(trusted, grant.family))


def approved_targets(trusted: Trusted, keys: KeyRing, grant: Grant, now: datetime) -> Targets | None:
    """Return the next `targets` role, in which the family is known and `grant` done; None if it says that already."""
    targets = next_version(trusted.targets, now + lifetime("targets"))
    role = delegation(targets, f"models-{grant.family}")
    if role is None:
        both = [keys.public_key("gate"), keys.public_key("publisher")]
        delegate_family(targets, grant.family, both, grant.approval)
        return targets
    wanted = grant.approval if grant.only else widened(approval_of(role), grant.approval)
    if wanted == approval_of(role):
        return None
    role.unrecognized_fields[APPROVED] = wanted.to_json()
    return targets


def introduce(store: ObjectStore, keys: KeyRing, candidate: Candidate, *, now: datetime) -> None:
    """Make the candidate's family known, if it is new, with what its first evidence says approved: a development ring.

    Raises:
        GateRefused: no signed pass for exactly this package.
        ReleaseError: the family is new and the root keys are not here.
    """
    family, now = candidate.proof.manifest.family, utc(now)
    if delegation(load_current(store, keys, now).targets, f"models-{family}") is None:
        approve(store, keys, _first_grant(candidate, keys, now), now=now)


def publish_release(store: ObjectStore, submission: Submission, keys: KeyRing, *, now: datetime) -> Release:
    """Return the release after package, evidence and channel pointer are public in one commit.

    Publishing the same bytes again is success and changes nothing; a channel that points at a newer release is not
    turned back by it. A family that is new is delegated in the same commit where the root keys are held, and the policy
    and data of this first evidence are then approved for it.

    Raises:
        PackageError: the package is not one that we made.
        GateRefused: no signed pass for exactly this package by an approved policy on approved data, or a waiver that it
            rests on expired.
        ReleaseError: the version exists with other bytes, was yanked or revoked, a key or a delegation is missing, the
            store failed, or clients cannot read what was committed.
    """
    now = utc(now)
    check_name("channel", submission.channel, ReleaseError)
    candidate = inspect(submission)
    manifest = candidate.proof.manifest
    trusted = transact(store, keys, now, lambda current: _plan(current, candidate, keys, now))
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
            signers = held_signers(keys, name)
            if name in ("snapshot", "timestamp") or not signers:
                continue
            old = trusted.targets if name == "targets" else trusted.delegated[name]
            new = next_version(old, now + lifetime(name))
            if name.startswith("models-"):
                cosign(old, new, {}, terms_of(trusted, name.removeprefix("models-"), now))
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
                level=_level(name, signed.expires - now),
            )
        )
    return tuple(rows)


def _level(role: str, left: timedelta) -> Level:
    if left <= timedelta(0):
        return "expired"
    share = left / lifetime(role)
    return "quarter" if share < 1 / 4 else "half" if share < 1 / 2 else "good"


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
    roles: Mapping[str, DelegatedRole] = (trusted.targets.delegations and trusted.targets.delegations.roles) or {}
    wanted = [n for n in roles if n.startswith("models-") and family in (None, n.removeprefix("models-"))]
    if not wanted:
        raise ReleaseError(f"this repository has no gate key for family {family or 'of any name'}; pass --key gate.pub")
    named = [k for name in wanted for k in (*gate_keys(trusted, name), *retired_gate_keys(roles[name]))]
    return tuple({k.keyid: k for k in named}.values())


def _plan(trusted: Trusted, candidate: Candidate, keys: KeyRing, now: datetime) -> Change | None:
    """Return what must change so that the candidate is released and pointed at, None if nothing must."""
    proof, manifest = candidate.proof, candidate.proof.manifest
    name, path = f"models-{manifest.family}", f"models/{manifest.family}/{manifest.version}.qpkg"
    channel = channel_role(trusted, candidate.channel)
    drafts: dict[str, Draft] = {}
    if delegation(trusted.targets, name) is None:
        trusted = _with_family(trusted, candidate, keys, now)
        drafts["targets"] = Draft(role=trusted.targets, signers=held_signers(keys, "targets"))
    check_evidence(proof, gate_keys(trusted, name), now)
    objects: dict[str, bytes] = {}
    models = trusted.delegated.get(name, Targets())
    if path not in models.targets:
        drafts[name] = _signed_release(trusted, candidate, keys, now)
        models = drafts[name].role
        objects |= objects_of(candidate, models)
    found = models.targets[path]
    if found.hashes["sha256"] != proof.sha256:
        raise ReleaseError(
            f"{manifest.family} {manifest.version} is published already with other bytes "
            f"({found.hashes['sha256'][:12]}, not {proof.sha256[:12]}); choose a new version"
        )
    _refuse_withdrawn(models, channel, path, candidate)
    place = pointer_path(candidate.channel, manifest.family)
    pointer = read_pointer(channel, place)
    if pointer is None or pointer.counter < custom_of(found)["counter"]:
        role = next_version(channel, now + lifetime("channel"))
        content = write_pointer(role, place, pointed_at(found, manifest.family, pointer, floor_of(models)))
        drafts[f"channel-{candidate.channel}"] = Draft(role=role, signers=[keys.channel(candidate.channel)])
        objects[object_key(role.targets[place])] = content
    record = {
        "action": "publish",
        "release": path,
        "channel": candidate.channel,
        "package": proof.sha256,
        "evidence": sha256_bytes(proof.evidence),
        "counter": custom_of(found)["counter"],
    }
    return Change(drafts=drafts, objects=objects, record=record) if drafts else None


def _with_family(trusted: Trusted, candidate: Candidate, keys: KeyRing, now: datetime) -> Trusted:
    """Return the state with the candidate's family, whose first evidence says what is approved: a development ring."""
    targets = approved_targets(trusted, keys, _first_grant(candidate, keys, now), now)
    return trusted if targets is None else replace(trusted, targets=targets)


def _first_grant(candidate: Candidate, keys: KeyRing, now: datetime) -> Grant:
    """Return the grant of what the first evidence of a family was decided by: only where the root keys are."""
    decision = check_evidence(candidate.proof, [keys.public_key("gate")], now)
    if len(keys.root) < ROOT_THRESHOLD:
        raise ReleaseError(
            f"family {candidate.proof.manifest.family!r} is new here and needs the offline root keys once "
            f"({len(keys.root)} of {ROOT_THRESHOLD} held); run `qcore repo approve` where they are, then publish again"
        )
    first = Approval(policies={decision.policy_sha256: "any"}, data=(decision.data_sha256,))
    return Grant(family=candidate.proof.manifest.family, approval=first)


def _signed_release(trusted: Trusted, candidate: Candidate, keys: KeyRing, now: datetime) -> Draft:
    """Return the new models role, signed by the co-signer elsewhere, or here where the ring holds both keys."""
    manifest = candidate.proof.manifest
    if candidate.cosigned is not None:
        return cosigned_draft(trusted, candidate, keys, now)
    old = trusted.delegated.get(f"models-{manifest.family}", Targets())
    new = with_release(old, candidate, now)
    path = f"models/{manifest.family}/{manifest.version}.qpkg"
    cosign(old, new, {path: candidate.proof}, terms_of(trusted, manifest.family, now))
    return Draft(role=new, signers=[keys.signer("gate"), keys.signer("publisher")])


def _refuse_withdrawn(models: Targets, channel: Targets, path: str, candidate: Candidate) -> None:
    pointer = read_pointer(channel, pointer_path(candidate.channel, candidate.proof.manifest.family))
    if custom_of(models.targets[path])["counter"] < floor_of(models):
        raise ReleaseError(
            f"{path} is revoked: its counter is below the floor {floor_of(models)}; publish a new version"
        )
    if pointer is not None and path in pointer.yanked:
        raise ReleaseError(f"{path} was yanked from channel {candidate.channel!r}; publish a new version")


def _release(trusted: Trusted, family: str, version: str, channel: str) -> Release:
    path = f"models/{family}/{version}.qpkg"
    target = trusted.delegated[f"models-{family}"].targets[path]
    custom = custom_of(target)
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
        provenance_target=custom.get("provenance"),
    )


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
