"""Attacks on a published repository, each refused by the device with its own code while the old model serves.

The forgeries are signed with the keys that the attacker of each row is assumed to hold.
"""

import dataclasses
import shutil
from collections.abc import Callable
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import Signer
from simulators import World, digest, forget_metadata_cache, make_world, now, package_source
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from qcore.canonical import sha256_bytes
from qcore.device.config import DeviceConfig
from qcore.device.updater import check, install
from qcore.errors import PackageError, UpdateError
from qcore.release.manifest import RuntimeRange
from qcore.release.package import Package, PackageSource, build_package
from qcore.release.repository import publish_release, refresh


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world with release 1.0.0 installed on dev-1 and 1.1.0 published."""
    world = make_world(tmp_path)
    world.publish("1.0.0")
    install(world.device())
    world.publish("1.1.0", seed=1)
    return world


def refused(config: DeviceConfig, code: str) -> str:
    """Return the one-line refusal of an install that left the active model as it was."""
    link = config.state_dir / "current"
    before = digest(link / "model.onnx") if link.exists() else None
    with pytest.raises(UpdateError, match=rf"^{code}: ") as e:
        install(config)
    assert "\n" not in str(e.value)
    assert (digest(link / "model.onnx") if link.exists() else None) == before
    return str(e.value)


def metadata(world: World, name: str) -> Path:
    return world.store.folder / "metadata" / name


def resign(world: World, role: str, change: Callable[[Targets], object], signers: list[Signer]) -> None:
    """Publish a changed `role` signed by `signers`, with snapshot and timestamp that fit it (their keys are stolen)."""
    timestamp = Metadata[Timestamp].from_bytes(metadata(world, "timestamp.json").read_bytes())
    version = timestamp.signed.snapshot_meta.version
    snapshot = Metadata[Snapshot].from_bytes(metadata(world, f"{version}.snapshot.json").read_bytes())
    meta = snapshot.signed.meta[f"{role}.json"]
    forged = Metadata[Targets].from_bytes(metadata(world, f"{meta.version}.{role}.json").read_bytes())
    change(forged.signed)
    forged.signed.version += 50
    forged.signatures.clear()
    for signer in signers:
        forged.sign(signer, append=True)
    metadata(world, f"{forged.signed.version}.{role}.json").write_bytes(forged.to_bytes())
    snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(forged.signed.version, forged.to_bytes(), ["sha256"])
    snapshot.signed.version += 50
    snapshot.sign(world.keys.signer("snapshot"))
    metadata(world, f"{snapshot.signed.version}.snapshot.json").write_bytes(snapshot.to_bytes())
    timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, snapshot.to_bytes(), ["sha256"])
    timestamp.signed.version += 50
    timestamp.sign(world.keys.signer("timestamp"))
    metadata(world, "timestamp.json").write_bytes(timestamp.to_bytes())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_of_a_published_package_is_refused(world: World, data: st.DataObject) -> None:
    path = next(world.store.folder.rglob("*.1.1.0.qpkg"))
    good = path.read_bytes()
    position = data.draw(st.one_of(st.sampled_from([0, len(good) // 2, len(good) - 1]), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bad)
    try:
        assert "models/digits/1.1.0.qpkg differs from what was signed" in refused(world.device(), "E_HASH")
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda _: b"", lambda b: b * 50])
def test_a_package_of_another_length_is_refused(world: World, change: Callable[[bytes], bytes]) -> None:
    path = next(world.store.folder.rglob("*.1.1.0.qpkg"))
    path.write_bytes(change(path.read_bytes()))
    refused(world.device(), "E_HASH")
    assert list((world.device().state_dir / "downloads").iterdir()) == []


def test_two_swapped_packages_are_refused(world: World) -> None:
    a, b = (next(world.store.folder.rglob(f"*.{v}.qpkg")) for v in ("1.0.0", "1.1.0"))
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)
    refused(world.device(), "E_HASH")


def test_a_missing_package_is_unreachable(world: World) -> None:
    next(world.store.folder.rglob("*.1.1.0.qpkg")).unlink()
    refused(world.device(), "E_UNREACHABLE")


def test_a_stale_timestamp_stops_updates_not_the_model(tmp_path: Path) -> None:
    world = make_world(tmp_path, now() - timedelta(hours=49))
    with pytest.raises(UpdateError, match=r"^E_STALE: .*timestamp\.json is expired"):
        check(world.device())
    world.publish()  # signs a fresh timestamp
    assert install(world.device()).version == "1.0.0"


@pytest.mark.parametrize("cache", ["kept", "wiped"])
def test_a_replayed_timestamp_is_refused(tmp_path: Path, cache: str) -> None:
    world = make_world(tmp_path)
    config = world.device()
    world.publish("1.0.0")
    old = metadata(world, "timestamp.json").read_bytes()
    world.publish("1.1.0", seed=1)
    install(config)
    metadata(world, "timestamp.json").write_bytes(old)
    if cache == "wiped":
        forget_metadata_cache(config)
    refused(config, "E_ROLLBACK")
    refused(config, "E_ROLLBACK")  # and again, after what the first attempt cached


def test_recovery_from_a_refused_replay_needs_nothing_but_a_newer_timestamp(world: World) -> None:
    config = world.device()
    install(config)
    good = metadata(world, "timestamp.json").read_bytes()
    world.publish("1.2.0", seed=2)
    install(config)
    new = metadata(world, "timestamp.json").read_bytes()
    metadata(world, "timestamp.json").write_bytes(good)
    refused(config, "E_ROLLBACK")
    metadata(world, "timestamp.json").write_bytes(new)
    assert not install(config).changed


@pytest.mark.parametrize(
    "held", [["publisher"], ["gate"], ["publisher", "publisher"], ["channel-stable", "publisher"], []]
)
def test_less_than_gate_and_publisher_ships_nothing(world: World, held: list[str]) -> None:
    resign(world, "models-digits", lambda role: None, [world.keys.signer(n) for n in held])
    refused(world.device(), "E_UNSIGNED")


def test_an_unsigned_timestamp_is_refused(world: World) -> None:
    path = metadata(world, "timestamp.json")
    timestamp = Metadata[Timestamp].from_bytes(path.read_bytes())
    timestamp.signed.version += 1
    path.write_bytes(timestamp.to_bytes())
    refused(world.device(), "E_UNSIGNED")


def test_a_stolen_channel_key_cannot_name_bytes_of_its_own(world: World) -> None:
    def point_at(release: str) -> Callable[[Targets], object]:
        pointer = "channels/stable/digits/release.json"
        return lambda role: role.targets[pointer].custom.update(release=release, epoch=99)

    channel = [world.keys.channel("stable")]
    resign(world, "channel-stable", point_at("models/digits/6.6.6.qpkg"), channel)
    assert "gate and publisher did not sign" in refused(world.device(), "E_UNSIGNED")
    for release in ("channels/stable/digits/evil.qpkg", "models/other/1.0.0.qpkg", "models/digits/../x.qpkg"):
        resign(world, "channel-stable", point_at(release), channel)
        refused(world.device("fresh"), "E_METADATA")


def pointer_change(**changes: object) -> Callable[[Targets], object]:
    return lambda role: role.targets["channels/stable/digits/release.json"].custom.update(changes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"epoch": 0}, "E_ROLLBACK"),
        ({"floor": 3}, "E_ROLLBACK"),
        ({"schema": 2}, "E_INCOMPATIBLE"),
        ({"epoch": "2"}, "E_METADATA"),
        ({"epoch": True}, "E_METADATA"),
        ({"permyriad": None}, "E_METADATA"),
        ({"floor": "1"}, "E_METADATA"),
    ],
)
def test_a_pointer_that_goes_back_or_makes_no_sense_is_refused(
    world: World, changes: dict[str, object], code: str
) -> None:
    resign(world, "channel-stable", pointer_change(**changes), [world.keys.channel("stable")])
    refused(world.device(), code)


@pytest.mark.parametrize("changes", [{"permyriad": 0}, {"state": "paused"}, {"state": "unheard of"}])
def test_a_release_that_is_not_for_this_device_yet_is_not_installed(world: World, changes: dict[str, object]) -> None:
    resign(world, "channel-stable", pointer_change(**changes), [world.keys.channel("stable")])
    assert check(world.device()).action == "held"
    assert install(world.device()).version == "1.0.0"
    refused(world.device("fresh"), "E_NO_RELEASE")


def test_a_channel_goes_back_to_an_older_release_by_a_new_epoch(world: World) -> None:
    assert install(world.device()).version == "1.1.0"
    back = pointer_change(epoch=3, release="models/digits/1.0.0.qpkg")
    resign(world, "channel-stable", back, [world.keys.channel("stable")])
    done = install(world.device())
    assert (done.version, done.epoch, done.changed) == ("1.0.0", 3, True)


def test_mixed_metadata_are_refused(world: World) -> None:
    current = sorted(metadata(world, "").glob("*.models-digits.json"))
    current[-1].write_bytes(current[0].read_bytes())
    refused(world.device("fresh"), "E_HASH")


def test_metadata_that_are_not_json_are_refused(world: World) -> None:
    metadata(world, "timestamp.json").write_bytes(b"not json")
    refused(world.device(), "E_METADATA")


def test_another_tenants_repository_is_not_trusted(world: World) -> None:
    other = make_world(world.folder / "other")
    other.publish("9.0.0", seed=9)
    refused(world.device(repository=str(other.store.folder)), "E_UNSIGNED")
    refused(world.device("fresh", repository=str(other.store.folder)), "E_UNSIGNED")


def test_the_whole_repository_moved_back_is_refused_even_without_cache(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    config = world.device()
    world.publish("1.0.0")
    shutil.copytree(world.store.folder, tmp_path / "backup")
    world.publish("1.1.0", seed=1)
    install(config)
    forget_metadata_cache(config)
    refused(world.device(repository=str(tmp_path / "backup")), "E_ROLLBACK")


def test_over_http_the_same_bytes_arrive(world: World) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(world.store.folder))  # type: ignore[arg-type]  # as the server calls it

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        config = world.device("far", repository=f"http://127.0.0.1:{server.server_address[1]}/")
        done = install(config)
        assert (done.version, digest(done.slot / "model.onnx")) == ("1.1.0", done.model_sha256)
        refresh(world.store, world.keys, now=now() + timedelta(hours=8))
        assert check(config).action == "current"
        server.shutdown()


def test_the_evidence_of_a_release_is_public_beside_it(world: World) -> None:
    path = next(world.store.folder.rglob("*.1.1.0.evidence.json"))
    assert path.name.startswith(sha256_bytes(path.read_bytes()))


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and publisher let every package pass that can be read: the device must not rely on them."""
    monkeypatch.setattr("qcore.release.subject.admit_members", lambda folder, manifest: None)


