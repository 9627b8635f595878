"""The repository's life after the first release: approval, co-signing, taking back, new keys, records, bundles."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulators import DATA, FAMILY, POLICY, Crash, CrashingStore, World, about, make_world, now
from tuf.api.metadata import Metadata, Root

from qcore import steps
from qcore.device.config import bundle_address
from qcore.device.updater import check, install, rollback, status
from qcore.errors import GateRefused, QcoreError, ReleaseError, UpdateError
from qcore.release.approval import Against, Approval, Grant
from qcore.release.evidence import sign_decision
from qcore.release.keys import KeyRing, create_keys, fresh_key, load_keys
from qcore.release.metadata import load_trusted
from qcore.release.proposal import Submission, cosign_proposal, inspect, propose, submit
from qcore.release.records import AUDIT, read_records, record_key
from qcore.release.repository import approve, publish_release, refresh
from qcore.release.repository import status as roles
from qcore.release.rotation import Renewal, rotate_delegated, rotate_root
from qcore.release.store import ObjectStore
from qcore.release.withdrawal import Yank, revoke, yank
from qcore.steps import repository as life
from qcore.steps.auditing import audit
from qcore.waiver import format_time

V1, V2 = (f"models/{FAMILY}/{v}.qpkg" for v in ("1.0.0", "1.1.0"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world with 1.0.0 and 1.1.0 published."""
    world = make_world(tmp_path)
    world.publish("1.0.0")
    world.publish("1.1.0", seed=1)
    return world


def part(world: World, folder: str, *names: str) -> KeyRing:
    """Return the ring of a machine that holds only the keys `names`, with public halves of gate and publisher."""
    at = world.folder / folder
    at.mkdir()
    shutil.copy(world.keys.pinned_root, at)
    for name in names:
        shutil.copy(world.keys.folder / f"{name}.pem", at)
    return load_keys(at)


def everything(world: World) -> dict[str, bytes]:
    return {key: found.data for key in world.store.list("") if (found := world.store.get(key))}


def records(world: World) -> Sequence[str]:
    trusted = load_trusted(world.store, world.keys.pinned_root.read_bytes())
    return [r.action for r in read_records(world.store, trusted.snapshot.unrecognized_fields[AUDIT])]


# What is approved


def grant(policy: str, data: tuple[str, ...] = (), against: Against = "any") -> Grant:
    return Grant(family=FAMILY, approval=Approval(policies={policy: against}, data=data))


def submission(world: World, **changes: object) -> Submission:
    package = world.package("1.2.0", seed=2)
    evidence = sign_decision(replace(about(package), **changes), world.keys.signer("gate"))  # type: ignore[arg-type]
    return Submission(package=package.path, evidence=evidence)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy_sha256": "9" * 64}, "policy 999999999999 is not approved"),
        ({"data_sha256": "9" * 64}, "evaluation data 999999999999 is not approved"),
        ({"decided": None}, "does not say when"),
        ({"decided": format_time(now() - timedelta(days=31))}, "at most 30 days"),
        ({"decided": format_time(now() + timedelta(days=1))}, "not of the future"),
    ],
)
def test_evidence_by_other_rules_on_other_data_or_too_old_is_refused_and_nothing_is_written(
    world: World, changes: dict[str, object], reason: str
) -> None:
    before = everything(world)
    with pytest.raises(GateRefused, match=reason):
        publish_release(world.store, submission(world, **changes), world.keys, now=now())
    assert everything(world) == before


def test_what_the_offline_keys_approve_is_published(world: World) -> None:
    approve(
        world.store,
        world.keys,
        grant("9" * 64, (DATA,)),
        now=now(),
    )
    done = publish_release(world.store, submission(world, policy_sha256="9" * 64), world.keys, now=now())
    assert done.version == "1.2.0"
    online = part(world, "online", "publisher", "snapshot", "timestamp", "channel-stable")
    with pytest.raises(ReleaseError, match="needs the offline root keys"):
        approve(world.store, online, grant("8" * 64, ()), now=now())


