"""A repository in one file, for devices without a network: what channels offer, with all metadata that prove it.

A deterministic tar (names sorted, times zero) of the same files under the same paths; devices read it in place and
verify it as they verify a server. It is as fresh as its timestamp: two days, unless `fresh_for` signs one that counts
for longer.
"""

import tarfile
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from qcore.canonical import Json
from qcore.errors import ReleaseError
from qcore.files import atomic_path
from qcore.release.cosign import FLOOR, evidence_path, provenance_path
from qcore.release.keys import KeyRing
from qcore.release.metadata import Change, Draft, Trusted, lifetime, load_current, transact, utc
from qcore.release.pointer import pointer_path, read_pointer
from qcore.release.roles import channels, held_signers, next_version, object_key
from qcore.release.store import ObjectStore
from qcore.release.withdrawal import YANKED

LONGEST = timedelta(days=30)
"""No role is signed for less where it is signed anew; longer bundles would outlive their channel role."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a bundle shall hold: of one family and one channel; None: of all."""

    family: str | None = None
    channel: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle file: what it offers (target paths), its size, and when devices stop to take it (ISO 8601)."""

    path: str
    offers: tuple[str, ...]
    files: int
    size_bytes: int
    expires: str

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return asdict(self)


def fresh_for(store: ObjectStore, keys: KeyRing, life: timedelta, *, now: datetime) -> None:
    """Sign snapshot, timestamp and what expires sooner, so that the present state counts for `life`.

    Whoever serves this state to a device can hold the device back for as long: that is the price of a long bundle.

    Raises:
        ReleaseError: `life` is too long, or a key is missing.
    """
    now = utc(now)
    if not timedelta(0) < life <= LONGEST:
        raise ReleaseError(f"a bundle of {life} is not allowed; allowed: up to {LONGEST.days} days; correct --days")

    def decide(trusted: Trusted) -> Change:
        drafts: dict[str, Draft] = {}
        for name, role in trusted.delegated.items():
            if role.expires - now < life:
                signers = held_signers(keys, name)
                if not signers:
                    raise ReleaseError(
                        f"{name} expires in {role.expires - now}, before the bundle; sign it again first"
                    )
                drafts[name] = Draft(role=next_version(role, now + lifetime(name)), signers=signers)
        return Change(drafts=drafts, record={"action": "export", "days": life.days}, life=life)

    transact(store, keys, now, decide)


def export_bundle(store: ObjectStore, keys: KeyRing, out: Path, wanted: Wanted, *, now: datetime) -> Bundle:
    """Return the bundle written to `out`: what channels offer now.

    Args:
        store: the repository.
        keys: ring with the pinned root.
        out: the file; replaced all at once.
        wanted: of which family and channel.
        now: aware.

    Raises:
        ReleaseError: the repository does not verify, offers nothing of what is wanted, or lacks a file.
    """
    trusted = load_current(store, keys, utc(now))
    offers, objects = _offered(trusted, wanted)
    if not offers:
        raise ReleaseError(f"nothing is offered for {wanted}; publish first, or correct --family and --channel")
    names = [f"metadata/{v}.root.json" for v in range(1, trusted.root.version + 1)]
    names += [n for n in trusted.files if n not in names]
    found = {key: store.get(key) for key in (*names, *objects)}
    if missing := [key for key, value in found.items() if value is None]:
        raise ReleaseError(f"{missing[0]} is missing; restore the store from a backup, or publish again")
    with atomic_path(out) as tmp, tmp.open("wb") as f:
        for key in sorted(found):
            _add(f, key, found[key].data)  # type: ignore[union-attr]  # none is None, see above
        f.write(bytes(2 * tarfile.BLOCKSIZE))
    expires = min(s.expires for s in trusted.roles().values())
    return Bundle(
        path=str(out),
        offers=tuple(sorted(offers)),
        files=len(found),
        size_bytes=out.stat().st_size,
        expires=expires.isoformat(),
    )


def _offered(trusted: Trusted, wanted: Wanted) -> tuple[set[str], list[str]]:
    """Return the releases that channels offer, and the store keys of everything that belongs to them."""
    offers: set[str] = set()
    objects: list[str] = []
    for name, models in trusted.delegated.items():
        family = name.removeprefix("models-")
        if not name.startswith("models-") or wanted.family not in (None, family):
            continue
        for channel, role in channels(trusted).items():
            place = pointer_path(channel.removeprefix("channel-"), family)
            pointer = read_pointer(role, place)
            asked = wanted.channel is None or channel == f"channel-{wanted.channel}"
            if pointer is None or pointer.state == YANKED or not asked:
                continue
            offers.add(pointer.release)
            objects.append(object_key(role.targets[place]))
            paths = (pointer.release, evidence_path(pointer.release), provenance_path(pointer.release))
            floor = f"models/{family}/{FLOOR}"
            objects += [object_key(models.targets[p]) for p in (*paths, floor) if p in models.targets]
    return offers, list(dict.fromkeys(objects))


def _add(f: BinaryIO, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    f.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