def odd_package(world: World, change: Callable[[PackageSource], object]) -> Package:
    source = package_source(world.folder / "odd", "1.2.0")
    changed = change(source)
    return build_package(changed if isinstance(changed, PackageSource) else source, world.folder / "odd.qpkg")


def pointing_outside(source: PackageSource) -> None:
    model = onnx.load_from_string(source.model.read_bytes())
    model.graph.initializer[0].external_data.add(key="location", value="../../../etc/passwd")
    source.model.write_bytes(model.SerializeToString())


def pickled(source: PackageSource) -> None:
    np.savez(source.golden, **{"input:x": np.array([{}], dtype=object), "output:y": np.zeros((5, 3), np.float32)})


NOT_ADMITTED = [
    (pointing_outside, "E_MODEL", "lies in another file"),
    (lambda s: s.model.write_bytes(s.model.read_bytes() * 2), "E_MODEL", "twice"),
    (pickled, "E_PACKAGE", "objects are never loaded"),
]


@pytest.mark.parametrize(("change", "code", "reason"), NOT_ADMITTED, ids=["external data", "two models", "pickle"])
def test_a_signed_model_that_is_not_admitted_is_not_loaded(
    world: World, careless: None, change: Callable[[PackageSource], object], code: str, reason: str
) -> None:
    """Even where gate and publisher let a model pass that looks at files beside it, the device does not."""
    package = odd_package(world, change)
    publish_release(world.store, world.submission(package), world.keys, now=now())
    assert reason in refused(world.device(), code)


