"""New keys for old ones, for every role, without a moment in which clients cannot read the repository.

The keys of gate, publisher and channels are named in `targets`: new delegation and re-signed roles are one commit.
Those of snapshot and timestamp are named in the root: a first root lists old and new key, and what is signed meanwhile
carries both signatures; a second root lists the new one alone (TUF specification issue 223). Root keys are replaced by
a root that enough of the old and enough of the new keys sign.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Root, Targets

from qcore.errors import ReleaseError
from qcore.release.cosign import cosign
from qcore.release.keys import ROOT_THRESHOLD, KeyRing
from qcore.release.metadata import (
    Change,
    Draft,
    Trusted,
    check_root,
    lifetime,
    load_current,
    sign_root,
    transact,
    utc,
)
from qcore.release.proposal import terms_of
from qcore.release.roles import GATE_KEYIDS, RETIRED_GATES, held_signers, next_version
from qcore.release.store import ObjectStore

IN_ROOT = ("snapshot", "timestamp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """A new key `signer` for the one called `name`: gate, publisher, or channel-NAME.

    `compromised`: evidence that the old key signed no longer counts, also for releases of its time.
    """

    name: str
    signer: Signer
    compromised: bool = False


def rotate_delegated(store: ObjectStore, keys: KeyRing, renewal: Renewal, *, now: datetime) -> tuple[str, ...]:
    """Return the roles that were signed again after the new key took the old one's place; done already is success.

    Args:
        store: the repository.
        keys: ring with the root keys, the old key, and for gate and publisher the other one of the two.
        renewal: what is replaced.
        now: aware.

    Raises:
        ReleaseError: a key is missing, or no role has it.
    """
    now, name, fresh = utc(now), renewal.name, renewal.signer
    old_id = keys.signer(name).public_key.keyid
    signed: list[str] = []

    def decide(trusted: Trusted) -> Change | None:
        signed.clear()
        targets = next_version(trusted.targets, now + lifetime("targets"))
        roles = (targets.delegations.roles if targets.delegations else None) or {}
        hit = [n for n, role in roles.items() if old_id in role.keyids]
        if not hit:
            if any(fresh.public_key.keyid in role.keyids for role in roles.values()):
                return None
            raise ReleaseError(f"no role here trusts the held key {name}; use the keys of this repository")
        for n in hit:
            _replace_key(targets, n, old_id, fresh.public_key, remember=not renewal.compromised)
        drafts = {"targets": Draft(role=targets, signers=_offline(keys))}
        ring = KeyRing(folder=keys.folder, signers={**keys.signers, name: fresh})
        for n in (n for n in hit if n in trusted.delegated):
            new = next_version(trusted.delegated[n], now + lifetime(n))
            if n.startswith("models-"):
                cosign(trusted.delegated[n], new, {}, terms_of(trusted, n.removeprefix("models-"), now))
            names = ("gate", "publisher") if n.startswith("models-") else (n,)
            drafts[n] = Draft(role=new, signers=[ring.signer(each) for each in names])
        signed.extend(drafts)
        record = {"action": "rotate", "key": name, "old": old_id, "new": fresh.public_key.keyid}
        return Change(drafts=drafts, record={**record, "compromised": renewal.compromised})

    transact(store, keys, now, decide)
    return tuple(signed)


def rotate_top(store: ObjectStore, keys: KeyRing, name: str, *, now: datetime) -> int:
    """Return the version of the root in which the role `name` trusts both of its keys that the ring holds.

    The ring holds the new key as `name` and the former one as `name.old`. Both sign until `drop_old`.

    Raises:
        ReleaseError: a key is missing.
    """
    now = utc(now)
    both = [keys.signer(name), keys.signer(f"{name}.old")]
    return _set_keys(store, keys, name, [s.public_key for s in both], now)


def drop_old(store: ObjectStore, keys: KeyRing, name: str, *, now: datetime) -> int:
    """Return the version of the root in which the role `name` trusts only the key that the ring holds as `name`.

    Raises:
        ReleaseError: a key is missing, or the role does not trust the new one yet.
    """
    now = utc(now)
    fresh = keys.signer(name).public_key
    trusted = load_current(store, keys, now)
    if fresh.keyid not in trusted.root.roles[name].keyids:
        raise ReleaseError(f"the root does not name the held key of {name} yet; run `qcore repo rotate {name}` first")
    if len(trusted.root.roles[name].keyids) > 1:  # what lies there must carry the new signature before the old one goes
        transact(store, keys, now, lambda _: Change(record={"action": "rotate", "key": name, "step": "sign with both"}))
    return _set_keys(store, keys, name, [fresh], now)


def rotate_root(store: ObjectStore, keys: KeyRing, fresh: Sequence[Signer], *, now: datetime) -> bytes:
    """Return the new root metadata, in which `fresh` are the offline keys; done already is success.

    Raises:
        ReleaseError: fewer than three new keys, or the ring does not hold two of the old ones.
    """
    now = utc(now)
    trusted = load_current(store, keys, now)
    if set(trusted.root.roles["root"].keyids) == {s.public_key.keyid for s in fresh}:
        return trusted.files[f"metadata/{trusted.root.version}.root.json"]
    old = _offline(keys)
    sign_targets(store, keys, [*old, *fresh], now)
    root = next_root(trusted.root, [s.public_key for s in fresh], now)
    metadata = Metadata[Root](root)
    for signer in (*old, *fresh[:ROOT_THRESHOLD]):
        metadata.sign(signer, append=True)
    data = metadata.to_bytes()
    put_root(store, trusted.root, data)
    transact(store, keys, now, lambda _: Change(record={"action": "rotate", "key": "root", "version": root.version}))
    return data


def next_root(root: Root, offline: Sequence[Key], now: datetime) -> Root:
    """Return the root that follows `root`, with `offline` as the keys of root and targets.

    Raises:
        ReleaseError: too few keys, or one of them twice.
    """
    if len({k.keyid for k in offline}) < ROOT_THRESHOLD + 1:
        raise ReleaseError(f"{len({k.keyid for k in offline})} root keys; allowed: {ROOT_THRESHOLD + 1} or more")
    new = copy.deepcopy(root)
    new.version += 1
    new.expires = now + lifetime("root")
    for role in ("root", "targets"):
        for keyid in list(new.roles[role].keyids):
            new.revoke_key(keyid, role)
        for key in offline:
            new.add_key(key, role)
    return new


def sign_targets(store: ObjectStore, keys: KeyRing, signers: Sequence[Signer], now: datetime) -> None:
    """Sign the targets role again with `signers`: those that are trusted now, and those that will be."""

    def decide(trusted: Trusted) -> Change | None:
        role = next_version(trusted.targets, now + lifetime("targets"))
        record = {"action": "rotate", "key": "root", "step": "sign targets with old and new"}
        return Change(drafts={"targets": Draft(role=role, signers=signers)}, record=record)

    transact(store, keys, now, decide)


def put_root(store: ObjectStore, before: Root, data: bytes) -> None:
    """Create the root that follows `before`; it counts from this moment on.

    Raises:
        ReleaseError: it is not signed by enough old and new keys, or another root is there already.
    """
    root = check_root(data, before)
    key = f"metadata/{root.version}.root.json"
    if not store.put_if_absent(key, data) and getattr(store.get(key), "data", None) != data:
        raise ReleaseError(f"root version {root.version} exists already; see `qcore repo status`, rotate again")


def _set_keys(store: ObjectStore, keys: KeyRing, name: str, wanted: Sequence[Key], now: datetime) -> int:
    trusted = load_current(store, keys, now)
    if set(trusted.root.roles[name].keyids) != {k.keyid for k in wanted}:
        root = copy.deepcopy(trusted.root)
        root.version += 1
        root.expires = now + lifetime("root")
        for keyid in list(root.roles[name].keyids):
            root.revoke_key(keyid, name)
        for key in wanted:
            root.add_key(key, name)
        put_root(store, trusted.root, sign_root(root, _offline(keys)))
    step = {"action": "rotate", "key": name, "keys": sorted(k.keyid for k in wanted)}
    return transact(store, keys, now, lambda _: Change(record=step)).root.version


def _replace_key(targets: Targets, name: str, old: str, fresh: Key, *, remember: bool) -> None:
    delegations = targets.delegations
    if delegations is None or delegations.roles is None:
        raise ReleaseError("this repository delegates nothing; make it anew with `qcore repo init`")
    role = delegations.roles[name]
    former = delegations.keys[old]
    role.keyids = [fresh.keyid if k == old else k for k in role.keyids]
    delegations.keys[fresh.keyid] = fresh
    fields = role.unrecognized_fields
    if old in fields.get(GATE_KEYIDS, []):
        fields[GATE_KEYIDS] = [fresh.keyid if k == old else k for k in fields[GATE_KEYIDS]]
        if remember:
            fields[RETIRED_GATES] = {**fields.get(RETIRED_GATES, {}), old: former.to_dict()}
    if not any(old in r.keyids for r in delegations.roles.values()):
        del delegations.keys[old]


def _offline(keys: KeyRing) -> Sequence[Signer]:
    held = held_signers(keys, "targets")
    if not held:
        raise ReleaseError(
            f"this needs the offline root keys ({len(keys.root)} of {ROOT_THRESHOLD} held); run it where they are"
        )
    return held
