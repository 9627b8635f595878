"""The repository: what is published is measured, signed by both keys, whole after any crash, and lost in no race."""

import multiprocessing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from simulators import (
    DATA,
    FAMILY,
    POLICY,
    Crash,
    CrashingStore,
    World,
    about,
    decision,
    make_world,
    now,
    package_source,
)
from tuf.api.metadata import Metadata, Targets

from qcore.device.updater import check
from qcore.errors import GateRefused, PackageError, QcoreError, ReleaseError
from qcore.release.approval import Approval, Grant
from qcore.release.evidence import sign_decision
from qcore.release.keys import KeyRing, create_keys, load_keys
from qcore.release.metadata import load_trusted
from qcore.release.package import build_package
from qcore.release.proposal import Submission
from qcore.release.repository import (
    approve,
    init_repository,
    publish_release,
    refresh,
    status,
)
from qcore.release.store import DirectoryStore


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def published(world: World) -> dict[str, bytes]:
    return {key: world.store.get(key).data for key in world.store.list("")}  # type: ignore[union-attr]  # just listed


def without(keys: KeyRing, *names: str) -> KeyRing:
    return replace(keys, signers={n: s for n, s in keys.signers.items() if n not in names})


def test_the_roles_have_the_keys_thresholds_and_lifetimes_of_the_design(world: World) -> None:
    at = now()
    world.publish()
    rows = {r.role: r for r in status(world.store, now=at)}
    assert {n: (r.keys, r.threshold) for n, r in rows.items()} == {
        "root": (3, 2),
        "targets": (3, 2),
        "models-digits": (2, 2),
        "channel-stable": (1, 1),
        "snapshot": (1, 1),
        "timestamp": (1, 1),
    }
    days = {n: round(r.remaining / timedelta(days=1)) for n, r in rows.items()}
    assert days == {
        "root": 365,
        "targets": 365,
        "models-digits": 90,
        "channel-stable": 30,
        "snapshot": 7,
        "timestamp": 2,
    }


def test_a_release_is_what_the_signed_metadata_say(world: World) -> None:
    release = world.publish("1.0.0")
    assert (release.counter, release.target) == (1, "models/digits/1.0.0.qpkg")
    assert world.object_path(release).stat().st_size == release.size_bytes
    assert world.publish("1.1.0", seed=1).counter == 2


def test_publishing_the_same_bytes_again_changes_nothing(world: World) -> None:
    release = world.publish()
    before = published(world)
    again = publish_release(world.store, world.submission(world.package()), world.keys, now=now())
    assert again == release
    assert published(world) == before


def test_a_retry_of_an_old_publish_does_not_turn_the_channel_back(world: World) -> None:
    first = world.submission(world.package("1.0.0"))
    publish_release(world.store, first, world.keys, now=now())
    world.publish("1.1.0", seed=1)
    publish_release(world.store, first, world.keys, now=now())
    assert check(world.device()).release.version == "1.1.0"


def test_a_version_is_never_published_with_other_bytes(world: World) -> None:
    world.publish("1.0.0")
    before = published(world)
    with pytest.raises(ReleaseError, match=r"digits 1\.0\.0 is published already with other bytes"):
        world.publish("1.0.0", seed=1)
    assert published(world) == before


def refused(world: World, submission: Submission, keys: KeyRing | None = None) -> QcoreError:
    """Return the refusal after nothing at all was written."""
    before = published(world)
    with pytest.raises(QcoreError) as e:
        publish_release(world.store, submission, keys or world.keys, now=now())
    assert published(world) == before
    assert "\n" not in str(e.value)
    return e.value


def test_an_unsigned_decision_is_refused(world: World) -> None:
    package = world.package()
    decision_json = str(decision(package.manifest.model_sha256).to_json()).replace("'", '"').encode()
    for evidence in (decision_json, b'{"schema": "qcore.decision/1"}'):
        error = refused(world, Submission(package=package.path, evidence=evidence))
        assert isinstance(error, GateRefused)
    assert "unsigned" in str(error)


def test_a_model_that_was_not_the_one_evaluated_is_refused(world: World) -> None:
    evidence = world.evidence(world.package("1.0.0", seed=0))
    error = refused(world, Submission(package=world.package("1.0.0", seed=1).path, evidence=evidence))
    assert isinstance(error, GateRefused)
    assert "not the one evaluated" in str(error)


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_a_model_that_did_not_pass_is_refused(world: World, outcome: str) -> None:
    package = world.package()
    evidence = world.evidence(package, outcome)  # type: ignore[arg-type]  # parametrized literal
    assert f"gate outcome is {outcome}" in str(refused(world, Submission(package=package.path, evidence=evidence)))