@pytest.mark.parametrize(("change", "code", "reason"), NOT_ADMITTED, ids=["external data", "two models", "pickle"])
def test_what_is_not_admitted_is_not_published(
    world: World, change: Callable[[PackageSource], object], code: str, reason: str
) -> None:
    del code
    package = odd_package(world, change)
    before = sorted(world.store.folder.rglob("*"))
    with pytest.raises(PackageError, match=reason):
        publish_release(world.store, world.submission(package), world.keys, now=now())
    assert sorted(world.store.folder.rglob("*")) == before


def needing(**changes: object) -> Callable[[PackageSource], PackageSource]:
    return lambda source: dataclasses.replace(source, compat=dataclasses.replace(source.compat, **changes))


NEW_RUNTIME = RuntimeRange(minimum="99.1", tested="99.1.0", below="100")
OLD_RUNTIME = RuntimeRange(minimum="0.9", tested="0.9.1", below="1")


@pytest.mark.parametrize(
    ("needs", "device", "reason"),
    [
        ({"hardware": ("npu",)}, {}, "is for hardware npu, this device is x86-vnni"),
        ({"cpu_features": (("nonesuch", "neverseen"),)}, {}, "needs a CPU with nonesuch or neverseen"),
        ({"cpu_features": (("avx2",),)}, {"cpu_features": ("sse2",)}, "needs a CPU with avx2"),
        ({"onnxruntime": NEW_RUNTIME}, {}, "needs onnxruntime 99.1 or newer"),
        ({"onnxruntime": OLD_RUNTIME}, {}, "below 1 "),
        ({}, {"onnxruntime": "1.19.2"}, "needs onnxruntime 1.20 or newer"),
        ({}, {"onnxruntime": "unknown"}, "correct onnxruntime in the configuration"),
        ({"providers": ("CPUExecutionProvider",)}, {"providers": ("QNNExecutionProvider",)}, "runs on CPU"),
        ({"memory_bytes": 1 << 50}, {}, "bytes of memory"),
        ({"memory_bytes": 65 << 20}, {"memory_mb": 64}, "needs 68157440 bytes of memory, this device has 67108864"),
        ({"control_flow": True}, {}, "holds control flow"),
    ],
)
def test_a_release_that_this_device_cannot_run_is_not_downloaded(
    world: World, needs: dict[str, object], device: dict[str, object], reason: str
) -> None:
    package = odd_package(world, needing(**needs))
    release = publish_release(world.store, world.submission(package), world.keys, now=now())
    world.object_path(release).unlink()  # a download would be E_UNREACHABLE
    assert reason in refused(world.device(**device), "E_INCOMPATIBLE")


