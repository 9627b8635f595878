"""Attacks and faults of docs/threat-model.md that are about roots, top roles, names, time and what is taken back."""

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Signer
from simulators import FAMILY, World, make_world, now
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Timestamp

from qcore.device import updater
from qcore.device.updater import check, install, status
from qcore.errors import ReleaseError, UpdateError
from qcore.release.keys import load_keys
from qcore.release.manifest import check_name
from qcore.release.metadata import load_trusted
from qcore.release.repository import refresh
from qcore.release.repository import status as roles
from qcore.release.store import DirectoryStore
from qcore.release.withdrawal import Yank, yank
from qcore.steps import repository as life


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world with 1.0.0 installed on dev-1 and 1.1.0 published."""
    world = make_world(tmp_path)
    world.publish("1.0.0")
    install(world.device())
    world.publish("1.1.0", seed=1)
    return world


def refused(world: World, code: str) -> None:
    """Assert that the device refuses with `code` and that what served before still does."""
    with pytest.raises(UpdateError, match=rf"^{code}: "):
        install(world.device())
    assert status(world.device())["active"]["version"] == "1.0.0"
    assert status(world.device())["state"] == "serving"


def metadata(world: World, name: str) -> Path:
    return world.store.folder / "metadata" / name


def forge(world: World, change: Callable[[Timestamp, Snapshot], None], signers: dict[str, list[Signer]]) -> None:
    """Put a timestamp and a snapshot of the attacker's making into the store, signed with the keys that he has."""
    timestamp = Metadata[Timestamp].from_bytes(metadata(world, "timestamp.json").read_bytes())
    version = timestamp.signed.snapshot_meta.version
    snapshot = Metadata[Snapshot].from_bytes(metadata(world, f"{version}.snapshot.json").read_bytes())
    snapshot.signed.version += 1
    timestamp.signed.version += 1
    change(timestamp.signed, snapshot.signed)
    for role, found in (("snapshot", snapshot), ("timestamp", timestamp)):
        found.signatures.clear()
        for signer in signers.get(role, []):
            found.sign(signer, append=True)
        if role == "snapshot":
            name = f"{snapshot.signed.version}.snapshot.json"
            metadata(world, name).write_bytes(snapshot.to_bytes())
            meta = MetaFile.from_data(snapshot.signed.version, snapshot.to_bytes(), ["sha256"])
            timestamp.signed.snapshot_meta = meta
    metadata(world, "timestamp.json").write_bytes(timestamp.to_bytes())


def both(world: World) -> dict[str, list[Signer]]:
    return {role: [world.keys.signer(role)] for role in ("snapshot", "timestamp")}


# Row 10, 11, 12: the online roles


def test_row_10_a_snapshot_that_drops_a_role_is_refused(world: World) -> None:
    forge(world, lambda _, snapshot: snapshot.meta.pop(f"models-{FAMILY}.json"), both(world))  # type: ignore[arg-type]
    refused(world, "E_METADATA")


def test_row_10_a_snapshot_with_an_older_role_is_refused(world: World) -> None:
    def older(_: Timestamp, snapshot: Snapshot) -> None:
        name = f"models-{FAMILY}.json"
        first = metadata(world, f"2.models-{FAMILY}.json").read_bytes()
        snapshot.meta[name] = MetaFile.from_data(2, first, ["sha256"])

    check(world.device())
    forge(world, older, both(world))
    refused(world, "E_ROLLBACK")


def test_row_11_a_fast_forwarded_timestamp_is_recovered_from_by_a_new_key(world: World) -> None:
    def forward(timestamp: Timestamp, _: Snapshot) -> None:
        timestamp.version = 2**31 - 1

    good = metadata(world, "timestamp.json").read_bytes()
    forge(world, forward, both(world))
    check(world.device())
    metadata(world, "timestamp.json").write_bytes(good)
    refused(world, "E_ROLLBACK")
    life.rotate(repository=world.store.folder, keys=world.keys.folder, name="timestamp", compromised=True)
    assert install(world.device()).version == "1.1.0"


