"""The key ceremony: metadata that only offline keys may sign, carried as a draft from machine to machine.

A draft is one JSON file with the root role, the targets role, or both, as TUF metadata. It is made where public keys
are known, signed on each machine that has an offline key, and used where the online keys are. Nobody's private key ever
leaves its machine, and a draft without enough signatures does nothing.

Source: TUF specification 1.0.31, sections 4.3 and 6.1 (roots signed by a threshold of old and new keys).
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets

from qcore.canonical import Json, canonical_json
from qcore.errors import ReleaseError
from qcore.files import write_atomic
from qcore.release.approval import Approval
from qcore.release.canary import TIMESTAMP_KEY
from qcore.release.keys import ROOT_THRESHOLD, KeyRing
from qcore.release.manifest import check_name
from qcore.release.metadata import Change, Draft, Trusted, first_commit, lifetime, load_current, transact, utc
from qcore.release.roles import delegate, delegate_family
from qcore.release.rotation import next_root, put_root
from qcore.release.store import ObjectStore

DRAFT_SCHEMA = "qcore.draft/1"
MAX_DRAFT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineDraft:
    """Root, targets, or both, with the signatures that they have so far; `signers` are the offline keys to ask."""

    root: Metadata[Root] | None
    targets: Metadata[Targets] | None
    signers: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return the file that travels."""
        value: dict[str, Json] = {"schema": DRAFT_SCHEMA, "signers": list(self.signers)}
        value["root"] = None if self.root is None else self.root.to_dict()
        value["targets"] = None if self.targets is None else self.targets.to_dict()
        return canonical_json(value) + b"\n"

    @property
    def signed_by(self) -> tuple[str, ...]:
        """The ids of the keys that signed everything in it."""
        found = [set(m.signatures) for m in (self.root, self.targets) if m is not None]
        return tuple(sorted(set.intersection(*found))) if found else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstKeys:
    """The public keys of a new repository: offline ones, and online ones by name (gate, publisher, channel-stable ...).

    `families` says what is approved for each family that shall be known from the start.
    """

    offline: Sequence[Key]
    online: Mapping[str, Key]
    families: Mapping[str, Approval]


def first_draft(keys: FirstKeys, *, now: datetime) -> OfflineDraft:
    """Return root version 1 and targets version 1, unsigned.

    Raises:
        ReleaseError: a key is missing or there twice, or a name is not allowed.
    """
    now = utc(now)
    if len({k.keyid for k in keys.offline}) < ROOT_THRESHOLD + 1:
        raise ReleaseError(f"{len(keys.offline)} root keys; allowed: {ROOT_THRESHOLD + 1} different ones or more")
    needed = ("gate", "publisher", "snapshot", "timestamp")
    channels = [n.removeprefix("channel-") for n in keys.online if n.startswith("channel-")]
    if (missing := [n for n in needed if n not in keys.online]) or not channels:
        raise ReleaseError(
            f"public keys of {', '.join(missing) or 'any channel'} are missing; pass --key NAME=FILE.pub"
        )
    root = Root(expires=now + lifetime("root"), consistent_snapshot=True)
    for role in ("root", "targets"):
        for key in keys.offline:
            root.add_key(key, role)
        root.roles[role].threshold = ROOT_THRESHOLD
    for role in ("snapshot", "timestamp"):
        root.add_key(keys.online[role], role)
    targets = Targets(expires=now + lifetime("targets"))
    for channel in channels:
        check_name("channel", channel, ReleaseError)
        delegate(targets, f"channel-{channel}", [keys.online[f"channel-{channel}"]], [f"channels/{channel}/*/*"])
    for family, approval in keys.families.items():
        check_name("family", family, ReleaseError)
        delegate_family(targets, family, [keys.online["gate"], keys.online["publisher"]], approval)
    asked = tuple(k.keyid for k in keys.offline)
    return OfflineDraft(root=Metadata[Root](root), targets=Metadata[Targets](targets), signers=asked)


def targets_draft(trusted: Trusted, targets: Targets) -> OfflineDraft:
    """Return the next targets role as a draft, such as `approved_targets` makes."""
    asked = tuple(trusted.root.roles["targets"].keyids)
    return OfflineDraft(root=None, targets=Metadata[Targets](targets), signers=asked)


def root_draft(trusted: Trusted, offline: Sequence[Key], *, now: datetime) -> OfflineDraft:
    """Return the next root with the keys `offline`, and targets to be signed by old and new keys; both unsigned."""
    now = utc(now)
    root = next_root(trusted.root, offline, now)
    targets = copy.deepcopy(trusted.targets)
    targets.version, targets.expires = targets.version + 1, now + lifetime("targets")
    asked = dict.fromkeys([*trusted.root.roles["root"].keyids, *(k.keyid for k in offline)])
    return OfflineDraft(root=Metadata[Root](root), targets=Metadata[Targets](targets), signers=tuple(asked))