def test_an_approval_is_taken_back(world: World) -> None:
    week = Approval(policies={"9" * 64: "any"}, data=(DATA,), max_age=timedelta(days=7))
    approve(world.store, world.keys, Grant(family=FAMILY, approval=week, only=True), now=now())
    with pytest.raises(GateRefused, match="policy 333333333333 is not approved"):
        world.publish("1.2.0", seed=2)
    old = {"policy_sha256": "9" * 64, "decided": format_time(now() - timedelta(days=8))}
    with pytest.raises(GateRefused, match="at most 7 days"):
        publish_release(world.store, submission(world, **old), world.keys, now=now())
    more = Approval(policies={POLICY: "any"}, data=())
    assert approve(world.store, world.keys, Grant(family=FAMILY, approval=more), now=now()).max_age == timedelta(days=7)


def test_where_a_policy_asks_for_the_served_model_another_champion_is_refused(world: World) -> None:
    approve(
        world.store,
        world.keys,
        grant(POLICY, (DATA,), "served"),
        now=now(),
    )
    with pytest.raises(GateRefused, match="compares with what is served"):
        publish_release(world.store, submission(world), world.keys, now=now())
    served = world.package("1.1.0", seed=1)
    done = submission(world, champion_sha256=served.manifest.model_sha256)
    assert publish_release(world.store, done, world.keys, now=now()).version == "1.2.0"


# The co-signer


def test_three_machines_publish_together_and_none_holds_the_keys_of_another(world: World) -> None:
    gate = part(world, "gate", "gate")
    publisher = part(world, "publisher", "publisher", "snapshot", "timestamp", "channel-stable")
    package = world.package("1.2.0", seed=2)
    sent = Submission(package=package.path, evidence=world.evidence(package))
    with pytest.raises(ReleaseError, match=r"gate\.pem is missing"):
        publish_release(world.store, sent, publisher, now=now())
    proposal = propose(world.store, publisher, FAMILY, inspect(sent), now=now())
    signed = cosign_proposal(world.store, gate, proposal, inspect(sent), now=now())
    for _ in range(2):  # a retry of the task
        release = publish_release(world.store, replace(sent, cosigned=signed), publisher, now=now())
    assert (release.version, release.counter) == ("1.2.0", 3)
    assert install(world.device()).version == "1.2.0"


def test_the_co_signer_signs_nothing_else_and_a_stale_role_is_not_submitted(world: World) -> None:
    gate = part(world, "gate", "gate")
    publisher = part(world, "publisher", "publisher", "snapshot", "timestamp", "channel-stable")
    package, other = world.package("1.2.0", seed=2), world.package("1.3.0", seed=3)
    sent = Submission(package=package.path, evidence=world.evidence(package))
    foreign = Submission(package=other.path, evidence=world.evidence(other))
    proposal = propose(world.store, publisher, FAMILY, inspect(sent), now=now())
    with pytest.raises(GateRefused, match="does not co-sign"):
        cosign_proposal(world.store, gate, proposal, inspect(foreign), now=now())
    with pytest.raises(ReleaseError, match="not a proposed role"):
        cosign_proposal(world.store, gate, b"{}", inspect(sent), now=now())
    signed = cosign_proposal(world.store, gate, proposal, inspect(sent), now=now())
    with pytest.raises(ReleaseError, match="is not version"):
        publish_release(world.store, replace(foreign, cosigned=signed), publisher, now=now())
    world.publish("1.4.0", seed=4)
    with pytest.raises(ReleaseError, match="run `qcore repo cosign` again"):
        publish_release(world.store, replace(sent, cosigned=signed), publisher, now=now())
    unsigned = propose(world.store, publisher, FAMILY, inspect(sent), now=now())
    with pytest.raises(ReleaseError, match="keys held here are not those"):
        publish_release(world.store, replace(sent, cosigned=unsigned), publisher, now=now())


def test_a_refresh_is_co_signed_too(world: World) -> None:
    gate = part(world, "gate", "gate")
    publisher = part(world, "publisher", "publisher", "snapshot", "timestamp", "channel-stable")
    at = now() + timedelta(days=20)
    refresh(world.store, publisher, now=at)
    signed = cosign_proposal(world.store, gate, propose(world.store, publisher, FAMILY, None, now=at), None, now=at)
    version = submit(world.store, publisher, signed, FAMILY, now=at)
    left = {r.role: r.remaining for r in roles(world.store, now=at)}
    assert left[f"models-{FAMILY}"] > timedelta(days=89)
    assert submit(world.store, publisher, signed, FAMILY, now=at) == version