@pytest.mark.parametrize("first", [True, False], ids=["first release", "later release"])
def test_the_publisher_cannot_vouch_for_a_model(world: World, first: bool) -> None:
    if not first:
        world.publish("0.9.0", seed=5)
    package = world.package()
    evidence = sign_decision(about(package), world.keys.signer("publisher"))
    error = refused(world, Submission(package=package.path, evidence=evidence))
    assert isinstance(error, GateRefused)
    assert "unknown key" in str(error)


def test_gate_key_and_publisher_key_are_both_needed(world: World) -> None:
    world.publish("0.9.0", seed=5)
    submission = world.submission(world.package())
    strangers = create_keys(world.folder / "strangers", ["stable"])
    for name in ("gate", "publisher"):
        assert f"{name}.pem is missing" in str(refused(world, submission, without(world.keys, name)))
        swapped = replace(world.keys, signers={**world.keys.signers, name: strangers.signer(name)})
        with pytest.raises(ReleaseError, match="models-digits: the keys held here are not those"):
            publish_release(world.store, submission, swapped, now=now())
    assert check(world.device()).release.version == "0.9.0"


def test_a_new_family_needs_the_offline_keys_once(world: World) -> None:
    online = without(world.keys, "root1", "root2", "root3")
    submission = world.submission(world.package())
    assert "needs the offline root keys once (0 of 2 held)" in str(refused(world, submission, online))
    approve(
        world.store,
        world.keys,
        Grant(family=FAMILY, approval=Approval(policies={POLICY: "any"}, data=(DATA,))),
        now=now(),
    )
    assert publish_release(world.store, submission, online, now=now()).counter == 1


def test_unknown_channel_and_broken_package_are_refused(world: World) -> None:
    submission = world.submission(world.package())
    error = refused(world, replace(submission, channel="beta"))
    assert "channel 'beta' does not exist here; allowed: stable" in str(error)
    broken = world.folder / "broken.qpkg"
    broken.write_bytes(submission.package.read_bytes()[:-600])
    assert isinstance(refused(world, replace(submission, package=broken)), PackageError)
    assert isinstance(refused(world, replace(submission, package=world.folder / "none.qpkg")), PackageError)


def test_one_of_three_root_keys_makes_no_repository(tmp_path: Path) -> None:
    keys = create_keys(tmp_path / "keys", ["stable"])
    store = DirectoryStore(folder=tmp_path / "repo")
    with pytest.raises(ReleaseError, match="needs the root keys"):
        init_repository(store, without(keys, "root1", "root2"), ["stable"], now=now())
    assert store.list("") == []


def test_a_repository_is_made_once_and_only_trusted_through_the_pinned_root(world: World) -> None:
    with pytest.raises(ReleaseError, match="holds a repository already"):
        init_repository(world.store, world.keys, ["stable"], now=now())
    world.keys.pinned_root.unlink()
    with pytest.raises(ReleaseError, match=r"trusted root .* cannot be read"):
        world.publish()
    other = make_world(world.folder / "other")
    world.keys.pinned_root.write_bytes(other.keys.pinned_root.read_bytes())
    with pytest.raises(ReleaseError, match="does not verify"):
        world.publish()


def test_an_empty_store_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="no repository in this store"):
        status(DirectoryStore(folder=tmp_path), now=now())


@pytest.mark.parametrize("victim", ["timestamp.json", "2.snapshot.json", "2.targets.json", "2.models-digits.json"])
def test_a_changed_store_is_noticed_before_it_is_built_on(world: World, victim: str) -> None:
    world.publish()
    path = world.store.folder / "metadata" / victim
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version":', b'"version": ', 1).replace(b"20", b"21", 1))
    with pytest.raises(ReleaseError, match="does not verify"):
        world.publish("1.1.0", seed=1)


def test_a_target_object_with_other_bytes_stops_the_publish(world: World) -> None:
    package = world.package()
    key = f"targets/models/digits/{package.sha256}.1.0.0.qpkg"
    world.store.put_if_absent(key, b"planted")
    with pytest.raises(ReleaseError, match="exists with other bytes"):
        publish_release(world.store, world.submission(package), world.keys, now=now())


def test_a_publisher_that_dies_after_any_write_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.publish("1.0.0")
    seen = set()
    for lives in range(1, 100):
        version = f"1.0.{lives}"
        submission = world.submission(world.package(version, seed=lives))
        before = check(world.device(f"old-{lives}")).release.version
        try:
            publish_release(CrashingStore(world.store, lives), submission, world.keys, now=now())
        except Crash:
            found = check(world.device(f"new-{lives}")).release.version
            assert found in (before, version)
            seen.add(found == version)
            publish_release(world.store, submission, world.keys, now=now())  # the next one works, and nothing is lost
            assert check(world.device(f"old-{lives}")).release.version == version
        else:
            break
    assert lives == 9  # package, evidence, pointer, record, models, channel, snapshot, timestamp
    assert seen == {True, False}