def test_row_12_a_stolen_timestamp_key_can_name_no_snapshot_of_its_own(world: World) -> None:
    forge(world, lambda _, snapshot: None, {"timestamp": both(world)["timestamp"]})
    refused(world, "E_UNSIGNED")
    life_again = load_keys(world.keys.folder)
    with pytest.raises(ReleaseError, match="does not verify"):
        refresh(world.store, life_again, now=now())


def test_row_12_a_timestamp_key_that_was_rotated_out_signs_nothing_any_more(world: World) -> None:
    thief = both(world)
    life.rotate(repository=world.store.folder, keys=world.keys.folder, name="timestamp", compromised=True)
    forge(world, lambda timestamp, _: None, thief)
    refused(world, "E_UNSIGNED")


# Row 16, 17: the root


def next_root(world: World, signers: list[Signer], version: int = 2, change: bool = False) -> None:
    root = Metadata[Root].from_bytes(world.keys.pinned_root.read_bytes())
    root.signed.version = version
    if change:
        for keyid in list(root.signed.roles["timestamp"].keyids):
            root.signed.revoke_key(keyid, "timestamp")
        root.signed.add_key(CryptoSigner.generate_ed25519().public_key, "timestamp")
    root.signatures.clear()
    for signer in signers:
        root.sign(signer, append=True)
    metadata(world, f"{version}.root.json").write_bytes(root.to_bytes())


def test_row_16_one_root_key_makes_no_root(world: World) -> None:
    next_root(world, [world.keys.root[0]])
    refused(world, "E_UNSIGNED")


def test_row_16_one_root_key_twice_makes_no_root(world: World) -> None:
    next_root(world, [world.keys.root[0], world.keys.root[0]])
    refused(world, "E_UNSIGNED")


def test_row_17_a_root_that_only_signs_itself_is_refused(world: World) -> None:
    thieves = [CryptoSigner.generate_ed25519() for _ in range(3)]
    root = Metadata[Root].from_bytes(world.keys.pinned_root.read_bytes())
    root.signed.version = 2
    for role in ("root", "targets"):
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        for thief in thieves:
            root.signed.add_key(thief.public_key, role)
    root.signatures.clear()
    for thief in thieves:
        root.sign(thief, append=True)
    metadata(world, "2.root.json").write_bytes(root.to_bytes())
    refused(world, "E_UNSIGNED")


def test_row_17_behind_a_gap_in_the_chain_the_last_good_root_holds(world: World) -> None:
    next_root(world, list(world.keys.root), version=3, change=True)
    assert install(world.device()).version == "1.1.0"
    assert status(world.device())["high_water"]["root"] == 1


# Row 18: delegations


def test_row_18_no_two_delegations_overlap_and_all_are_terminating(world: World) -> None:
    root = world.keys.pinned_root.read_bytes()
    delegations = load_trusted(world.store, root).targets.delegations
    assert delegations is not None
    found = list((delegations.roles or {}).values())
    assert all(role.terminating for role in found)
    assert len({role.name for role in found}) == len(found)
    for path in (f"models/{FAMILY}/1.0.0.qpkg", f"channels/stable/{FAMILY}/release.json"):
        assert sum(role.is_delegated_path(path) for role in found) == 1


# Row 33: a cache in front of the repository


@contextmanager
def cached_absence(folder: Path, absent: set[str]) -> Iterator[str]:
    """Serve `folder` through a cache that remembers of the names in `absent` that they are not there."""

    class Proxy(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]  # as the server calls it

        def do_GET(self) -> None:
            if self.path.rpartition("/")[2] in absent:
                self.send_error(404)
            else:
                super().do_GET()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_row_33_a_cache_that_hides_a_new_root_stops_no_device_during_the_overlap(world: World) -> None:
    absent = {"2.root.json", "3.root.json"}
    with cached_absence(world.store.folder, absent) as address:
        config = world.device(repository=address)
        place = {"repository": world.store.folder, "keys": world.keys.folder, "name": "timestamp"}
        life.rotate(**place)
        assert install(config).version == "1.1.0"
        refresh(world.store, load_keys(world.keys.folder), now=now() + timedelta(hours=7))
        assert check(config).action == "current"
        absent.clear()
        life.rotate(**place, finish=True)
        assert check(config).action == "current"
        assert status(config)["high_water"]["root"] == 3


# Row 54: taken back while it is on its way