# Taking back


def test_a_yanked_release_spreads_no_further_and_does_not_come_back_by_a_retry(world: World) -> None:
    had_it = world.device("had-it")
    install(had_it)
    done = yank(world.store, world.keys, Yank(release=V2), now=now())
    assert (done.channels, done.instead) == (("stable",), {"stable": None})
    before = everything(world)
    yank(world.store, world.keys, Yank(release=V2), now=now())
    assert everything(world) == before
    with pytest.raises(UpdateError, match=r"^E_NO_RELEASE"):
        install(world.device("new"))
    assert install(had_it).version == "1.1.0"
    with pytest.raises(ReleaseError, match="was yanked"):
        world.publish("1.1.0", seed=1)
    world.publish("1.2.0", seed=2)
    assert install(world.device("new")).version == "1.2.0"


def test_a_channel_goes_back_to_an_older_release(world: World) -> None:
    install(world.device())
    yank(world.store, world.keys, Yank(release=V2, to=V1), now=now())
    done = install(world.device())
    assert (done.version, done.epoch) == ("1.0.0", 3)
    with pytest.raises(ReleaseError, match="cannot be offered"):
        yank(world.store, world.keys, Yank(release=V1, to=V2), now=now())
    with pytest.raises(ReleaseError, match=r"published of digits: 1\.0\.0, 1\.1\.0"):
        yank(world.store, world.keys, Yank(release="models/digits/7.qpkg"), now=now())


def test_a_revoked_release_is_refused_by_every_device_also_on_the_way_back(world: World) -> None:
    config = world.device()
    yank(world.store, world.keys, Yank(release=V2, to=V1), now=now())
    install(config)
    done = revoke(world.store, world.keys, V1, now=now())
    assert (done.floor, done.instead) == (2, {"stable": None})
    with pytest.raises(UpdateError, match=r"^E_ROLLBACK: .*below the floor 2"):
        install(config)
    assert status(config)["revoked"] is True
    world.publish("1.2.0", seed=2)
    assert install(config).version == "1.2.0"
    assert status(config)["revoked"] is False
    with pytest.raises(UpdateError, match=r"^E_ROLLBACK: .*is revoked"):
        rollback(config)
    before = everything(world)
    revoke(world.store, world.keys, V1, now=now())
    assert everything(world) == before
    with pytest.raises(ReleaseError, match="is revoked"):
        world.publish("1.0.0")


def test_revoking_needs_the_gate_and_the_publisher(world: World) -> None:
    for held in ("gate", "publisher"):
        keys = part(world, f"only {held}", held, "snapshot", "timestamp", "channel-stable")
        with pytest.raises(ReleaseError, match="is missing"):
            revoke(world.store, keys, V2, now=now())


# New keys


def rotate(world: World, name: str, **options: object) -> KeyRing:
    life.rotate(repository=world.store.folder, keys=world.keys.folder, name=name, **options)  # type: ignore[arg-type]
    return load_keys(world.keys.folder)


@pytest.mark.parametrize("name", ["gate", "publisher", "channel-stable"])
def test_a_delegated_key_is_replaced_in_one_commit(world: World, name: str) -> None:
    install(world.device())
    old = world.keys
    fresh = rotate(world, name)
    assert fresh.signer(name).public_key.keyid != old.signer(name).public_key.keyid
    assert check(world.device()).action == "current"
    with pytest.raises(QcoreError):
        publish_release(world.store, submission(world), old, now=now())
    changed = World(folder=world.folder, store=world.store, keys=fresh)
    changed.publish("1.3.0", seed=3)
    assert install(world.device()).version == "1.3.0"
    assert audit(repository=world.store.folder, root=world.keys.pinned_root, target=V1).sound


def test_evidence_of_a_stolen_gate_key_no_longer_counts(world: World) -> None:
    rotate(world, "gate", compromised=True)
    found = audit(repository=world.store.folder, root=world.keys.pinned_root, target=V1)
    assert {f.what: f.state for f in found.findings}["evidence"] == "does not fit"


