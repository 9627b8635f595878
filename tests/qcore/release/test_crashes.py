"""Publishing on every kind of store: real processes that die anywhere or race; devices see the old or the new state."""

import multiprocessing
import signal
from pathlib import Path

import pytest
from simulators import World, about, make_world, now, package_source, run_python

from qcore.device.updater import check, install
from qcore.release.evidence import sign_decision
from qcore.release.keys import load_keys
from qcore.release.location import open_store
from qcore.release.metadata import load_trusted
from qcore.release.package import build_package
from qcore.release.proposal import Submission
from qcore.release.repository import publish_release, refresh, status

ROOT = Path(__file__).resolve().parents[3]


def test_a_release_goes_from_any_store_to_a_device(location: str, tmp_path: Path) -> None:
    world = make_world(tmp_path, location=location)
    world.publish("1.0.0")
    assert install(world.device()).version == "1.0.0"
    world.publish("1.1.0", seed=1)
    assert install(world.device()).version == "1.1.0"
    assert refresh(world.store, world.keys, now=now()) == ()
    assert {r.role: r.version for r in status(world.store, now=now())}["models-digits"] == 3


@pytest.mark.slow
def test_a_publisher_killed_after_any_durable_operation_leaves_the_old_or_the_new_state(
    location: str, tmp_path: Path
) -> None:
    world = make_world(tmp_path, location=location)
    world.publish("1.0.0")
    seen = []
    for n in range(1, 200):
        version = f"1.0.{n}"
        submission = world.submission(world.package(version, seed=n))
        before = check(world.device("watcher")).release.version
        if kill_at(world, location, submission, n) == 0:
            break
        found = check(world.device("watcher")).release.version
        assert found in (before, version)
        assert check(world.device(f"fresh-{n}")).release.version == found
        seen.append(found == version)
        publish_release(world.store, submission, world.keys, now=now())  # the next one works, and nothing is lost
        assert check(world.device("watcher")).release.version == version
    # S3: package, evidence, pointer, models, channel, snapshot, timestamp; a folder: several steps for each of them
    assert len(seen) == 8 if location.startswith("s3://") else len(seen) > 20
    assert seen == sorted(seen), "from one operation on the new state is there"
    assert set(seen) == {False, True}
    role = load_trusted(world.store, world.keys.pinned_root.read_bytes()).delegated["models-digits"]
    assert sorted(t.custom["counter"] for p, t in role.targets.items() if p.endswith(".qpkg")) == list(
        range(1, len(seen) + 3)
    )


def kill_at(world: World, location: str, submission: Submission, n: int) -> int:
    """Return the exit code of a publisher that is killed at its n-th durable operation, if it has as many."""
    evidence = world.folder / f"evidence-{n}.json"
    evidence.write_bytes(submission.evidence)
    script = str(ROOT / "tests" / "killed_publisher.py")
    done = run_python(
        ["-P", script, location, str(world.folder / "keys"), str(submission.package), str(evidence), str(n)]
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def _publish_many(folder: Path, location: str, worker: int, versions: int) -> None:
    keys = load_keys(folder / "keys")
    store = open_store(location)
    for i in range(versions):
        version = f"{worker}.{i}.0"
        source = package_source(folder / f"w{worker}", version, seed=worker * 100 + i)
        package = build_package(source, folder / f"{version}.qpkg")
        evidence = sign_decision(about(package), keys.signer("gate"))
        publish_release(store, Submission(package=package.path, evidence=evidence), keys, now=now())


@pytest.mark.slow
def test_four_writers_lose_none_of_their_releases(location: str, tmp_path: Path) -> None:
    writers, versions = 4, 8
    world = make_world(tmp_path, location=location)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_publish_many, args=(tmp_path, location, w, versions)) for w in range(writers)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(300)
    assert [w.exitcode for w in workers] == [0] * writers
    role = load_trusted(world.store, world.keys.pinned_root.read_bytes()).delegated["models-digits"]
    packages = {p: t for p, t in role.targets.items() if p.endswith(".qpkg")}
    assert set(packages) == {f"models/digits/{w}.{i}.0.qpkg" for w in range(writers) for i in range(versions)}
    assert sorted(t.custom["counter"] for t in packages.values()) == list(range(1, writers * versions + 1))
    assert check(world.device()).release.version in {f"{w}.{versions - 1}.0" for w in range(writers)}


def test_the_killed_publisher_is_killed(tmp_path: Path) -> None:
    """The loop above proves nothing if the script's count does not work."""
    world = make_world(tmp_path, location=str(tmp_path / "repo"))
    submission = world.submission(world.package())
    assert kill_at(world, str(tmp_path / "repo"), submission, 1) == -signal.SIGKILL
    assert kill_at(world, str(tmp_path / "repo"), submission, 10_000) == 0