def read_draft(data: bytes) -> OfflineDraft:
    """Return the draft in the file `data`, **whoever signed it**.

    Raises:
        ReleaseError: it is not a draft.
    """
    try:
        if len(data) > MAX_DRAFT_BYTES:
            raise ValueError(f"{len(data)} bytes")
        value: Any = json.loads(data)
        if value["schema"] != DRAFT_SCHEMA:
            raise ValueError(f"schema {value['schema']!r}")
        root = None if value["root"] is None else Metadata[Root].from_dict(value["root"])
        targets = None if value["targets"] is None else Metadata[Targets].from_dict(value["targets"])
        if not isinstance(root and root.signed, Root | None) or not isinstance(
            targets and targets.signed, Targets | None
        ):
            raise ValueError("other roles than root and targets")
        return OfflineDraft(root=root, targets=targets, signers=tuple(map(str, value["signers"])))
    except (RepositoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ReleaseError(
            f"this is not a draft ({e!r}); pass a file that `qcore repo draft` or `approve` wrote"
        ) from e


def sign_draft(draft: OfflineDraft, signers: Sequence[Signer]) -> OfflineDraft:
    """Return `draft` with the signatures of `signers` added.

    Raises:
        ReleaseError: none of them is asked for.
    """
    fitting = [s for s in signers if s.public_key.keyid in draft.signers]
    if not fitting:
        asked = ", ".join(k[:8] for k in draft.signers)
        raise ReleaseError(f"none of the keys here is asked for (asked: {asked}); sign where one of these is")
    for signer in fitting:
        if draft.root is not None:
            draft.root.sign(signer, append=True)
        if draft.targets is not None:
            draft.targets.sign(signer, append=True)
    return draft


def init_from_draft(store: ObjectStore, keys: KeyRing, draft: OfflineDraft, *, now: datetime) -> bytes:
    """Return the root metadata of a new repository that the offline keys signed in `draft`, also pinned beside `keys`.

    Args:
        store: an empty store.
        keys: ring with the keys of snapshot, timestamp and every channel.
        draft: root and targets, each with enough signatures.
        now: aware.

    Raises:
        ReleaseError: signatures or a key are missing, or there is a repository.
    """
    now = utc(now)
    if draft.root is None or draft.targets is None or draft.root.signed.version != 1:
        raise ReleaseError("this draft is not the first of a repository; make one with `qcore repo draft`")
    if store.get(TIMESTAMP_KEY) is not None:
        raise ReleaseError("this store holds a repository already; publish to it, or choose an empty store")
    root, data = draft.root.signed, draft.root.to_bytes()
    _refuse_unsigned("root", root, draft.root)
    _refuse_unsigned("targets", root, draft.targets)
    if not store.put_if_absent("metadata/1.root.json", data):
        found = store.get("metadata/1.root.json")
        if found is None or Metadata[Root].from_bytes(found.data).signed != root:
            raise ReleaseError("this store holds another root; choose an empty store")
        data = found.data
    write_atomic(keys.pinned_root, data)
    targets = draft.targets.signed
    drafts = {"targets": Draft(role=targets, signers=(), signed=draft.targets)}
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    for name in (n for n in roles if n.startswith("channel-")):
        drafts[name] = Draft(role=Targets(), signers=[keys.signer(name)])
    if not first_commit(store, root, drafts, keys, now):
        raise ReleaseError("another process made a repository in this store just now; publish to that one")
    return data


def submit_draft(store: ObjectStore, keys: KeyRing, draft: OfflineDraft, *, now: datetime) -> Trusted:
    """Return the state after targets and root of `draft` are published; done already is success.

    Raises:
        ReleaseError: signatures are missing, or it was made on an older state.
    """
    now = utc(now)
    trusted = load_current(store, keys, now)
    done = draft.root is not None and draft.root.signed == trusted.root
    if draft.targets is not None and not done:
        _refuse_unsigned("targets", trusted.root, draft.targets)
        if draft.root is not None:
            _refuse_unsigned("targets", draft.root.signed, draft.targets)
        trusted = transact(store, keys, now, lambda current: _targets_change(current, draft))
    if draft.root is not None and not done:
        put_root(store, trusted.root, draft.root.to_bytes())
        record = {"action": "rotate", "key": "root", "version": draft.root.signed.version}
        trusted = transact(store, keys, now, lambda _: Change(record=record))
    return trusted


def _targets_change(trusted: Trusted, draft: OfflineDraft) -> Change | None:
    metadata = draft.targets
    if metadata is None or metadata.signed == trusted.targets:
        return None
    if metadata.signed.version <= trusted.targets.version:
        raise ReleaseError(
            f"this draft is targets version {metadata.signed.version}, the repository has {trusted.targets.version}; "
            "make the draft again"
        )
    record = {"action": "targets", "version": metadata.signed.version}
    return Change(drafts={"targets": Draft(role=metadata.signed, signers=(), signed=metadata)}, record=record)


def _refuse_unsigned(name: str, root: Root, metadata: Metadata[Any]) -> None:
    result = root.get_verification_result(name, metadata.signed_bytes, metadata.signatures)
    if not result.verified:
        raise ReleaseError(
            f"draft: {name} has {len(result.signed)} of {root.roles[name].threshold} signatures; have another "
            "holder of a root key run `qcore repo sign`"
        )