@pytest.mark.parametrize("name", ["timestamp", "snapshot"])
def test_a_top_key_is_replaced_with_an_overlap_that_old_and_new_machines_survive(world: World, name: str) -> None:
    others = part(world, "others", "snapshot", "timestamp", "channel-stable")
    stale = world.device("stale")
    install(stale)
    fresh = rotate(world, name)
    assert len(fresh.for_role(name, trusted_root(world))) == 2
    refresh(world.store, others, now=now() + timedelta(days=1))  # a machine that has the old key alone
    assert check(stale).action == "current"
    refresh(world.store, fresh, now=now() + timedelta(days=2))
    rotate(world, name, finish=True)
    fresh = load_keys(world.keys.folder)
    assert [len(trusted_root(world).roles[name].keyids), len(fresh.for_role(name, trusted_root(world)))] == [1, 1]
    with pytest.raises(ReleaseError):
        refresh(world.store, others, now=now() + timedelta(days=3))
    assert check(stale).action == "current"
    World(folder=world.folder, store=world.store, keys=fresh).publish("1.3.0", seed=3)
    assert install(stale).version == "1.3.0"
    assert list((world.keys.folder / "retired").glob(f"{name}-*.pem"))


def test_a_stolen_timestamp_key_is_dropped_at_once_and_versions_may_start_again(world: World) -> None:
    stale = world.device("stale")
    install(stale)
    fresh = rotate(world, "timestamp", compromised=True)
    refresh(world.store, fresh, now=now() + timedelta(days=1))
    assert check(stale).action == "current"
    assert check(world.device("new")).action == "install"


def trusted_root(world: World) -> Root:
    return load_trusted(world.store, world.keys.pinned_root.read_bytes()).root


def test_root_keys_are_replaced_and_old_devices_follow(world: World) -> None:
    first_root = world.folder / "first.json"
    shutil.copy(world.keys.pinned_root, first_root)
    stale = world.device("stale", root=first_root)
    install(stale)
    fresh = rotate(world, "root")
    assert trusted_root(world).version == 2
    World(folder=world.folder, store=world.store, keys=fresh).publish("1.3.0", seed=3)
    assert install(stale).version == "1.3.0"
    approve(world.store, fresh, grant("7" * 64, ()), now=now())
    assert install(world.device("new")).version == "1.3.0"
    with pytest.raises(QcoreError):
        approve(
            world.store,
            world.keys,
            grant("6" * 64, ()),
            now=now(),
        )


def test_root_keys_on_machines_of_their_own_are_replaced_by_a_draft(world: World) -> None:
    install(world.device())
    new, draft = world.folder / "new", world.folder / "draft.json"
    public = [life.new_key(name=name, keys=new) for name in ("root1", "root2", "root3")]
    place = {"repository": world.store.folder, "keys": part(world, "desk", "snapshot", "timestamp").folder}
    life.draft_next_root(out=draft, root_keys=public, **place)
    life.sign_draft(file=draft, keys=[world.keys.folder / "root1.pem", world.keys.folder / "root3.pem"])
    with pytest.raises(ReleaseError, match="signatures"):
        life.submit(file=draft, **place)
    assert trusted_root(world).version == 1
    life.sign_draft(file=draft, keys=[new / "root2.pem", new / "root1.pem"])
    for _ in range(2):
        life.submit(file=draft, **place)
    assert trusted_root(world).version == 2
    assert check(world.device()).action == "current"
    assert check(world.device("new")).action == "install"


def test_a_rotation_goes_on_after_a_crash_before_the_files_are_renamed(world: World) -> None:
    fresh = fresh_key(world.keys.folder, "publisher")
    rotate_delegated(world.store, world.keys, Renewal(name="publisher", signer=fresh), now=now())
    ring = rotate(world, "publisher")
    assert ring.signer("publisher").public_key == fresh.public_key
    World(folder=world.folder, store=world.store, keys=ring).publish("1.3.0", seed=3)


# Records


def test_every_change_is_recorded_in_one_chain_whose_head_is_signed(world: World) -> None:
    yank(world.store, world.keys, Yank(release=V2, to=V1), now=now())
    revoke(world.store, world.keys, V1, now=now())
    rotate(world, "publisher")
    assert records(world) == ["rotate", "revoke", "yank", "publish", "publish", "init"]


