"""The directory store: create-only and compare-and-swap hold between processes, and no half object is ever visible."""

import multiprocessing
import os
from pathlib import Path

import pytest

from qcore.errors import ReleaseError
from qcore.release.store import DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(folder=tmp_path / "repo")


def test_create_only_changes_nothing_the_second_time(store: DirectoryStore) -> None:
    assert store.get("a/b.json") is None
    assert store.put_if_absent("a/b.json", b"1")
    assert not store.put_if_absent("a/b.json", b"2")
    found = store.get("a/b.json")
    assert found is not None
    assert found.data == b"1"


def test_compare_and_swap_needs_the_bytes_that_were_read(store: DirectoryStore) -> None:
    assert not store.put_if_match("t.json", b"1", "x")
    store.put_if_absent("t.json", b"1")
    first = store.get("t.json")
    assert first is not None
    assert store.put_if_match("t.json", b"2", first.etag)
    assert not store.put_if_match("t.json", b"3", first.etag)
    second = store.get("t.json")
    assert second is not None
    assert second.data == b"2"


def test_a_list_holds_objects_only(store: DirectoryStore) -> None:
    for key in ("m/2.json", "m/1.json", "n/1.json"):
        store.put_if_absent(key, b"")
    (store.folder / "m" / ".1.json.x.tmp").write_bytes(b"half")
    assert store.list("m/") == ["m/1.json", "m/2.json"]
    assert store.list("") == ["m/1.json", "m/2.json", "n/1.json"]


@pytest.mark.parametrize(
    "key", ["", "/etc/x", "../x", "a/../b", "a//b", ".x", "a/.x", "A", "a b", "a%2fb", "a\n", "a..b"]
)
def test_keys_that_leave_the_folder_or_need_quoting_are_refused(store: DirectoryStore, key: str) -> None:
    for call in (
        lambda: store.get(key),
        lambda: store.put_if_absent(key, b""),
        lambda: store.put_if_match(key, b"", "x"),
    ):
        with pytest.raises(ReleaseError, match="is not allowed"):
            call()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReleaseError, match="cannot write a") as e:
        DirectoryStore(folder=tmp_path / "file").put_if_absent("a", b"")
    assert "\n" not in str(e.value)


def _count_up(folder: Path, times: int) -> None:
    store = DirectoryStore(folder=folder)
    store.put_if_absent(f"by/{os.getpid()}", b"x")
    done = 0
    while done < times:
        found = store.get("n")
        assert found is not None
        done += store.put_if_match("n", str(int(found.data) + 1).encode(), found.etag)


def test_no_increment_is_lost_between_processes(store: DirectoryStore) -> None:
    store.put_if_absent("n", b"0")
    workers = [
        multiprocessing.get_context("spawn").Process(target=_count_up, args=(store.folder, 20)) for _ in range(3)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    found = store.get("n")
    assert found is not None
    assert found.data == b"60"
    assert len(store.list("by/")) == 3
