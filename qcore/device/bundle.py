"""A repository in one file, as it comes on a USB stick: read in place, never unpacked, verified like any other.

A bundle is a tar of regular files under their repository paths. Only its index of names is read here, with bounds;
what the files say is for tuf and the device to verify, so a bundle is trusted no more than a web server.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient import FetcherInterface

BUNDLE_BASE = "bundle:///repository"
MAX_MEMBERS = 100_000
MAX_NAME_BYTES = 1024
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 18


class BundleFetcher(FetcherInterface):
    """Reads the bundle `path` as if it were a server."""

    def __init__(self, path: Path) -> None:
        """Serve what lies in `path`; it is opened when something is asked for."""
        self.path = path
        self.index: dict[str, tuple[int, int]] | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(f"{BUNDLE_BASE}/")
        try:
            if self.index is None:
                with self.path.open("rb") as f:
                    self.index = _index(f)
            if name not in self.index:
                raise DownloadHTTPError(f"{name} is not in the bundle {self.path}", 404)
            return _blocks(self.path.open("rb"), *self.index[name])
        except (OSError, tarfile.TarError, UnicodeDecodeError) as e:
            raise DownloadError(f"bundle {self.path} cannot be read: {e}; export it again") from e


def _index(f: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return offset and size of every member by name.

    Raises:
        TarError: it holds something else than regular files, or a name twice.
    """
    found: dict[str, tuple[int, int]] = {}
    name = None
    while (block := f.read(_BLOCK)) != bytes(_BLOCK):
        if len(block) < _BLOCK or len(found) > MAX_MEMBERS:
            raise tarfile.ReadError("it is cut off, or holds too many files")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        padded = -(-info.size // _BLOCK) * _BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME and name is None and 0 < info.size <= MAX_NAME_BYTES:
            name = f.read(padded)[: info.size].rstrip(b"\0").decode()
            continue
        name = name or info.name
        if info.type != tarfile.REGTYPE or info.size < 0 or name in found:
            raise tarfile.ReadError(f"{name!r} is no regular file, or is there twice")
        found[name] = (f.tell(), info.size)
        f.seek(padded, 1)
        name = None
    return found


def _blocks(f: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    with f:
        f.seek(offset)
        while size > 0 and (block := f.read(min(_CHUNK, size))):
            size -= len(block)
            yield block