def test_a_record_that_is_changed_or_missing_is_noticed(world: World) -> None:
    trusted = load_trusted(world.store, world.keys.pinned_root.read_bytes())
    path = world.store.folder / record_key(trusted.snapshot.unrecognized_fields[AUDIT])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stable", b"stabla"))
    found = audit(repository=world.store.folder, root=world.keys.pinned_root, target=V2)
    assert "audit records" in [f.what for f in found.findings if f.state == "does not fit"]
    path.unlink()
    assert not audit(repository=world.store.folder, root=world.keys.pinned_root, target=V2).sound


def test_an_audit_tells_the_story_and_notices_other_bytes(world: World) -> None:
    found = audit(repository=world.store.folder, root=world.keys.pinned_root, target=V2)
    said = {f.what: (f.state, f.detail) for f in found.findings}
    assert found.sound
    assert "offered by stable" in said["offered"][1]
    assert "publisher" in said["signed by"][1]
    path = next(world.store.folder.rglob("*.1.1.0.qpkg"))
    path.write_bytes(path.read_bytes()[:-1])
    found = audit(repository=world.store.folder, root=world.keys.pinned_root, target=V2)
    assert "bytes" in [f.what for f in found.findings if f.state == "does not fit"]
    with pytest.raises(ReleaseError, match="is not published here"):
        audit(repository=world.store.folder, root=world.keys.pinned_root, target="models/x/1.qpkg")


def test_a_published_state_that_clients_cannot_read_is_said(world: World) -> None:
    at = now() + timedelta(days=364)  # targets and root expire within the new timestamp's life
    with pytest.raises(ReleaseError, match=r"committed, but a client at .* cannot read it"):
        refresh(world.store, part(world, "online", "snapshot", "timestamp"), now=at)


# Whatever happens on the way


def changes(world: World, fresh: KeyRing) -> dict[str, Callable[[ObjectStore], object]]:
    """Return what is done to a repository, by name."""
    renewal = Renewal(name="channel-stable", signer=fresh.signer("publisher"))
    return {
        "yank": lambda store: yank(store, world.keys, Yank(release=V2, to=V1), now=now()),
        "revoke": lambda store: revoke(store, world.keys, V1, now=now()),
        "approve": lambda store: approve(store, world.keys, grant("5" * 64, ()), now=now()),
        "rotate": lambda store: rotate_delegated(store, world.keys, renewal, now=now()),
        "rotate root": lambda store: rotate_root(store, world.keys, fresh.root, now=now()),
    }


@pytest.mark.parametrize("what", ["yank", "revoke", "approve", "rotate", "rotate root"])
def test_a_process_that_dies_after_any_write_is_finished_by_the_next_run(tmp_path: Path, what: str) -> None:
    fresh = create_keys(tmp_path / "fresh", ["stable"])
    for lives in range(1, 100):
        world = make_world(tmp_path / str(lives))
        world.publish("1.0.0")
        world.publish("1.1.0", seed=1)
        change = changes(world, fresh)[what]
        try:
            change(CrashingStore(world.store, lives))
        except Crash:
            assert check(world.device()).release.version in ("1.0.0", "1.1.0")
            change(world.store)
            assert check(world.device("later")).release.version in ("1.0.0", "1.1.0")
        else:
            break
    assert lives > 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_the_repository_is_refused_or_means_the_same(world: World, data: st.DataObject) -> None:
    files = sorted(p for p in world.store.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    path = data.draw(st.sampled_from(files))
    good = path.read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:position] + bytes([good[position] ^ data.draw(st.integers(1, 255))]) + good[position + 1 :])
    state = world.device("new").state_dir
    try:
        found = install(world.device("new")).sha256
    except UpdateError:
        found = None
    finally:
        path.write_bytes(good)
        shutil.rmtree(state)
    assert found in (None, world.package("1.1.0", seed=1).sha256)


# Provenance


