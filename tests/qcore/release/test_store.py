"""The contract of a store, the same for every kind: create-only and compare-and-swap, between processes and crashes."""

import multiprocessing
import os
import uuid
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, Server

from qcore.errors import ReleaseError
from qcore.release.location import absolute_location, is_url, open_store
from qcore.release.store import DirectoryStore, ErasableStore

SPAWN = multiprocessing.get_context("spawn")
PART = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}(\.[a-z0-9]{1,5})?", fullmatch=True)


@pytest.fixture
def store(location: str) -> ErasableStore:
    return open_store(location)


def data_of(store: ErasableStore, key: str) -> bytes:
    found = store.get(key)
    assert found is not None
    return found.data


def test_create_only_changes_nothing_the_second_time(store: ErasableStore) -> None:
    assert store.get("a/b.json") is None
    assert store.put_if_absent("a/b.json", b"1")
    assert not store.put_if_absent("a/b.json", b"2")
    assert not store.put_if_absent("a/b.json", b"1"), "the same bytes, and still not this call's"
    assert data_of(store, "a/b.json") == b"1"


def test_compare_and_swap_needs_the_bytes_that_were_read(store: ErasableStore) -> None:
    assert not store.put_if_match("t.json", b"1", "x")
    assert store.get("t.json") is None
    store.put_if_absent("t.json", b"1")
    first = store.get("t.json")
    assert first is not None
    assert store.put_if_match("t.json", b"2", first.etag)
    assert not store.put_if_match("t.json", b"3", first.etag)
    assert not store.put_if_match("t.json", b"2", first.etag), "the same bytes, and still not this call's"
    assert data_of(store, "t.json") == b"2"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=2000), other=st.binary(max_size=2000), parts=st.lists(PART, min_size=1, max_size=4))
def test_bytes_come_back_as_they_were_written(location: str, data: bytes, other: bytes, parts: list[str]) -> None:
    store = open_store(location)
    key = "/".join(["x" + uuid.uuid4().hex, *parts])
    assert store.put_if_absent(key, data)
    found = store.get(key)
    assert found is not None
    assert found.data == data
    assert store.put_if_match(key, other, found.etag)
    assert data_of(store, key) == other
    assert store.list(key) == [key]


KEYS = ("a.json", "b/1.json", "b/2.json")
CALLS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from(KEYS), st.sampled_from([b"", b"1", b"2"])),
    st.tuples(st.just("swap"), st.sampled_from(KEYS), st.sampled_from([b"", b"1", b"2"])),
    st.tuples(st.just("swap by an old tag"), st.sampled_from(KEYS), st.sampled_from([b"", b"1", b"2"])),
    st.tuples(st.just("remove"), st.sampled_from(KEYS), st.just(b"")),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, max_size=12))
