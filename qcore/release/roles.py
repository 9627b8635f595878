"""The roles of a repository: who is delegated what, what the offline keys approved, and who here can sign.

Small functions over signed metadata that publishing, withdrawing and rotating share; none of them writes anything.
"""

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key, Signer, SSlibKey
from tuf.api.metadata import DelegatedRole, Delegations, TargetFile, Targets

from qcore.canonical import Json, sha256_bytes
from qcore.errors import ReleaseError
from qcore.release.approval import APPROVED, NOTHING, Approval, approval_from_json
from qcore.release.keys import ROOT_THRESHOLD, KeyRing
from qcore.release.metadata import Trusted

GATE_KEYIDS = "x-qcore-gate-keyids"
"""Field of a `models-*` delegation, signed offline: which of its keys is the gate's."""
RETIRED_GATES = "x-qcore-retired-gates"
"""Field of a `models-*` delegation: former gate keys by id, whose evidence still counts for releases of their time."""


def delegation(targets: Targets, name: str) -> DelegatedRole | None:
    """Return the delegation of the role `name`, None if there is none."""
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    return roles.get(name)


def delegate(targets: Targets, name: str, keys: Sequence[Key], paths: list[str]) -> DelegatedRole:
    """Add to `targets` and return a terminating delegation that needs every one of `keys`."""
    targets.delegations = targets.delegations or Delegations(keys={}, roles={})
    role = DelegatedRole(name, [k.keyid for k in keys], len(keys), True, paths)
    targets.delegations.roles = {**(targets.delegations.roles or {}), name: role}
    targets.delegations.keys.update({k.keyid: k for k in keys})
    return role


def delegate_family(targets: Targets, family: str, keys: Sequence[Key], approval: Approval) -> DelegatedRole:
    """Delegate `models/<family>/*` to the gate's and the publisher's key, in this order, with what is approved."""
    role = delegate(targets, f"models-{family}", keys, [f"models/{family}/*"])
    role.unrecognized_fields[GATE_KEYIDS] = [keys[0].keyid]
    if approval != NOTHING:
        role.unrecognized_fields[APPROVED] = approval.to_json()
    return role


def known_family(trusted: Trusted, family: str) -> DelegatedRole:
    """Return the delegation of `family`.

    Raises:
        ReleaseError: there is none.
    """
    role = delegation(trusted.targets, f"models-{family}")
    if role is None:
        roles = (trusted.targets.delegations.roles if trusted.targets.delegations else None) or {}
        known = ", ".join(n.removeprefix("models-") for n in roles if n.startswith("models-")) or "none"
        raise ReleaseError(
            f"family {family!r} is not known here; known: {known}; add it with `qcore repo approve` and the root keys"
        )
    return role


def approval_of(role: DelegatedRole) -> Approval:
    """Return what the offline keys approved for the family that `role` delegates."""
    return approval_from_json(role.unrecognized_fields.get(APPROVED))


def keys_of(trusted: Trusted, name: str) -> list[Key]:
    """Return every key of the delegated role `name`."""
    return [trusted.targets.get_key(k) for k in trusted.targets.get_delegated_role(name).keyids]


def gate_keys(trusted: Trusted, name: str) -> list[Key]:
    """Return the keys that the offline-signed delegation `name` names as the gate's."""
    role = trusted.targets.get_delegated_role(name)
    keyids = role.unrecognized_fields.get(GATE_KEYIDS, [])
    return [trusted.targets.get_key(k) for k in keyids if k in role.keyids]


def retired_gate_keys(role: DelegatedRole) -> list[Key]:
    """Return the former gate keys that the delegation `role` remembers; they sign nothing new."""
    former = role.unrecognized_fields.get(RETIRED_GATES, {})
    return [SSlibKey.from_dict(keyid, dict(value)) for keyid, value in former.items()]


def channel_role(trusted: Trusted, channel: str) -> Targets:
    """Return the role of `channel`.

    Raises:
        ReleaseError: there is none.
    """
    if f"channel-{channel}" not in trusted.delegated:
        known = ", ".join(n.removeprefix("channel-") for n in channels(trusted))
        raise ReleaseError(f"channel {channel!r} does not exist here; allowed: {known}; publish to one of these")
    return trusted.delegated[f"channel-{channel}"]


def channels(trusted: Trusted) -> Mapping[str, Targets]:
    """Return the roles of all channels by role name."""
    return {n: r for n, r in trusted.delegated.items() if n.startswith("channel-")}


def held_signers(keys: KeyRing, role: str) -> Sequence[Signer]:
    """Return the signers of `role` if the ring holds all that it needs, else none."""
    if role == "targets":
        return keys.root[:ROOT_THRESHOLD] if len(keys.root) >= ROOT_THRESHOLD else ()
    names = ("gate", "publisher") if role.startswith("models-") else (role,)
    return [keys.signers[n] for n in names] if all(n in keys.signers for n in names) else ()


def next_version(role: Targets, expires: datetime) -> Targets:
    """Return a copy of `role` under the next version."""
    new = copy.deepcopy(role)
    new.version += 1
    new.expires = expires
    return new


def target_of(path: str, data: bytes, custom: Json) -> TargetFile:
    """Return what metadata say of the target `data` at `path`; `custom` None: nothing more."""
    fields = {} if custom is None else {"custom": custom}
    return TargetFile(len(data), {"sha256": sha256_bytes(data)}, path, fields)


def custom_of(target: TargetFile) -> Mapping[str, Any]:
    """Return the signed custom data of a package or a pointer.

    Raises:
        ReleaseError: they hold no counter.
    """
    custom = target.custom
    if not isinstance(custom, dict) or type(custom.get("counter")) is not int:
        raise ReleaseError(f"{target.path}: its signed custom data hold no counter; it was not made by qcore publish")
    return custom


def object_key(target: TargetFile) -> str:
    """Return the store key of the target's bytes."""
    return f"targets/{target.get_prefixed_paths()[0]}"
