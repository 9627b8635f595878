"""The doctor passes stores that keep their promises, and refuses each way of not keeping them."""

import hashlib
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_s3 import Fault, faulty
from s3_server import BUCKET, KEY_ID, SECRET, Server, environment, free_ports, program

from qcore.errors import ReleaseError
from qcore.release.doctor import Probe, examine, refuse_unproven
from qcore.release.location import open_store
from qcore.release.store import Object


def failed(probes: tuple[Probe, ...]) -> dict[str, str]:
    return {p.name: p.observed for p in probes if not p.ok}


def test_a_good_store_passes_and_is_left_as_it_was(location: str) -> None:
    store = open_store(location)
    store.put_if_absent("metadata/timestamp.json", b"1")
    before = store.get("metadata/timestamp.json")
    probes = examine(store)
    assert failed(probes) == {}
    refuse_unproven(probes)
    assert store.list("") == ["metadata/timestamp.json"]
    assert store.get("metadata/timestamp.json") == before
    if not location.startswith("s3://"):
        assert {p.name for p in Path(location).iterdir()} == {"metadata", ".lock"}


class Memory:
    """A good store in memory; each subclass breaks one promise."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def get(self, key: str) -> Object | None:
        data = self.objects.get(key)
        return None if data is None else Object(data=data, etag=self.tag(data))

    def tag(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self.lock:
            if key in self.objects:
                return False
            self.objects[key] = data
            return True

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        with self.lock:
            if key not in self.objects or self.tag(self.objects[key]) != etag:
                return False
            self.objects[key] = data
            return True

    def list(self, prefix: str) -> list[str]:
        return sorted(k for k in self.objects if k.startswith(prefix))

    def remove(self, key: str) -> None:
        self.objects.pop(key, None)


class IgnoresCreate(Memory):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.objects[key] = data
        return True


class RefusesAndOverwrites(Memory):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        new = key not in self.objects
        self.objects[key] = data
        return new


class IgnoresMatch(Memory):
    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        self.objects[key] = data
        return True


class NeverMatches(Memory):
    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        return False


class OneTag(Memory):
    def tag(self, data: bytes) -> str:
        return "same"


class MakesBySwapping(Memory):
    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        if key not in self.objects:
            self.objects[key] = data
            return True
        return super().put_if_match(key, data, etag)


class ChecksThenWrites(Memory):
    """Not atomic: every racing writer has read before the first one writes."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        threading.Event().wait(0.02)
        self.objects[key] = data
        return True

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        if key not in self.objects or self.tag(self.objects[key]) != etag:
            return False
        threading.Event().wait(0.02)
        self.objects[key] = data
        return True


class Stale(Memory):
    """Reads show the state before the last overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.old: dict[str, bytes] = {}

    def get(self, key: str) -> Object | None:
        data = self.old.pop(key, None) or self.objects.get(key)
        return None if data is None else Object(data=data, etag=self.tag(data))

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        before = self.objects.get(key, b"")
        done = super().put_if_match(key, data, etag)
        if done:
            self.old[key] = before
        return done


class Strips(Memory):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        return super().put_if_absent(key, data.rstrip(b"\xff"))


class ListsAPage(Memory):
    def list(self, prefix: str) -> list[str]:
        return super().list(prefix)[:10]


@pytest.mark.parametrize(
    ("store", "probe", "observed"),
    [
        (IgnoresCreate(), "create", "the second create was accepted: the condition is ignored"),
        (RefusesAndOverwrites(), "create", "6 other bytes are there than the 5 that were written"),
        (IgnoresMatch(), "swap, old tag", "accepted: the condition is ignored"),
        (NeverMatches(), "swap, old tag", "the swap with the right tag was refused"),
        (OneTag(), "swap, old tag", "other bytes have the same tag"),
        (MakesBySwapping(), "swap, no object", "accepted: the condition is ignored"),
        (ChecksThenWrites(), "race to create", "2 winners in round 1"),
        (Stale(), "swap, right tag", "after overwrite 1"),
        (Strips(), "bytes", "4095 other bytes are there than the 4096 that were written"),
        (ListsAPage(), "list", "15 missing, 0 others"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Memory) else "",
)
def test_each_broken_promise_is_found(store: Memory, probe: str, observed: str) -> None:
    probes = examine(store)
    assert observed in failed(probes)[probe]
    with pytest.raises(ReleaseError, match="this store cannot hold a repository: ") as e:
        refuse_unproven(probes)
    assert "\n" not in str(e.value)


def test_the_memory_store_of_these_tests_is_good() -> None:
    assert failed(examine(Memory())) == {}


def test_probes_that_may_not_be_removed_are_said_and_are_no_reason_to_refuse(
    s3_environment: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3_environment.endpoint, Fault("refuse", "DELETE", "", 1000, 403, "AccessDenied")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        probes = examine(open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}"))
    refuse_unproven(probes)
    assert "403 AccessDenied" in probes[-1].observed
    assert "left under doctor-" in probes[-1].observed


def test_a_store_that_cannot_be_reached_is_no_finding(s3_environment: Server) -> None:
    with pytest.raises(ReleaseError, match="404 NoSuchBucket"):
        examine(open_store("s3://no-such-bucket/p"))


@contextmanager
def served(command: list[str], endpoint: str, log: Path) -> Iterator[None]:
    """Run a foreign S3 server until the block ends."""
    server = Server(command=command, endpoint=endpoint, log=log, env={"HOME": str(log.parent)})
    try:
        server.start()
        yield
    finally:
        server.kill()


def needs(name: str) -> str:
    found = program(name)
    if found is None:
        pytest.skip(f"no program {name} (a foreign server, not part of the extra dev)")
    return found


def test_rclone_accepts_conditions_and_ignores_them_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rclone = needs("rclone")
    (port,) = free_ports(1)
    (tmp_path / "files" / BUCKET).mkdir(parents=True)
    endpoint = f"http://127.0.0.1:{port}"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY_ID},{SECRET}"]
    with served([*command, str(tmp_path / "files")], endpoint, tmp_path / "log"):
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        found = failed(examine(open_store(f"s3://{BUCKET}/p")))
        assert "condition is ignored" in found["create"]
        assert "condition is ignored" in found["swap, old tag"]
        verbs = ("doctor",), ("init", "--keys", str(tmp_path / "keys"))
        for verb, *more in verbs:
            command = ["qcore", "repo", verb, "--repository", f"s3://{BUCKET}/p", *more]
            done = subprocess.run(
                [str(program(command[0])), *command[1:]], capture_output=True, text=True, check=False, env=os.environ
            )
            assert done.returncode == 1
            assert "error: this store cannot hold a repository: create: " in done.stderr
            assert "Traceback" not in done.stderr
        assert not (tmp_path / "keys").exists()


def test_moto_keeps_the_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, so no evidence for anything but its answers."""
    moto = needs("moto_server")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    with served([moto, "-H", "127.0.0.1", "-p", str(port)], endpoint, tmp_path / "log"):
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        probes = examine(open_store(f"s3://{BUCKET}/p"))
        assert failed(probes) == {}