def test_any_calls_end_as_in_a_dictionary(location: str, calls: list[tuple[str, str, bytes]]) -> None:
    store = open_store(f"{location}/x{uuid.uuid4().hex}")
    model: dict[str, bytes] = {}
    tags = {key: ["none"] for key in KEYS}
    meant: dict[str, bytes] = {}  # what a tag stands for; the same bytes may have the same tag again
    for call, key, data in calls:
        if call == "create":
            assert store.put_if_absent(key, data) is (key not in model)
            model.setdefault(key, data)
        elif call == "remove":
            store.remove(key)
            model.pop(key, None)
        else:
            tag = tags[key][-1 if call == "swap" else len(tags[key]) // 2]
            expected = key in model and meant.get(tag) == model[key]
            assert store.put_if_match(key, data, tag) is expected
            if expected:
                model[key] = data
        found = store.get(key)
        assert (found.data if found is not None else None) == model.get(key)
        if found is not None:
            tags[key].append(found.etag)
            meant[found.etag] = found.data
        assert store.list("") == sorted(model)
        assert store.list("b/") == sorted(k for k in model if k.startswith("b/"))


@pytest.mark.parametrize("data", [b"", bytes(range(256)) * 20_480], ids=["empty", "5 MB"])
def test_empty_and_large_objects(store: ErasableStore, data: bytes) -> None:
    assert store.put_if_absent("models/o.qpkg", data)
    found = store.get("models/o.qpkg")
    assert found is not None
    assert found.data == data
    assert store.put_if_match("models/o.qpkg", data + b"1", found.etag)
    assert data_of(store, "models/o.qpkg") == data + b"1"


def test_a_list_is_sorted_and_holds_what_begins_with_the_prefix(store: ErasableStore) -> None:
    for key in ("m/2.json", "m/10.json", "m/1.json", "m-a/1.json", "m.json", "n/1.json", "n/deep/er/1.json"):
        store.put_if_absent(key, b"")
    assert store.list("m/") == ["m/1.json", "m/10.json", "m/2.json"]
    assert store.list("m/1") == ["m/1.json", "m/10.json"]
    assert store.list("none") == []
    assert store.list("") == sorted(
        ["m-a/1.json", "m.json", "m/1.json", "m/10.json", "m/2.json", "n/1.json", "n/deep/er/1.json"]
    )


@pytest.mark.slow
def test_a_list_of_more_than_a_page_is_whole(store: ErasableStore) -> None:
    keys = [f"targets/{i % 7}/{i:04d}.json" for i in range(1205)]
    for key in keys:
        assert store.put_if_absent(key, b"")
    assert store.list("targets/") == sorted(keys)
    assert store.list("targets/3/") == sorted(k for k in keys if k.startswith("targets/3/"))


def test_two_repositories_in_one_place_do_not_see_each_other(location: str) -> None:
    one, two = open_store(f"{location}/one"), open_store(f"{location}/two/")
    one.put_if_absent("t.json", b"1")
    assert two.get("t.json") is None
    assert two.list("") == []
    assert open_store(location).list("") == ["one/t.json"]


def test_remove_takes_what_it_names_and_nothing_else(store: ErasableStore) -> None:
    for key in ("a/1", "a/2", "b/deep/1"):
        store.put_if_absent(key, b"")
    for key in ("a/1", "b/deep/1", "none"):
        store.remove(key)
    assert store.list("") == ["a/2"]
    assert store.put_if_absent("a/1", b"again")


@pytest.mark.parametrize(
    "key", ["", "/etc/x", "../x", "a/../b", "a//b", ".x", "a/.x", "A", "a b", "a%2fb", "a\n", "a..b", "a/", "x" * 513]
)
def test_keys_that_leave_the_place_or_need_quoting_are_refused(store: ErasableStore, key: str) -> None:
    for call in (
        lambda: store.get(key),
        lambda: store.put_if_absent(key, b""),
        lambda: store.put_if_match(key, b"", "x"),
        lambda: store.remove(key),
    ):
        with pytest.raises(ReleaseError, match="is not allowed"):
            call()


def _create_first(location: str, start: Barrier, rounds: int) -> None:
    store = open_store(location)
    for i in range(rounds):
        start.wait(60)
        if store.put_if_absent(f"race/{i}", str(os.getpid()).encode()):
            store.put_if_absent(f"won/{i}-{os.getpid()}", b"")


def test_of_processes_that_create_at_once_one_wins(location: str) -> None:
    start = SPAWN.Barrier(4)
    run_all([SPAWN.Process(target=_create_first, args=(location, start, 10)) for _ in range(4)])
    store = open_store(location)
    assert store.list("won/") == [f"won/{i}-{data_of(store, f'race/{i}').decode()}" for i in range(10)]


def test_no_increment_is_lost_between_processes(location: str) -> None:
    store = open_store(location)
    store.put_if_absent("n", b"0")
    run_all([SPAWN.Process(target=_count_up, args=(location, 15)) for _ in range(3)])
    assert data_of(store, "n") == b"45"
    assert len(store.list("by/")) == 3


def _count_up(location: str, times: int) -> None:
    store = open_store(location)
    store.put_if_absent(f"by/{os.getpid()}", b"x")
    done = 0
    while done < times:
        found = store.get("n")
        assert found is not None
        done += store.put_if_match("n", str(int(found.data) + 1).encode(), found.etag)


def run_all(processes: list[multiprocessing.context.SpawnProcess]) -> None:
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * len(processes)


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill_of_the_server(s3_environment: Server) -> None:
    """On S3 only: a directory store has no server, and its writers' deaths are in test_crashes.py."""
    location = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = open_store(location)
    acknowledged = 0
    for kill in range(2):
        until = acknowledged + 40
        while acknowledged < until:
            assert store.put_if_absent(f"d/{acknowledged:05d}", content(acknowledged))
            acknowledged += 1
        s3_environment.kill()
        s3_environment.start()
        kept = [data_of(store, f"d/{i:05d}") == content(i) for i in range(acknowledged)]
        assert kept == [True] * acknowledged, f"after kill {kill + 1}"


def content(i: int) -> bytes:
    return f"{i}-".encode() * (1 + 1000 * (i % 3))


def test_half_written_files_are_no_objects(tmp_path: Path) -> None:
    store = DirectoryStore(folder=tmp_path)
    store.put_if_absent("m/1.json", b"")
    (tmp_path / "m" / ".1.json.x.tmp").write_bytes(b"half")
    assert store.list("m/") == ["m/1.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReleaseError, match="cannot write a") as e:
        DirectoryStore(folder=tmp_path / "file").put_if_absent("a", b"")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "location",
    [
        "http://x/y",
        "https://x/y",
        "gs://b/p",
        "file:///tmp/x",
        "S3://bucket/p",
        Path("s3://bucket/p"),
        "s3://",
        "s3://b",
        "s3://Bucket/p",
        "s3://bucket/../p",
        "s3://bucket//p",
        "s3://bucket/p q",
        "s3://bucket/p?x=1",
        "s3://bucket/" + "p" * 300,
        "s3://id:secret-of-mine@bucket/p",
    ],
)
def test_addresses_that_are_no_store_are_refused_in_one_line(location: str | Path) -> None:
    with pytest.raises(ReleaseError, match="allowed: ") as e:
        open_store(location)
    assert "\n" not in str(e.value)
    assert "secret-of-mine" not in str(e.value)


def test_an_address_stays_what_it_is_and_a_folder_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_location("s3://bucket/p") == "s3://bucket/p"
    assert absolute_location("repo") == str(tmp_path / "repo")
    assert [is_url(x) for x in ("repo", "/a/b", Path("a"), "c:/x", "s3://bucket")] == [False, False, False, False, True]
