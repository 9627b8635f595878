"""The update, step by step: refresh, decide, download, verify, unpack, self-test, switch; and the way back.

Whatever fails, the current link still points at the model that served before. tuf verifies signatures, versions and
expiry; on top of it the device holds its own high-water mark, so a wiped cache does not let an old repository pass.
Expiry stops updating, never serving. Probation after the switch, resuming, deltas and a clock floor are not here yet.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import urllib3
from tuf.api.exceptions import DownloadError
from tuf.api.metadata import Metadata, Root, TargetFile, Timestamp

from qcore.canonical import Digest, Json, sha256_json
from qcore.device.compat import device_facts, unmet
from qcore.device.config import DeviceConfig
from qcore.device.refusals import code_of, explained, refusal
from qcore.device.slots import (
    CURRENT,
    PREVIOUS,
    Record,
    Slot,
    damage,
    place,
    point,
    read_slot,
    staging_folder,
    sweep,
    switch,
)
from qcore.device.source import Source, open_source, require_space
from qcore.device.state import DeviceState, load_state, locked, save_state
from qcore.device.trial import try_slot
from qcore.errors import ConfigError, UpdateError
from qcore.release.admission import Allowance, admit_file
from qcore.release.golden_admission import admit_golden
from qcore.release.manifest import GOLDEN, MODEL, compatibility_from_json
from qcore.release.package import read_manifest, unpack_package

Action = Literal["install", "current", "held", "quarantined"]
POINTER_SCHEMA = 1
POINTER_FIELDS: Mapping[str, type] = {
    "schema": int,
    "epoch": int,
    "state": str,
    "release": str,
    "permyriad": int,
    "salt": str,
    "floor": int,
}
SIGNED_FIELDS: Mapping[str, type] = {
    "counter": int,
    "floor": int,
    "model_sha256": str,
    "compat": dict,
    "flash_bytes": int,
}
ALL_DEVICES = 10_000
REPORT_SCHEMA = "qcore.device-report/1"
_RELEASE = re.compile(r"models/([a-z0-9._-]+)/([a-z0-9._-]+)\.qpkg", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What the channel offers this device: a signed release, its download size, and what `install` would do."""

    release: Record
    size_bytes: int
    action: Action

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return {**asdict(self.release), "size_bytes": self.size_bytes, "action": self.action}


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """The release that is active now; `slot` holds its `model.onnx`; `changed` is False if it was active before."""

    version: str
    sha256: Digest
    model_sha256: Digest
    target: str
    counter: int
    epoch: int
    slot: Path
    changed: bool

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return {**asdict(self), "slot": str(self.slot)}


def check(config: DeviceConfig) -> Offer:
    """Return what the channel offers this device; nothing is installed.

    Raises:
        UpdateError: with a code; the repository is unreachable, stale, forged, rolled back, or offers nothing for us.
    """
    with _attempt(config, "check"):
        return _find_offer(config, _open(config))[0]


def install(config: DeviceConfig, *, retry: bool = False) -> Installed:
    """Return the active release after the offered one passed every check and its self-test here.

    Args:
        config: of this device.
        retry: try a release once more that was quarantined here.

    Raises:
        UpdateError: with a code; the model that was active before is still active.
    """
    with _attempt(config, "install"):
        source = _open(config)
        offer, target = _find_offer(config, source)
        current = read_slot(config.state_dir, CURRENT)
        if offer.action == "current" and current is not None and not damage(current):
            return _installed(current, changed=False)
        if offer.action == "held":
            if current is None:
                raise refusal(
                    "E_NO_RELEASE", f"{offer.release.version} is not for this device yet; wait for the rollout"
                )
            return _installed(current, changed=False)
        if offer.action == "quarantined" and not retry:
            raise refusal(
                "E_QUARANTINED",
                f"{offer.release.version} failed here before "
                f"({load_state(config.state_dir).quarantine[offer.release.sha256]}); "
                "publish a new version, or install with --retry",
            )
        sweep(config.state_dir)
        slot = _stage(config, source, offer.release, target)
        _try(config, slot)
        _refuse_withdrawn(config, offer.release)
        switch(config.state_dir, slot)
        _quarantine(config, offer.release.sha256, None)
        sweep(config.state_dir)
        return _installed(slot, changed=True)


def rollback(config: DeviceConfig) -> Installed:
    """Return the previous release after it was made active again; the one that was active is quarantined.

    Raises:
        UpdateError: E_NO_PREVIOUS: there is none; E_HASH: its model is damaged.
    """
    with _attempt(config, "rollback"):
        current, previous = (read_slot(config.state_dir, link) for link in (CURRENT, PREVIOUS))
        if previous is None or (current is not None and current.record.sha256 == previous.record.sha256):
            raise refusal(
                "E_NO_PREVIOUS", "no previous release is kept here; install a release, or publish an older one"
            )
        floor = load_state(config.state_dir).floor
        if previous.record.counter < floor:
            raise refusal(
                "E_ROLLBACK",
                f"{previous.record.version} is revoked: counter {previous.record.counter} is below the floor {floor}; "
                "install a release instead",
            )
        if reason := damage(previous):
            raise refusal("E_HASH", f"{reason}; install a release instead")
        if current is not None:
            _quarantine(config, current.record.sha256, "rolled back by hand")
        point(config.state_dir, CURRENT, previous)
        return _installed(previous, changed=True)