@pytest.mark.parametrize("when", ["before the download", "before the switch"])
def test_row_54_a_release_that_is_taken_back_on_its_way_is_not_activated(
    world: World, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_stage" if when == "before the download" else "_try"
    original = getattr(updater, name)

    def taken_back(*args: object) -> object:
        yank(world.store, world.keys, Yank(release=f"models/{FAMILY}/1.1.0.qpkg"), now=now())
        return original(*args)

    monkeypatch.setattr(updater, name, taken_back)
    refused(world, "E_NO_RELEASE")
    monkeypatch.setattr(updater, name, original)
    assert install(world.device()).version == "1.0.0"


def test_row_54_a_repository_that_goes_away_meanwhile_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = updater._try

    def gone(*args: object) -> None:
        shutil.rmtree(world.store.folder / "metadata")
        original(*args)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(updater, "_try", gone)
    assert install(world.device()).version == "1.1.0"


# Row 56: nobody refreshes


def test_row_56_a_refresh_job_that_died_is_seen_devices_serve_on_and_recover(tmp_path: Path) -> None:
    world = make_world(tmp_path, now() - timedelta(days=8))
    levels = {r.role: r.level for r in roles(world.store, now=now() - timedelta(days=8) + timedelta(hours=30))}
    assert (levels["timestamp"], levels["snapshot"]) == ("half", "good")
    with pytest.raises(UpdateError, match=r"^E_STALE"):
        check(world.device())
    assert {r.role: r.level for r in roles(world.store, now=now())}["snapshot"] == "expired"
    refresh(world.store, world.keys, now=now())
    world.publish("1.0.0")
    assert install(world.device()).version == "1.0.0"


# Row 57: names


@given(st.text(max_size=70))
def test_row_57_a_name_that_is_taken_is_safe_in_paths_keys_and_addresses(name: str) -> None:
    try:
        check_name("version", name, ReleaseError)
    except ReleaseError:
        return
    key = f"targets/models/{name}/{'0' * 64}.{name}.qpkg"
    assert key == key.encode("ascii", "strict").decode().casefold()
    assert not set(key) - set("abcdefghijklmnopqrstuvwxyz0123456789._-/")
    assert ".." not in key
    assert DirectoryStore(folder=Path("/nonexistent")).get(key) is None


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a%2fb", "a+b", "a b", "ä", "a.", ".a", "a..b", "", "A", "a\0b", "a" * 65]
)
def test_row_57_path_tricks_are_no_names(name: str) -> None:
    with pytest.raises(ReleaseError, match="is not allowed"):
        check_name("version", name, ReleaseError)


# Row 59: tenants


def test_row_59_the_keys_of_one_tenant_sign_nothing_for_another(world: World) -> None:
    other = make_world(world.folder / "other")
    other.publish("9.0.0", seed=9)
    with pytest.raises(ReleaseError, match="does not verify"):
        refresh(world.store, other.keys, now=now())
    thief = {role: [other.keys.signer(role)] for role in ("snapshot", "timestamp")}
    forge(world, lambda timestamp, snapshot: None, thief)
    refused(world, "E_UNSIGNED")


# Row 60: secrets


def test_row_60_no_private_key_reaches_a_log_an_error_or_the_repository(
    world: World, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = [
        line
        for path in world.keys.folder.glob("*.pem")
        for line in path.read_text().splitlines()
        if "-----" not in line
    ]
    assert len(secrets) >= 8
    said = []
    for broken in ("publisher", "gate"):
        path = world.keys.folder / f"{broken}.pem"
        good = path.read_text()
        path.write_text(good.replace("-----END", "=---END"))
        with pytest.raises(ReleaseError) as e:
            load_keys(world.keys.folder)
        said.append(str(e.value))
        path.write_text(good)
    world.publish("1.2.0", seed=2)
    install(world.device())
    life.rotate(repository=world.store.folder, keys=world.keys.folder, name="publisher")
    said += [caplog.text, *capfd.readouterr()]
    said += [p.read_bytes().decode("latin-1") for p in world.store.folder.rglob("*") if p.is_file()]
    said += [p.read_bytes().decode("latin-1") for p in world.device().state_dir.rglob("*") if p.is_file()]
    assert not [s for s in secrets for text in said if s in text]
    assert socket.getfqdn() not in "".join(said[:2])