def test_provenance_is_published_beside_the_evidence_and_must_fit(world: World) -> None:
    package, out = world.package("1.2.0", seed=2), world.folder / "p.json"
    told = {"builder": "https://ci.example/builder", "parameters": {"recipe": "int8", "seed": 0}}
    made = {"package": package.path, "out": out, "inputs": {"model": world.folder / "src-1.2.0-2" / "model.onnx"}}
    steps.provenance(**made, **told, key=world.keys.folder / "publisher.pem")  # type: ignore[arg-type]
    sent = Submission(package=package.path, evidence=world.evidence(package), provenance=out.read_bytes())
    other = world.package("1.3.0", seed=3)
    foreign = replace(sent, package=other.path, evidence=world.evidence(other))
    with pytest.raises(GateRefused, match="provenance is of package"):
        publish_release(world.store, foreign, world.keys, now=now())
    release = publish_release(world.store, sent, world.keys, now=now())
    assert release.provenance_target == f"models/{FAMILY}/1.2.0.provenance.json"
    told_again = audit(repository=world.store.folder, root=world.keys.pinned_root, target=release.target)
    assert "built by https://ci.example/builder" in {f.what: f.detail for f in told_again.findings}["provenance"]
    steps.provenance(**made, **told, key=world.keys.folder / "snapshot.pem")  # type: ignore[arg-type]
    unknown = Submission(package=other.path, evidence=world.evidence(other), provenance=out.read_bytes())
    with pytest.raises(GateRefused, match="signed by unknown key"):
        publish_release(world.store, unknown, world.keys, now=now())


# Bundles


def export(world: World, **options: object) -> Path:
    out = world.folder / "bundle.tar"
    life.export(repository=world.store.folder, keys=world.keys.folder, out=out, **options)  # type: ignore[arg-type]
    return out


def test_a_device_without_network_installs_from_a_bundle(world: World) -> None:
    out = export(world)
    first = out.read_bytes()
    assert export(world).read_bytes() == first
    shutil.rmtree(world.store.folder)
    done = install(world.device(repository=bundle_address(out)))
    assert done.version == "1.1.0"


def test_a_longer_bundle_is_taken_after_the_timestamp_would_have_expired(world: World) -> None:
    out = export(world, days=20)
    data = json.loads((world.store.folder / "metadata" / "timestamp.json").read_bytes())
    assert data["signed"]["expires"] > (now() + timedelta(days=19)).isoformat()
    assert install(world.device(repository=bundle_address(out))).version == "1.1.0"
    with pytest.raises(ReleaseError, match="up to 30 days"):
        export(world, days=31)
    with pytest.raises(ReleaseError, match="nothing is offered"):
        export(world, family="other")


def test_a_release_revoked_after_the_bundle_was_made_is_blocked_by_the_floor(world: World) -> None:
    out = export(world, days=20)
    config = world.device()
    revoke(world.store, world.keys, V2, now=now())
    world.publish("1.2.0", seed=2)
    install(config)
    with pytest.raises(UpdateError, match=r"^E_ROLLBACK"):
        install(replace(config, repository=bundle_address(out)))


@pytest.mark.parametrize("where", [0, 100, 156, 257, 600, 3000])
def test_a_damaged_bundle_is_refused(world: World, where: int) -> None:
    out = export(world)
    good = out.read_bytes()
    position = where if where < 600 else len(good) * where // 4000
    out.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    config = world.device(repository=bundle_address(out))
    try:
        found = install(config).model_sha256
    except UpdateError:
        found = world.package("1.1.0", seed=1).manifest.model_sha256
    assert found == world.package("1.1.0", seed=1).manifest.model_sha256  # refused, or of identical meaning


def test_a_bundle_of_other_things_than_files_is_refused(world: World) -> None:
    import tarfile

    bad = world.folder / "bad.tar"
    with tarfile.open(bad, "w") as archive:
        link = tarfile.TarInfo("metadata/timestamp.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UpdateError, match=r"^E_UNREACHABLE: .*no regular file"):
        check(world.device(repository=bundle_address(bad)))


# Life


def test_status_warns_at_half_and_at_a_quarter_of_a_roles_life(world: World) -> None:
    def levels(hours: float) -> str:
        return {r.role: r.level for r in roles(world.store, now=now() + timedelta(hours=hours))}["timestamp"]

    assert [levels(h) for h in (1, 23, 25, 35, 37, 49)] == ["good", "good", "half", "half", "quarter", "expired"]


def test_a_root_is_signed_only_by_keys_that_it_names(world: World) -> None:
    found = Metadata[Root].from_bytes(world.keys.pinned_root.read_bytes())
    assert set(found.signatures) <= set(found.signed.roles["root"].keyids)