def test_a_repository_half_made_is_completed_by_the_next_run(tmp_path: Path) -> None:
    keys = create_keys(tmp_path / "keys", ["stable"])
    for lives in range(1, 100):
        store = DirectoryStore(folder=tmp_path / f"repo-{lives}")
        keys.pinned_root.unlink(missing_ok=True)
        try:
            init_repository(CrashingStore(store, lives), keys, ["stable"], now=now() - timedelta(days=1))
        except Crash:
            if store.get("metadata/timestamp.json") is None:
                root = init_repository(store, keys, ["stable"], now=now())
                assert load_trusted(store, root).timestamp.version == 1
        else:
            break
    assert lives > 4


def _publish_many(folder: Path, worker: int, versions: int) -> None:
    keys = load_keys(folder / "keys")
    store = DirectoryStore(folder=folder / "repo")
    for i in range(versions):
        version = f"{worker}.{i}.0"
        source = package_source(folder / f"w{worker}", version, seed=worker * 100 + i)
        package = build_package(source, folder / f"{version}.qpkg")
        evidence = sign_decision(about(package), keys.signer("gate"))
        publish_release(store, Submission(package=package.path, evidence=evidence), keys, now=now())


def test_publishers_that_race_lose_no_release(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_publish_many, args=(tmp_path, w, 3)) for w in (1, 2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert [w.exitcode for w in workers] == [0, 0]
    role = load_trusted(world.store, world.keys.pinned_root.read_bytes()).delegated["models-digits"]
    packages = {p: t for p, t in role.targets.items() if p.endswith(".qpkg")}
    assert set(packages) == {f"models/digits/{w}.{i}.0.qpkg" for w in (1, 2) for i in range(3)}
    assert sorted(t.custom["counter"] for t in packages.values()) == [1, 2, 3, 4, 5, 6]


def test_refresh_signs_what_has_lived_an_eighth_and_nothing_else(world: World) -> None:
    world.publish()
    assert refresh(world.store, world.keys, now=now() + timedelta(hours=5)) == ()
    assert refresh(world.store, world.keys, now=now() + timedelta(hours=7)) == ("timestamp",)
    assert set(refresh(world.store, world.keys, now=now() + timedelta(days=1))) == {"snapshot", "timestamp"}
    renewed = refresh(world.store, world.keys, now=now() + timedelta(days=20))
    assert set(renewed) == {"channel-stable", "models-digits", "snapshot", "timestamp"}
    left = {r.role: r.remaining for r in status(world.store, now=now() + timedelta(days=20))}
    assert left["models-digits"] > timedelta(days=89)


def test_refresh_brings_an_expired_repository_back(tmp_path: Path) -> None:
    world = make_world(tmp_path, now() - timedelta(days=40))
    assert min(r.remaining for r in status(world.store, now=now())) < timedelta(0)
    refresh(world.store, world.keys, now=now())
    assert min(r.remaining for r in status(world.store, now=now())) > timedelta(days=1)


def test_refresh_with_online_keys_only_leaves_what_it_cannot_sign(world: World) -> None:
    world.publish()
    online = without(world.keys, "root1", "root2", "root3", "gate")
    renewed = refresh(world.store, online, now=now() + timedelta(days=60))
    assert set(renewed) == {"channel-stable", "snapshot", "timestamp"}


def test_an_expired_root_stops_publishing(world: World) -> None:
    with pytest.raises(ReleaseError, match="root role expired"):
        refresh(world.store, world.keys, now=now() + timedelta(days=400))


def test_a_time_without_zone_is_refused(world: World) -> None:
    with pytest.raises(ReleaseError, match="has no zone"):
        status(world.store, now=now().replace(tzinfo=None))


def test_metadata_are_small(world: World) -> None:
    world.publish()
    sizes = {k: len(d) for k, d in published(world).items() if k.startswith("metadata/")}
    assert sizes["metadata/timestamp.json"] <= 500
    cold = ("timestamp.json", "2.snapshot.json", "2.targets.json", "2.channel-stable.json", "2.models-digits.json")
    assert sum(sizes[f"metadata/{name}"] for name in cold) <= 5000


def test_one_key_never_counts_twice(world: World) -> None:
    world.publish()
    path = world.store.folder / "metadata" / "2.models-digits.json"
    role = Metadata[Targets].from_bytes(path.read_bytes())
    trusted = load_trusted(world.store, world.keys.pinned_root.read_bytes())
    role.signatures.clear()
    for _ in range(2):
        role.sign(world.keys.signer("publisher"), append=True)
    result = trusted.targets.get_verification_result("models-digits", role.signed_bytes, role.signatures)
    assert not result.verified