def test_what_nobody_can_tell_of_a_device_is_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    package = odd_package(world, needing(cpu_features=(("avx2",),), memory_bytes=1))
    publish_release(world.store, world.submission(package), world.keys, now=now())
    monkeypatch.setattr("qcore.device.compat.CPUINFO", world.folder / "none")
    monkeypatch.setattr("qcore.device.compat.MEMINFO", world.folder / "none")
    assert "state cpu_features" in refused(world.device(), "E_INCOMPATIBLE")
    assert "state memory_mb" in refused(world.device(cpu_features=("avx2",)), "E_INCOMPATIBLE")
    assert install(world.device(cpu_features=("avx2",), memory_mb=64)).version == "1.2.0"


def test_needs_that_differ_from_the_manifest_are_never_signed(world: World) -> None:
    """The needs that devices read before a download are those of the package, or the gate does not sign."""
    package = world.package("1.2.0")
    lying = dataclasses.replace(package.manifest, compat=dataclasses.replace(package.manifest.compat, opset=13))
    found = publish_release(world.store, world.submission(package), world.keys, now=now())
    assert found.version == "1.2.0"
    metadata_of_role = sorted(metadata(world, "").glob("*.models-digits.json"), key=lambda p: int(p.name.split(".")[0]))
    custom = Metadata[Targets].from_bytes(metadata_of_role[-1].read_bytes()).signed.targets[found.target].custom
    assert custom["compat"] == package.manifest.compat.to_json() != lying.compat.to_json()

    def lie(role: Targets) -> None:
        role.targets[found.target].custom["compat"] = lying.compat.to_json()

    resign(world, "models-digits", lie, [world.keys.signer("gate"), world.keys.signer("publisher")])
    assert "holds another release than its metadata say" in refused(world.device(), "E_PACKAGE")


def test_a_disk_too_small_for_the_unpacked_package_is_told_before_the_download(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = world.publish("1.2.0")
    world.object_path(release).unlink()
    usage = shutil.disk_usage(world.folder)
    needed = release.size_bytes + (1 << 20)  # the download and the reserve
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    refused(world.device(), "E_NOSPACE")
