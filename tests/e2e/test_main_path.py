"""The whole main path, from a float model to a device, in the order in which it happens. Read this file first.

Every step is one call on files (`qcore.steps`); the command line and the pipeline components make the same calls.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from models import conv_net, save, write_data

from qcore import steps
from qcore.device.config import DeviceConfig
from qcore.device.updater import install, rollback, status
from qcore.errors import GateRefused, PackageError, UpdateError
from qcore.files import sha256_file
from qcore.release.keys import KeyRing, create_keys
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore

TIGHTER = "name: tighter\nsteps: [{method: fold-batchnorm}, {method: quantize, ranges: percentile, percentile: 99.5}]\n"
POLICY = "name: test\ntop1: {max_drop: 0.2}\nagreement: {min: 0.7}\n"


def make_repository(folder: Path, *, now: datetime | None = None) -> tuple[Path, KeyRing]:
    """Make signing keys and an empty signed repository, as `qcore repo init` does."""
    keys = create_keys(folder / "keys", ["stable"])
    repository = folder / "repository"
    init_repository(DirectoryStore(folder=repository), keys, ["stable"], now=now or datetime.now(UTC))
    return repository, keys


def make_device(folder: Path, repository: Path, keys: KeyRing, hardware: str) -> DeviceConfig:
    """Configure a device that trusts the pinned root and follows the channel `stable`."""
    return DeviceConfig(
        device_id="bench-1",
        hardware=hardware,
        family="tiny",
        repository=str(repository),
        root=keys.pinned_root,
        state_dir=folder / "device",
    )


def release(
    folder: Path, model: Path, data: Path, repository: Path, keys: KeyRing, *, version: str, recipe: str
) -> str:
    """Compress, evaluate, package, gate and publish one candidate; return the digest of its model."""
    folder.mkdir()
    table, candidate, report = folder / "table.json", folder / "candidate.onnx", folder / "report.json"
    evidence, package, policy = folder / "evidence.json", folder / "tiny.qpkg", folder / "policy.yaml"
    policy.write_text(POLICY)

    steps.calibrate(model=model, data=data, split="calibration", out=table)
    made = steps.quantize(model=model, table=table, recipe=recipe, target="x86-avx2", out=candidate)
    measured = steps.evaluate(candidate=candidate, baseline=model, data=data, split="evaluation", out=report)
    steps.package(model=candidate, data=data, family="tiny", version=version, target="x86-avx2", out=package)
    decision = steps.gate(report=report, package=package, policy=policy, key=keys.folder / "gate.pem", out=evidence)
    assert measured.model.sha256 == decision.model_sha256 == made.sha256  # one digest from end to end
    if decision.outcome != "pass":
        raise GateRefused(decision.checks[0].reason)
    steps.publish(package=package, evidence=evidence, repository=repository, keys=keys.folder, channel="stable")
    return made.sha256


@pytest.fixture
def tighter(tmp_path):
    """A recipe of one's own: ranges that leave out one value in two hundred."""
    path = tmp_path / "tighter.yaml"
    path.write_text(TIGHTER)
    return str(path)


@pytest.fixture
def world(tmp_path):
    """A float model, data, an empty repository with its keys, and a device."""
    proto = conv_net()
    model, data = save(proto, tmp_path / "float.onnx"), write_data(tmp_path / "data", proto)
    repository, keys = make_repository(tmp_path)
    return model, data, repository, keys, make_device(tmp_path, repository, keys, "x86-avx2")


def test_a_float_model_becomes_a_running_release(world, tighter, tmp_path):
    model, data, repository, keys, device = world

    first = release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    installed = install(device)
    assert installed.version == "1.0"
    assert sha256_file(device.state_dir / "current" / "model.onnx") == first  # exactly the bytes that were measured

    second = release(tmp_path / "b", model, data, repository, keys, version="1.1", recipe=tighter)
    assert second != first
    assert install(device).version == "1.1"
    assert sha256_file(device.state_dir / "current" / "model.onnx") == second

    assert rollback(device).version == "1.0"
    assert status(device)["active"]["version"] == "1.0"


def test_a_candidate_that_is_too_coarse_never_reaches_the_device(world, tmp_path):
    model, data, repository, keys, device = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    install(device)
    with pytest.raises(GateRefused, match="outside the limit"):
        release(tmp_path / "b", model, data, repository, keys, version="2.0", recipe="int2-weights")
    assert not install(device).changed


def published_package(repository: Path) -> Path:
    """Return the stored file of the only published package."""
    (package,) = repository.rglob("*.qpkg")
    return package


def test_one_flipped_byte_in_the_published_package_is_refused(world, tmp_path):
    model, data, repository, keys, device = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    package = published_package(repository)
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    with pytest.raises(UpdateError, match=r"^E_HASH"):
        install(device)
    assert not (device.state_dir / "current").exists()


@pytest.mark.parametrize("record", ["{}", "not json", None])
def test_a_slot_whose_record_is_damaged_still_serves_when_an_update_fails(world, tighter, tmp_path, record):
    model, data, repository, keys, device = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    install(device)
    current = device.state_dir / "current"
    served = sha256_file(current / "model.onnx")
    (current / "release.json").unlink() if record is None else (current / "release.json").write_text(record)
    release(tmp_path / "b", model, data, repository, keys, version="1.1", recipe=tighter)
    package = next(p for p in repository.rglob("*.qpkg") if "1.1" in p.name)
    package.write_bytes(package.read_bytes()[:-600] + bytes(600))
    package.write_bytes(bytes([package.read_bytes()[0] ^ 1]) + package.read_bytes()[1:])
    with pytest.raises(UpdateError, match=r"^E_HASH"):
        install(device)
    assert sha256_file(current / "model.onnx") == served


def test_a_stale_timestamp_is_refused(tmp_path):
    repository, keys = make_repository(tmp_path, now=datetime.now(UTC) - timedelta(days=30))
    device = make_device(tmp_path, repository, keys, "x86-avx2")
    with pytest.raises(UpdateError, match=r"^E_STALE"):
        install(device)


def test_an_unsigned_decision_is_refused(world, tmp_path):
    model, data, repository, keys, _ = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    signed = json.loads((tmp_path / "a" / "evidence.json").read_bytes())
    unsigned = tmp_path / "unsigned.json"
    unsigned.write_text(json.dumps({**signed, "signatures": []}))
    with pytest.raises(GateRefused, match="unsigned"):
        steps.publish(package=tmp_path / "a" / "tiny.qpkg", evidence=unsigned, repository=repository, keys=keys.folder)


def test_a_model_that_was_not_the_one_evaluated_is_refused(world, tighter, tmp_path):
    model, data, repository, keys, device = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    release(tmp_path / "b", model, data, repository, keys, version="1.1", recipe=tighter)
    with pytest.raises(GateRefused, match="evaluated"):
        steps.publish(
            package=tmp_path / "a" / "tiny.qpkg",
            evidence=tmp_path / "b" / "evidence.json",
            repository=repository,
            keys=keys.folder,
        )
    assert install(device).version == "1.1"


def test_a_package_of_another_kind_is_refused(world, tmp_path):
    model, data, repository, keys, _ = world
    release(tmp_path / "a", model, data, repository, keys, version="1.0", recipe="int8")
    (tmp_path / "not.qpkg").write_bytes(b"PK\x03\x04 this is a zip, or says so")
    with pytest.raises(PackageError):
        steps.publish(
            package=tmp_path / "not.qpkg",
            evidence=tmp_path / "a" / "evidence.json",
            repository=repository,
            keys=keys.folder,
        )
