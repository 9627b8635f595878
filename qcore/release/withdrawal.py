"""Taking releases back: `yank` stops their spread in a channel, `revoke` forbids them to every device for ever.

Neither removes bytes: what was published stays readable for audits. A channel key alone can yank. Revoking raises the
security floor in the models role, so it needs the gate's and the publisher's key, and no stolen channel key undoes it.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime

from tuf.api.metadata import Targets

from qcore.canonical import Json
from qcore.errors import ReleaseError
from qcore.release.cosign import cosign, floor_of
from qcore.release.keys import KeyRing
from qcore.release.metadata import Change, Draft, Trusted, lifetime, transact, utc
from qcore.release.pointer import Pointer, pointed_at, pointer_path, read_pointer, write_pointer
from qcore.release.proposal import terms_of, with_floor
from qcore.release.roles import channel_role, channels, custom_of, known_family, next_version, object_key
from qcore.release.store import ObjectStore

YANKED = "yanked"


@dataclass(frozen=True, kw_only=True, slots=True)
class Yank:
    """A wish: `release` (target path) out of `channels` (empty: every one whose key is held), back to `to`.

    `to` is the target path of an older release that devices shall go back to; None: the channel offers nothing.
    """

    release: str
    channels: tuple[str, ...] = ()
    to: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Withdrawal:
    """What was taken back: from which channels, what they offer instead (by channel), and the family's floor now."""

    release: str
    channels: tuple[str, ...]
    instead: dict[str, str | None]
    floor: int

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return asdict(self)


def yank(store: ObjectStore, keys: KeyRing, wish: Yank, *, now: datetime) -> Withdrawal:
    """Return what channels offer after a release was taken out of them; done already is success.

    Devices that run it keep it until the channel offers something else.

    Raises:
        ReleaseError: no such release or channel, a key is missing, or `to` was yanked or revoked.
    """
    now = utc(now)
    family = _family(wish.release)

    def decide(trusted: Trusted) -> Change | None:
        models = _models(trusted, family, wish.release)
        held = tuple(c for c in keys.channels if f"channel-{c}" in trusted.delegated)
        return _withdraw(trusted, keys, models, replace(wish, channels=wish.channels or held), now)

    return _withdrawal(transact(store, keys, now, decide), wish.release)


def revoke(store: ObjectStore, keys: KeyRing, release: str, *, now: datetime) -> Withdrawal:
    """Return the state after the security floor was raised above `release`; done already is success.

    Every release of the family up to its counter is refused by devices from then on; devices that run one must move.
    Channels that offer one are yanked in the same commit where their key is held.

    Raises:
        ReleaseError: no such release, or a key is missing.
        GateRefused: the co-signer does not raise the floor.
    """
    now = utc(now)
    family = _family(release)

    def decide(trusted: Trusted) -> Change | None:
        models = _models(trusted, family, release)
        floor = custom_of(models.targets[release])["counter"] + 1
        if floor_of(models) >= floor:
            return None
        new, content = with_floor(models, family, floor, now)
        cosign(models, new, {}, terms_of(trusted, family, now))
        path = next(p for p, t in new.targets.items() if models.targets.get(p) != t)
        drafts = {f"models-{family}": Draft(role=new, signers=[keys.signer("gate"), keys.signer("publisher")])}
        objects = {object_key(new.targets[path]): content}
        for channel, offered in _offered_below(trusted, keys, family, floor).items():
            change = _withdraw(trusted, keys, new, Yank(release=offered, channels=(channel,)), now) or Change()
            drafts, objects = {**drafts, **change.drafts}, {**objects, **change.objects}
        record = {"action": "revoke", "release": release, "floor": floor, "roles": sorted(drafts)}
        return Change(drafts=drafts, objects=objects, record=record)

    return _withdrawal(transact(store, keys, now, decide), release)


def _withdraw(trusted: Trusted, keys: KeyRing, models: Targets, wish: Yank, now: datetime) -> Change | None:
    """Return the change of the channels that `wish` names, None if they offer nothing of it already."""
    family = _family(wish.release)
    drafts, objects = {}, {}
    for name in wish.channels:
        old = channel_role(trusted, name)
        place = pointer_path(name, family)
        pointer = read_pointer(old, place)
        if pointer is None or (wish.release in pointer.yanked and not _offers(pointer, wish.release)):
            continue
        after = replace(pointer, yanked=tuple(sorted({*pointer.yanked, wish.release})), floor=floor_of(models))
        if _offers(pointer, wish.release):
            after = _without(after, models, wish.to, family)
        role = next_version(old, now + lifetime("channel"))
        content = write_pointer(role, place, after)
        drafts[f"channel-{name}"] = Draft(role=role, signers=[keys.channel(name)])
        objects[object_key(role.targets[place])] = content
    record = {"action": "yank", "release": wish.release, "to": wish.to, "channels": sorted(drafts)}
    return Change(drafts=drafts, objects=objects, record=record) if drafts else None


def _offers(pointer: Pointer, release: str) -> bool:
    return pointer.state != YANKED and pointer.release == release


def _without(pointer: Pointer, models: Targets, to: str | None, family: str) -> Pointer:
    """Return the pointer that follows `pointer`: to the release `to`, or to nothing."""
    if to is None:
        return replace(pointer, epoch=pointer.epoch + 1, state=YANKED)
    if to not in models.targets or to in pointer.yanked or custom_of(models.targets[to])["counter"] < floor_of(models):
        raise ReleaseError(f"{to} cannot be offered: it is not published, or was yanked or revoked; name another --to")
    return pointed_at(models.targets[to], family, pointer, floor_of(models))


def _offered_below(trusted: Trusted, keys: KeyRing, family: str, floor: int) -> dict[str, str]:
    """Return what the channels whose key is held offer below `floor`, by channel."""
    found = {}
    for channel in keys.channels:
        role = trusted.delegated.get(f"channel-{channel}")
        pointer = None if role is None else read_pointer(role, pointer_path(channel, family))
        if pointer is not None and pointer.state != YANKED and pointer.counter < floor:
            found[channel] = pointer.release
    return found


def _models(trusted: Trusted, family: str, release: str) -> Targets:
    known_family(trusted, family)
    models = trusted.delegated.get(f"models-{family}", Targets())
    if release not in models.targets:
        versions = sorted(p.split("/")[-1].removesuffix(".qpkg") for p in models.targets if p.endswith(".qpkg"))
        raise ReleaseError(f"{release} is not published; published of {family}: {', '.join(versions) or 'nothing'}")
    return models


def _family(release: str) -> str:
    parts = release.split("/")
    if len(parts) != 3 or parts[0] != "models" or not parts[2].endswith(".qpkg"):
        raise ReleaseError(f"{release!r} is no release; allowed: models/FAMILY/VERSION.qpkg; correct --target")
    return parts[1]


def _withdrawal(trusted: Trusted, release: str) -> Withdrawal:
    family = _family(release)
    pointers = {n.removeprefix("channel-"): r for n, r in channels(trusted).items()}
    read = {c: read_pointer(r, pointer_path(c, family)) for c, r in pointers.items()}
    return Withdrawal(
        release=release,
        channels=tuple(c for c, p in read.items() if p is not None and release in p.yanked),
        instead={c: None if p.state == YANKED else p.release for c, p in read.items() if p is not None},
        floor=floor_of(trusted.delegated[f"models-{family}"]),
    )
