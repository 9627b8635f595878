"""Where a repository lies: four operations, of which create-only and compare-and-swap carry the whole safety.

A store holds small immutable objects under plain keys and promises: `put_if_absent` creates or changes nothing,
`put_if_match` replaces exactly the bytes that were read or changes nothing, both durable when they return. Here is the
directory store, good for one machine (or a file system whose flock and link work across machines); `s3.py` has the
other one, `location.py` chooses, and `doctor.py` proves a store before it is trusted. What is put where is in
`repository.py`.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qcore.canonical import Digest, sha256_bytes
from qcore.errors import ReleaseError
from qcore.files import fsync_dir, write_atomic

KEY = re.compile(r"[a-z0-9][a-z0-9._-]*(?:/[a-z0-9][a-z0-9._-]*)*", re.ASCII)
"""What keys look like: plain enough for file names and for addresses without quoting."""
LONGEST_KEY = 512
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Object:
    """Bytes as they were read, and the tag that `put_if_match` compares."""

    data: bytes
    etag: str


class ObjectStore(Protocol):
    """Objects under keys of `[a-z0-9._/-]`; every method raises ReleaseError if the store cannot answer."""

    def get(self, key: str) -> Object | None:
        """Return the object, or None if there is none."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Return True after `data` was created; False, with nothing changed, if `key` exists."""

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Return True after `data` replaced the object of tag `etag`; False, with nothing changed, otherwise."""

    def list(self, prefix: str) -> list[str]:
        """Return the sorted keys that begin with `prefix`."""


class ErasableStore(ObjectStore, Protocol):
    """A store that can also remove: for the doctor's own probes. What publishes is given an `ObjectStore`."""

    def remove(self, key: str) -> None:
        """Remove the object if it is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectoryStore:
    """Objects as files under `folder`; a reader sees an object whole or not at all, also after a crash."""

    folder: Path

    def get(self, key: str) -> Object | None:
        """Return the object, or None if there is none."""
        with _errors("read", key):
            try:
                data = self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Object(data=data, etag=_etag(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Return True after `data` was created durably; False if `key` exists. `link` is the atomic step."""
        path = self._path(key)
        with _errors("write", key):
            _make_durable_folder(path.parent)
            fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            try:
                with open(fd, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fchmod(fd, 0o644)
                    os.fsync(fd)
                os.link(tmp, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(tmp)
            fsync_dir(path.parent)
        return True

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Return True after `data` replaced the object of tag `etag`; writers take turns by a lock on the folder."""
        with _errors("write", key), self._locked():
            found = self.get(key)
            if found is None or found.etag != etag:
                return False
            write_atomic(self._path(key), data)
            return True

    def list(self, prefix: str) -> list[str]:
        """Return the sorted keys that begin with `prefix`; half-written files are no objects."""
        with _errors("list", prefix):
            keys = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            return sorted(k for k in keys if k.startswith(prefix) and KEY.fullmatch(k))

    def remove(self, key: str) -> None:
        """Remove the object if it is there, and the folders that held nothing else."""
        path = self._path(key)
        with _errors("remove", key):
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.folder).parents[:-1]:
                with suppress(OSError):  # not empty: others have objects there
                    (self.folder / folder).rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


def check_key(key: str) -> str:
    """Return `key` if every store can hold it.

    Raises:
        ReleaseError: it cannot.
    """
    if not KEY.fullmatch(key) or ".." in key or len(key) > LONGEST_KEY:
        raise ReleaseError(
            f"store key {key!r} is not allowed; allowed: parts of a-z0-9._- joined by /, no '..', at most "
            f"{LONGEST_KEY} characters; choose another name"
        )
    return key


def _etag(data: bytes) -> Digest:
    return sha256_bytes(data)


@contextmanager
def _errors(verb: str, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ReleaseError(f"store: cannot {verb} {key}: {e.strerror}; check the path, its owner and free space") from e


def _make_durable_folder(folder: Path) -> None:
    missing = [folder]
    while not missing[-1].exists():
        missing.append(missing[-1].parent)
    for parent, child in zip(reversed(missing), reversed(missing[:-1]), strict=False):
        child.mkdir(exist_ok=True)
        fsync_dir(parent)
