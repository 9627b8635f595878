"""Files that are there whole or not at all: temporary file beside the target, fsync, rename, fsync of the folder.

Standard library only, because the device uses it too.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qcore.canonical import Digest, Json, canonical_json


def fsync_dir(path: Path) -> None:
    """Make the names inside the folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    Folders that are missing are made. On an error the temporary file is removed and `path` is what it was before.

    Raises:
        OSError: `path` cannot be written; it names `path`, since nobody knows the temporary one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    os.close(fd)
    tmp = Path(name)
    try:
        yield tmp
        tmp.chmod(0o644)
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        tmp.replace(path)
        fsync_dir(path.parent)
    except OSError as e:
        if e.filename is None or Path(e.filename) != tmp:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        tmp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, durably and all at once."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def write_json(path: Path, value: Json) -> None:
    """Write `value` as canonical JSON with a closing newline."""
    write_atomic(path, canonical_json(value) + b"\n")


def sha256_file(path: Path) -> Digest:
    """Return the SHA-256 of the bytes of `path`, read in blocks of 1 MiB."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