def status(config: DeviceConfig) -> Json:
    """Return the state report: what is active and whole, what was seen, how the last attempt ended; no network."""
    state = load_state(config.state_dir)
    current, previous = (read_slot(config.state_dir, link) for link in (CURRENT, PREVIOUS))
    whole = current is not None and not damage(current)
    return {
        "schema": REPORT_SCHEMA,
        "device_id": config.device_id,
        "hardware": config.hardware,
        "family": config.family,
        "channel": config.channel,
        "state": "serving" if whole else "broken" if current else "empty",
        "revoked": current is not None and current.record.counter < state.floor,
        "active": {**asdict(current.record), "slot": str(current.path)} if current else None,
        "previous": previous.record.version if previous and previous != current else None,
        "epoch": state.epochs.get(_pointer_path(config), 0),
        "high_water": {"root": state.root_version, "timestamp": state.timestamp_version, "floor": state.floor},
        "quarantine": dict(state.quarantine),
        "error": state.last.get("code"),
        "last": dict(state.last),
        "clock": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _attempt(config: DeviceConfig, verb: str) -> Iterator[None]:
    """Hold the lock, name every failure by its code, and remember how the attempt ended."""
    with explained(verb), locked(config.state_dir):
        try:
            with explained(verb):
                yield
        except (UpdateError, ConfigError) as e:
            if code_of(e) not in ("E_STATE", "E_NOSPACE", "E_IO"):
                _remember(config, verb, code_of(e), str(e))
            raise
        _remember(config, verb, None, "")


def _remember(config: DeviceConfig, verb: str, code: str | None, message: str) -> None:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    state = load_state(config.state_dir)
    save_state(config.state_dir, replace(state, last={"verb": verb, "code": code, "message": message, "at": at}))


def _open(config: DeviceConfig) -> Source:
    """Return the verified repository, not older than the high-water mark, which is raised to it."""
    source = open_source(config)
    cache = config.state_dir / "metadata"  # what tuf keeps here it has verified
    root = Metadata[Root].from_file(str(cache / "root.json")).signed
    timestamp = Metadata[Timestamp].from_file(str(cache / "timestamp.json")).signed
    state = load_state(config.state_dir)
    keys = sha256_json(sorted(root.roles["timestamp"].keyids))
    lowest = state.timestamp_version if keys == state.timestamp_keys else 0
    for name, found, seen in (("root", root.version, state.root_version), ("timestamp", timestamp.version, lowest)):
        if found < seen:
            raise refusal(
                "E_ROLLBACK",
                f"{name} version {found} is older than {seen}, which this device has seen; check the repository; "
                "the active model is unchanged",
            )
    mark = replace(state, root_version=root.version, timestamp_keys=keys, timestamp_version=timestamp.version)
    if mark != state:
        save_state(config.state_dir, mark)
    return source


def _find_offer(config: DeviceConfig, source: Source) -> tuple[Offer, TargetFile]:
    """Return the offer behind the channel's pointer after its epoch, floor and hardware were checked."""
    path = _pointer_path(config)
    pointer_target = source.updater.get_targetinfo(path)
    if pointer_target is None:
        raise refusal(
            "E_NO_RELEASE",
            f"channel {config.channel!r} offers nothing for {config.family!r}; publish to it, or correct the names",
        )
    pointer = _checked(pointer_target, POINTER_FIELDS)
    if pointer["schema"] != POINTER_SCHEMA:
        raise refusal(
            "E_INCOMPATIBLE", f"{path} is of schema {pointer['schema']}, known is {POINTER_SCHEMA}; update qcore"
        )
    name = _RELEASE.fullmatch(pointer["release"])
    if name is None or name[1] != config.family:
        raise refusal("E_METADATA", f"{path} points at {pointer['release']!r}, not a release of {config.family!r}")
    target = source.updater.get_targetinfo(pointer["release"])
    if target is None:
        raise refusal(
            "E_UNSIGNED",
            f"{path} points at {pointer['release']}, which gate and publisher did not sign; do not trust it",
        )
    custom = _checked(target, SIGNED_FIELDS)
    raised = source.updater.get_targetinfo(f"models/{config.family}/floor.json")
    if raised is not None:
        custom = {**custom, "floor": max(custom["floor"], _checked(raised, {"floor": int})["floor"])}
    state = _raise_mark(config, path, pointer, custom)
    if (reason := unmet(compatibility_from_json(custom["compat"]), device_facts(config))) is not None:
        raise refusal("E_INCOMPATIBLE", f"{name[2]} {reason}; the active model is unchanged")
    release = Record(
        target=target.path,
        version=name[2],
        sha256=target.hashes["sha256"],
        model_sha256=custom["model_sha256"],
        counter=custom["counter"],
        epoch=pointer["epoch"],
    )
    action = _action(config, state, release.sha256, pointer)
    return Offer(release=release, size_bytes=target.length, action=action), target


def _raise_mark(
    config: DeviceConfig, path: str, pointer: Mapping[str, Json], custom: Mapping[str, Json]
) -> DeviceState:
    """Return the state with epoch and floor raised to what is signed; the pointer alone never raises the floor."""
    state = load_state(config.state_dir)
    seen = state.epochs.get(path, 0)
    if pointer["epoch"] < seen:
        raise refusal("E_ROLLBACK", f"{path} has epoch {pointer['epoch']}, this device has seen {seen}; publish again")
    mark = replace(state, epochs={**state.epochs, path: pointer["epoch"]}, floor=max(state.floor, custom["floor"]))
    if mark != state:
        save_state(config.state_dir, mark)
    floor = max(mark.floor, pointer["floor"])
    if custom["counter"] < floor:
        raise refusal("E_ROLLBACK", f"{pointer['release']} has counter {custom['counter']} below the floor {floor}")
    return mark


def _action(config: DeviceConfig, state: DeviceState, sha256: Digest, pointer: Mapping[str, Json]) -> Action:
    current = read_slot(config.state_dir, CURRENT)
    if current is not None and current.record.sha256 == sha256:
        return "current"
    bucket = hashlib.sha256(f"{pointer['salt']}\0{config.device_id}".encode()).digest()[:8]
    chosen = int.from_bytes(bucket, "big") % ALL_DEVICES < pointer["permyriad"]
    if not chosen or pointer["state"] not in ("rolling", "done"):
        return "held"
    return "quarantined" if sha256 in state.quarantine else "install"


def _checked(target: TargetFile, types: Mapping[str, type]) -> Mapping[str, Json]:
    custom = target.custom
    if not isinstance(custom, dict) or any(type(custom.get(name)) is not kind for name, kind in types.items()):
        raise refusal(
            "E_METADATA", f"{target.path} lacks signed {', '.join(types)}; publish it with this qcore's version"
        )
    return custom


def _stage(config: DeviceConfig, source: Source, release: Record, target: TargetFile) -> Slot:
    """Return the slot of the downloaded, verified and unpacked release; nothing points at it yet."""
    custom = _checked(target, SIGNED_FIELDS)
    require_space(config.state_dir, target.length + custom["flash_bytes"])
    part = source.download(target, config.state_dir / "downloads")
    manifest = read_manifest(part)
    found = (manifest.family, manifest.version, manifest.model_sha256, manifest.compat.to_json(), manifest.flash_bytes)
    stated = (config.family, release.version, release.model_sha256, custom["compat"], custom["flash_bytes"])
    if found != stated:
        raise refusal("E_PACKAGE", f"{target.path} holds another release than its metadata say; publish a new version")
    staged = staging_folder(config.state_dir, release.sha256)
    unpack_package(part, staged)
    part.unlink()
    admit_file(staged / MODEL, Allowance(control_flow=manifest.compat.control_flow))
    admit_golden(staged / GOLDEN, manifest)
    return place(staged, release)


def _try(config: DeviceConfig, slot: Slot) -> None:
    verdict = try_slot(config, slot.path)
    if not verdict.good:
        _quarantine(config, slot.record.sha256, verdict.reason[:200])
        sweep(config.state_dir)
        raise refusal(
            "E_SELFTEST",
            f"{slot.record.version} failed its self-test here: {verdict.reason}; it is quarantined, the active "
            "model is unchanged; publish a new version",
        )


def _refuse_withdrawn(config: DeviceConfig, release: Record) -> None:
    """Refuse a release that was taken back while it was downloaded and tried; one out of reach says nothing."""
    try:
        later = _find_offer(config, _open(config))[0]
    except (DownloadError, urllib3.exceptions.HTTPError):
        return
    if later.release.sha256 != release.sha256 or later.action == "held":
        sweep(config.state_dir)
        raise refusal(
            "E_NO_RELEASE",
            f"{release.version} was taken back, or another release took its place, while it was installed; the active "
            "model is unchanged; check again",
        )


def _quarantine(config: DeviceConfig, sha256: Digest, reason: str | None) -> None:
    """Remember why the package of this digest is not installed again; None: it proved good after all."""
    state = load_state(config.state_dir)
    others = {k: v for k, v in state.quarantine.items() if k != sha256}
    mark = replace(state, quarantine=others if reason is None else {**others, sha256: reason})
    if mark != state:
        save_state(config.state_dir, mark)


def _installed(slot: Slot, *, changed: bool) -> Installed:
    return Installed(**asdict(slot.record), slot=slot.path, changed=changed)


def _pointer_path(config: DeviceConfig) -> str:
    return f"channels/{config.channel}/{config.family}/release.json"
