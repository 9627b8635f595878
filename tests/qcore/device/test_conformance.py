"""The scenarios of tuf-conformance (2.4), re-created with the repository simulator of python-tuf's source distribution.

The device's own client answers them: its limits, its fetcher interface, its high-water mark and its refusals. The
simulator is not part of the tuf wheel; pip gets the source distribution of the installed version once, into pytest's
cache. Without the package index these tests are skipped.
"""

import datetime
import importlib.util
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from simulators import COMPAT, HARDWARE
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, Targets

from qcore.device import source
from qcore.device.config import DeviceConfig
from qcore.device.updater import Offer, check
from qcore.errors import UpdateError

pytestmark = pytest.mark.slow
PACKAGE, POINTER = "models/digits/1.0.0.qpkg", "channels/stable/digits/release.json"
CUSTOM = {"counter": 1, "floor": 0, "model_sha256": "0" * 64, "compat": COMPAT.to_json(), "flash_bytes": 1000}
SAYS = {
    "schema": 1,
    "epoch": 1,
    "state": "done",
    "release": PACKAGE,
    "counter": 1,
    "permyriad": 10_000,
    "salt": "s",
    "floor": 0,
}
PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="session")
def simulator_class(request: pytest.FixtureRequest) -> Any:
    """The class RepositorySimulator."""
    cache: Any = request.config.cache
    folder = Path(cache.mkdir(f"tuf-{version('tuf')}"))
    module = folder / "repository_simulator.py"
    if not module.exists():
        command = [sys.executable, "-m", "pip", "download", f"tuf=={version('tuf')}", "--no-deps", "--no-binary", "tuf"]
        done = subprocess.run([*command, "-q", "-d", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no source distribution of tuf: {done.stderr.strip().splitlines()[-1:]}; it needs the index")
        with tarfile.open(next(folder.glob("tuf-*.tar.gz"))) as archive:
            name = f"tuf-{version('tuf')}/tests/repository_simulator.py"
            found = archive.extractfile(name)
            assert found is not None
            module.write_bytes(found.read())
    spec = importlib.util.spec_from_file_location("repository_simulator", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["repository_simulator"] = loaded
    spec.loader.exec_module(loaded)
    return loaded.RepositorySimulator


class Repository:
    """A simulated repository with one release, and a device that follows it."""

    def __init__(self, simulator: Any, folder: Path) -> None:
        self.sim = simulator
        for role, path in (("models-digits", "models/digits/*"), ("channel-stable", "channels/stable/*/*")):
            self.delegate(role, path)
        simulator.add_target("models-digits", b"package", PACKAGE)
        simulator.add_target("channel-stable", b"pointer", POINTER)
        self.role("models-digits").targets[PACKAGE].unrecognized_fields["custom"] = dict(CUSTOM)
        self.role("channel-stable").targets[POINTER].unrecognized_fields["custom"] = dict(SAYS)
        simulator.targets.version += 1
        simulator.update_snapshot()
        root = folder / "root.json"
        root.write_bytes(simulator.signed_roots[0])
        self.device = DeviceConfig(
            device_id="dev-1",
            hardware=HARDWARE,
            family="digits",
            repository="https://example.com",
            root=root,
            state_dir=folder / "state",
        )

    def delegate(self, role: str, path: str, delegator: str = "targets") -> None:
        targets = Targets(expires=self.sim.safe_expiry)
        self.sim.add_delegation(delegator, DelegatedRole(role, [], 1, True, [path]), targets)

    def role(self, name: str) -> Any:
        return self.sim.md_delegates[name].signed

    def publish_root(self) -> None:
        self.sim.root.version += 1
        self.sim.publish_root()

    def check(self) -> Offer:
        return check(self.device)

    def refuses(self, code: str) -> None:
        with pytest.raises(UpdateError, match=rf"^{code}: "):
            self.check()


@pytest.fixture
def repository(simulator_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(simulator_class(), tmp_path)
    monkeypatch.setattr(source, "_access", lambda _: (made.sim, "https://example.com"))
    return made


def test_init_and_refresh(repository: Repository) -> None:
    assert repository.check().release.version == "1.0.0"
    assert repository.check().release.version == "1.0.0"


def expired(name: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        signed = getattr(repository.sim, name)
        signed.expires = PAST
        if name == "root":
            repository.publish_root()
        else:
            signed.version += 1
            repository.sim.update_snapshot() if name == "targets" else None
            repository.sim.update_timestamp() if name == "snapshot" else None

    return change


@pytest.mark.parametrize("first", [True, False], ids=["new device", "known device"])
@pytest.mark.parametrize("name", ["root", "timestamp", "snapshot", "targets"])
def test_expired_metadata_of_any_top_role_is_refused(repository: Repository, name: str, first: bool) -> None:
    if not first:
        repository.check()
    expired(name)(repository)
    repository.refuses("E_STALE")


def test_an_expired_role_in_the_middle_of_the_root_chain_is_no_harm(repository: Repository) -> None:
    good = repository.sim.root.expires
    repository.sim.root.expires = PAST
    repository.publish_root()
    repository.sim.root.expires = good
    repository.publish_root()
    assert repository.check().release.version == "1.0.0"


@pytest.mark.parametrize("role", ["models-digits", "channel-stable"])
def test_an_expired_delegated_role_is_refused(repository: Repository, role: str) -> None:
    repository.role(role).expires = PAST
    repository.role(role).version += 1
    repository.sim.update_snapshot()
    repository.refuses("E_STALE")


def test_timestamp_rollback(repository: Repository) -> None:
    repository.sim.timestamp.version = 5
    repository.check()
    repository.sim.timestamp.version = 4
    repository.refuses("E_ROLLBACK")


def test_snapshot_rollback_in_the_timestamp(repository: Repository) -> None:
    repository.sim.snapshot.version = 5
    repository.sim.update_timestamp()
    repository.check()
    repository.sim.snapshot.version = 4
    repository.sim.update_timestamp()
    repository.refuses("E_ROLLBACK")


@pytest.mark.parametrize("role", ["targets", "models-digits", "channel-stable"])
def test_targets_rollback_in_the_snapshot(repository: Repository, role: str) -> None:
    signed = repository.sim.targets if role == "targets" else repository.role(role)
    signed.version = 5
    repository.sim.update_snapshot()
    repository.check()
    signed.version = 4
    repository.sim.update_snapshot()
    repository.refuses("E_ROLLBACK")


@pytest.mark.parametrize("role", ["targets", "models-digits", "channel-stable"])
def test_targets_role_removal_from_the_snapshot(repository: Repository, role: str) -> None:
    repository.check()
    del repository.sim.snapshot.meta[f"{role}.json"]
    repository.sim.snapshot.version += 1
    repository.sim.update_timestamp()
    repository.refuses("E_METADATA")


@pytest.mark.parametrize("role", ["targets", "models-digits"])
def test_targets_version_mismatch_with_the_snapshot(repository: Repository, role: str) -> None:
    signed = repository.sim.targets if role == "targets" else repository.role(role)
    repository.sim.update_snapshot()
    signed.version += 3
    repository.refuses("E_ROLLBACK")


def test_snapshot_version_mismatch_with_the_timestamp(repository: Repository) -> None:
    repository.sim.update_timestamp()
    repository.sim.snapshot.version += 3
    repository.refuses("E_ROLLBACK")


def test_a_timestamp_of_equal_version_changes_nothing(repository: Repository) -> None:
    repository.check()
    repository.sim.timestamp.snapshot_meta.version = 100  # only the same version would point there
    assert repository.check().release.version == "1.0.0"


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets"])
def test_a_wrong_hash_is_refused(repository: Repository, name: str) -> None:
    repository.sim.compute_metafile_hashes_length = True
    repository.sim.update_snapshot()
    meta = repository.sim.timestamp.snapshot_meta
    if name == "snapshot":
        meta.hashes = {"sha256": "0" * 64}
    elif name == "targets":
        repository.sim.snapshot.meta["targets.json"].hashes = {"sha256": "0" * 64}
        repository.sim.compute_metafile_hashes_length = False
        repository.sim.timestamp.snapshot_meta = MetaFile(repository.sim.snapshot.version)
    if name == "timestamp":
        assert repository.check().release.version == "1.0.0"
    else:
        repository.refuses("E_HASH")


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets", "models-digits", "channel-stable"])
def test_metadata_signed_by_nobody_is_refused(repository: Repository, name: str) -> None:
    repository.sim.signers[name].clear()
    repository.refuses("E_UNSIGNED")


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets", "models-digits", "channel-stable"])
def test_metadata_signed_by_another_key_is_refused(repository: Repository, name: str) -> None:
    repository.sim.signers[name].clear()
    repository.sim.add_signer(name, CryptoSigner.generate_ecdsa())
    repository.refuses("E_UNSIGNED")


def test_a_root_that_its_predecessor_did_not_sign_is_refused(repository: Repository) -> None:
    repository.check()
    repository.sim.signers["root"].clear()
    repository.sim.add_signer("root", CryptoSigner.generate_ecdsa())
    repository.publish_root()
    repository.refuses("E_UNSIGNED")


def test_root_key_rotation_signed_by_old_and_new(repository: Repository) -> None:
    repository.check()
    for _ in range(3):
        signer = CryptoSigner.generate_ecdsa()
        old = repository.sim.root.roles["root"].keyids[0]
        repository.sim.root.add_key(signer.public_key, "root")
        repository.sim.root.revoke_key(old, "root")
        repository.sim.add_signer("root", signer)
        repository.publish_root()
        del repository.sim.signers["root"][old]
    assert repository.check().release.version == "1.0.0"
    fresh = Path(repository.device.root)
    assert fresh.read_bytes() == repository.sim.signed_roots[0]


def test_root_key_rotation_signed_by_the_new_key_alone_is_refused(repository: Repository) -> None:
    signer = CryptoSigner.generate_ecdsa()
    old = repository.sim.root.roles["root"].keyids[0]
    repository.sim.root.add_key(signer.public_key, "root")
    repository.sim.root.revoke_key(old, "root")
    repository.sim.signers["root"].clear()
    repository.sim.add_signer("root", signer)
    repository.publish_root()
    repository.refuses("E_UNSIGNED")


def test_a_root_threshold_that_is_not_met_is_refused(repository: Repository) -> None:
    repository.sim.root.add_key(CryptoSigner.generate_ecdsa().public_key, "root")
    repository.sim.root.roles["root"].threshold = 2
    repository.publish_root()
    repository.refuses("E_UNSIGNED")


def test_a_root_of_a_wrong_version_is_refused(repository: Repository) -> None:
    repository.sim.root.version += 2
    repository.sim.publish_root()  # lies where version 2 is asked for
    repository.refuses("E_METADATA|E_ROLLBACK")


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets"])
def test_key_rotation_of_a_top_role(repository: Repository, name: str) -> None:
    repository.check()
    repository.sim.rotate_keys(name)
    repository.publish_root()
    for each in ("targets", "snapshot", "timestamp"):
        getattr(repository.sim, each).version += 1
    repository.sim.update_snapshot()
    assert repository.check().release.version == "1.0.0"


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets"])
def test_a_role_whose_key_root_dropped_is_refused(repository: Repository, name: str) -> None:
    repository.check()
    old = dict(repository.sim.signers[name])
    repository.sim.rotate_keys(name)
    repository.publish_root()
    repository.sim.signers[name] = old
    getattr(repository.sim, name).version += 1
    repository.sim.update_snapshot() if name == "targets" else repository.sim.update_timestamp()
    repository.refuses("E_UNSIGNED")


@pytest.mark.parametrize("name", ["timestamp", "snapshot"])
def test_fast_forward_recovery_by_new_keys(repository: Repository, name: str) -> None:
    getattr(repository.sim, name).version = 99_999
    repository.sim.update_timestamp() if name == "snapshot" else None
    repository.check()
    getattr(repository.sim, name).version = 1
    repository.sim.rotate_keys("timestamp")
    repository.sim.rotate_keys("snapshot")
    repository.publish_root()
    repository.sim.update_timestamp()
    repository.sim.timestamp.version = 1
    assert repository.check().release.version == "1.0.0"


def test_duplicate_keys_do_not_meet_a_threshold(repository: Repository) -> None:
    role = repository.sim.targets.delegations.roles["models-digits"]
    role.threshold = 2
    repository.sim.targets.version += 1
    repository.sim.update_snapshot()
    repository.refuses("E_UNSIGNED")


def test_a_long_root_chain_is_followed_and_an_endless_one_is_not(repository: Repository) -> None:
    for _ in range(20):
        repository.publish_root()
    assert repository.check().release.version == "1.0.0"


def test_a_role_that_two_parents_delegate_is_verified_against_each(repository: Repository) -> None:
    """The diamond: `models-digits` is delegated by targets with its key and by another role with another key."""
    repository.check()
    repository.delegate("other", "models/other/*")
    fields = DelegatedRole("models-digits", [], 1, True, ["models/other/*"])
    stranger = CryptoSigner.generate_ecdsa()
    other = repository.role("other")
    other.delegations = Delegations({}, {"models-digits": fields})
    other.add_key(stranger.public_key, "models-digits")
    repository.sim.targets.version += 1
    repository.sim.update_snapshot()
    assert repository.check().release.version == "1.0.0"
    opened = source.open_source(repository.device)
    assert opened.updater.get_targetinfo(PACKAGE) is not None
    with pytest.raises(RepositoryError):
        opened.updater.get_targetinfo("models/other/1.qpkg")


def test_metadata_longer_than_the_limits_is_refused(repository: Repository) -> None:
    repository.sim.timestamp.unrecognized_fields["x"] = "x" * 20_000
    repository.refuses("E_HASH")


def test_a_target_outside_of_its_delegation_is_not_found(repository: Repository) -> None:
    repository.role("channel-stable").targets[POINTER].custom["release"] = "models/digits/2.0.0.qpkg"
    repository.sim.add_target("channel-stable", b"evil", "models/digits/2.0.0.qpkg")
    repository.role("channel-stable").version += 1
    repository.sim.update_snapshot()
    repository.refuses("E_UNSIGNED")
