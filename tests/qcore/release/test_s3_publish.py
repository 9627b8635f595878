"""Publishing to S3 through a network that goes wrong: done and right, or an error, and clients see old or new."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from faulty_s3 import Fault, Proxy, faulty
from s3_server import BUCKET, Server
from simulators import World, make_world, now

from qcore.device.updater import check
from qcore.errors import ReleaseError
from qcore.release import s3 as module
from qcore.release.metadata import load_trusted
from qcore.release.repository import publish_release
from qcore.release.s3 import open_s3

TIMESTAMP, SNAPSHOT, PACKAGE = "timestamp.json", "snapshot.json", ".qpkg"


@dataclass(frozen=True)
class Line:
    """A world with a release, and the same world as seen through a proxy that can go wrong."""

    world: World
    behind: World
    proxy: Proxy


@pytest.fixture
def line(s3_environment: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    location = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    world = make_world(tmp_path, location=location)
    world.publish("1.0.0")
    with faulty(s3_environment.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield Line(world=world, behind=replace(world, store=open_s3(location, read_timeout_s=1.0)), proxy=proxy)


def versions(world: World) -> set[str]:
    role = load_trusted(world.store, world.keys.pinned_root.read_bytes()).delegated["models-digits"]
    return {p for p in role.targets if p.endswith(PACKAGE)}


PASSING = {
    "conflicts": [Fault("refuse", "PUT", "", 5, 409, "ConditionalRequestConflict")],
    "a conflict at every write": [
        Fault("refuse", "PUT", part, 1, 409, "ConditionalRequestConflict")
        for part in (PACKAGE, "evidence", "release.json", "models-digits", "channel-stable", SNAPSHOT, TIMESTAMP)
    ],
    "SlowDown": [Fault("refuse", "PUT", "", 5, 503, "SlowDown"), Fault("refuse", "GET", "", 5, 503, "SlowDown")],
    "commit answered with 412": [Fault("apply and refuse", "PUT", TIMESTAMP, 1, 412, "PreconditionFailed")],
    "commit answered with 500": [Fault("apply and refuse", "PUT", TIMESTAMP, 1, 500, "InternalError")],
    "commit not answered": [Fault("apply and hang", "PUT", TIMESTAMP, 1, hang_s=2)],
    "commit cut off": [Fault("apply and close", "PUT", TIMESTAMP, 1)],
    "package not answered": [Fault("apply and hang", "PUT", PACKAGE, 1, hang_s=2)],
    "snapshot answered with 412": [Fault("apply and refuse", "PUT", SNAPSHOT, 1, 412, "PreconditionFailed")],
    "snapshot cut off": [Fault("apply and close", "PUT", SNAPSHOT, 1)],
    "bodies cut": [Fault("cut", "GET", "json", 2), Fault("shorten", "GET", "json", 2)],
    "stale for a while": [Fault("stale", "GET", TIMESTAMP, 4)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_faults_that_pass_change_nothing(line: Line, faults: list[Fault]) -> None:
    submission = line.world.submission(line.world.package("1.1.0", seed=1))
    line.proxy.faults.extend(replace(f) for f in faults)
    release = publish_release(line.behind.store, submission, line.world.keys, now=now())
    assert line.proxy.spent()
    assert (release.version, release.counter) == ("1.1.0", 2)
    assert check(line.world.device()).release.version == "1.1.0"
    assert versions(line.world) == {f"models/digits/{v}.qpkg" for v in ("1.0.0", "1.1.0")}
    assert publish_release(line.world.store, submission, line.world.keys, now=now()) == release, "nothing to be done"


LASTING = {
    "conflict at the commit": [Fault("refuse", "PUT", TIMESTAMP, 10_000, 409, "ConditionalRequestConflict")],
    "commit never arrives": [Fault("close", "PUT", TIMESTAMP, 10_000)],
    "500 at the snapshot": [Fault("refuse", "PUT", SNAPSHOT, 10_000, 500, "InternalError")],
    "no right to put": [Fault("refuse", "PUT", "", 10_000, 403, "AccessDenied")],
    "bodies cut": [Fault("cut", "GET", SNAPSHOT, 10_000)],
    "package never arrives": [Fault("close", "PUT", PACKAGE, 10_000)],
}


@pytest.mark.parametrize("faults", LASTING.values(), ids=LASTING.keys())
def test_faults_that_last_are_an_error_and_the_next_publish_works(line: Line, faults: list[Fault]) -> None:
    submission = line.world.submission(line.world.package("1.1.0", seed=1))
    line.proxy.faults.extend(replace(f) for f in faults)
    with pytest.raises(ReleaseError) as e:
        publish_release(line.behind.store, submission, line.world.keys, now=now())
    assert "\n" not in str(e.value)
    assert check(line.world.device()).release.version == "1.0.0"
    line.proxy.faults.clear()
    publish_release(line.behind.store, submission, line.world.keys, now=now())
    assert check(line.world.device()).release.version == "1.1.0"
    assert versions(line.world) == {f"models/digits/{v}.qpkg" for v in ("1.0.0", "1.1.0")}


def test_a_store_that_stays_stale_is_found_out_before_or_after_the_commit(line: Line) -> None:
    first = line.world.submission(line.world.package("1.1.0", seed=1))
    line.proxy.faults.append(Fault("stale", "GET", TIMESTAMP, 10_000))
    with pytest.raises(ReleaseError, match=r"is committed, and the store still shows version \d: stale reads"):
        publish_release(line.behind.store, first, line.world.keys, now=now())
    assert check(line.world.device()).release.version == "1.1.0"
    second = line.world.submission(line.world.package("1.2.0", seed=2))
    with pytest.raises(ReleaseError, match="412 though the object is as it was read"):
        publish_release(line.behind.store, second, line.world.keys, now=now())
    assert check(line.world.device()).release.version == "1.1.0"
    line.proxy.faults.clear()
    publish_release(line.behind.store, second, line.world.keys, now=now())
    assert check(line.world.device()).release.version == "1.2.0"


def test_a_lost_answer_before_another_release_is_taken_up_again(line: Line) -> None:
    """The commit is applied, its answer is lost, and another publisher builds on it before we can look."""
    submission = line.world.submission(line.world.package("1.1.0", seed=1))
    line.proxy.faults.append(Fault("apply and hang", "PUT", TIMESTAMP, 1, hang_s=2))
    overtaking = line.behind.store.client.meta.events  # type: ignore[union-attr]  # an S3Store

    def overtake(**_: object) -> None:
        if line.proxy.spent() and "models/digits/1.2.0.qpkg" not in versions(line.world):
            line.world.publish("1.2.0", seed=2)

    overtaking.register("before-call.s3.PutObject", overtake)  # called again for the second attempt of the commit
    release = publish_release(line.behind.store, submission, line.world.keys, now=now())
    assert (release.version, release.counter) == ("1.1.0", 2)
    assert versions(line.world) == {f"models/digits/{v}.qpkg" for v in ("1.0.0", "1.1.0", "1.2.0")}
    assert check(line.world.device()).release.version == "1.2.0"


def test_what_a_publish_asks_of_the_server(line: Line) -> None:
    """8 writes, the state twice, what was written read back: at most 12 round trips, each of which takes 0.2 s."""
    submission = line.world.submission(line.world.package("1.1.0", seed=1))
    line.proxy.delay_s = 0.2
    publish_release(line.behind.store, submission, line.world.keys, now=now())
    asked = [method for method, _, _ in line.proxy.seen]
    assert (asked.count("PUT"), asked.count("GET")) == (8, 15)
    assert line.proxy.round_trips() <= 12
