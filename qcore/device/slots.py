"""Slots: one folder per installed package, and two links, `current` and `previous`, that are only ever replaced.

The order is always: files durable, folder durable, link replaced, folder of the links durable. A power cut leaves the
old link or the new one. What may become current is decided in `updater.py`.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qcore.canonical import Digest
from qcore.files import fsync_dir, sha256_file, write_json
from qcore.release.manifest import MODEL

CURRENT, PREVIOUS = "current", "previous"
RECORD = "release.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the signed repository said about the package in a slot, kept beside its files."""

    target: str
    version: str
    sha256: Digest
    model_sha256: Digest
    counter: int
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """An installed package: its folder, and its record."""

    path: Path
    record: Record


def read_slot(state_dir: Path, link: str) -> Slot | None:
    """Return the slot that `link` points to; None if there is none, or its record is gone or damaged."""
    try:
        path = state_dir / os.readlink(state_dir / link)
        stored = json.loads((path / RECORD).read_bytes())
        record = Record(**{f.name: stored[f.name] for f in fields(Record)})  # a newer agent may have written more
        return Slot(path=path, record=record)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def damage(slot: Slot) -> str | None:
    """Return what is wrong with the model in the slot, None if it is byte for byte the released one."""
    try:
        found = sha256_file(slot.path / MODEL)
    except OSError as e:
        return f"{slot.path / MODEL} cannot be read: {e.strerror}"
    expected = slot.record.model_sha256
    return None if found == expected else f"{slot.path / MODEL} has sha256 {found[:12]}, released was {expected[:12]}"


def place(staged: Path, record: Record) -> Slot:
    """Return the slot made of the folder `staged`, whose files are durable; a slot of the same digest gives way."""
    write_json(staged / RECORD, asdict(record))
    path = staged.with_name(record.sha256)
    if path.exists():
        shutil.rmtree(path)
    staged.rename(path)
    fsync_dir(path.parent)
    return Slot(path=path, record=record)


def switch(state_dir: Path, slot: Slot) -> None:
    """Make `slot` the current one, durably, and what was current the previous one."""
    old = read_slot(state_dir, CURRENT)
    if old is not None and old.record.sha256 != slot.record.sha256:
        point(state_dir, PREVIOUS, old)
    point(state_dir, CURRENT, slot)


def point(state_dir: Path, link: str, slot: Slot) -> None:
    """Let `link` point to `slot`: the old link or the new one survives a power cut, never none."""
    fresh = state_dir / f".{link}.tmp"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(f"slots/{slot.record.sha256}")
    fresh.replace(state_dir / link)
    fsync_dir(state_dir)


def staging_folder(state_dir: Path, sha256: Digest) -> Path:
    """Return the folder in which a slot is built before it gets its name."""
    return state_dir / "slots" / f"{sha256}.tmp"


def sweep(state_dir: Path) -> None:
    """Remove what no link points to: other slots, half-built ones and half-loaded packages.

    The links decide, not the records: a slot whose record cannot be read still serves.
    """
    kept = {os.path.basename(os.readlink(link)) for n in (CURRENT, PREVIOUS) if (link := state_dir / n).is_symlink()}
    for path in [*(state_dir / "slots").glob("*"), *(state_dir / "downloads").glob("*")]:
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
