"""The `.qpkg` package: a deterministic tar with the manifest first, and a reader that accepts nothing else.

The writer has one way to write each byte of structure, and the reader compares with exactly that: header by header
(name, size, mode, times, type, checksum), in the manifest's order, then the fixed end. So links, devices, traversal,
duplicate, extra, missing and reordered members need no list of attacks. Payloads are zstd frames, decoded as a stream
under a byte budget; digests are of uncompressed bytes because zstd output differs between versions.

Standard library and zstandard only, because the device reads packages. What the manifest says is in `manifest.py`.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from qcore.canonical import Digest, Json, canonical_json
from qcore.errors import PackageError
from qcore.files import atomic_path, fsync_dir, sha256_file
from qcore.release.manifest import (
    CARD,
    GOLDEN,
    LABELS,
    MAX_MEMBER_BYTES,
    MODEL,
    SBOM,
    Compatibility,
    Golden,
    Member,
    Provenance,
    ReleaseManifest,
    TensorInfo,
    manifest_from_json,
)

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 18
COMPRESSION_LEVEL = 19
MAX_PACKAGE_BYTES = MAX_MEMBER_BYTES + (1 << 26)
"""The largest model stored as it is, with everything else."""
MAX_WINDOW_BYTES = 1 << 23
"""What level 19 uses; a device never grants a frame more memory than this."""

_BLOCK = 512
_CHUNK = 1 << 18
_AGAIN = "get the package again from where it was built"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageSource:
    """What goes into a package: the files, and everything of the manifest that is not computed from them."""

    family: str
    version: str
    model: Path
    golden: Path
    card: Path
    sbom: Path
    compat: Compatibility
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    golden_limits: Golden
    labels: Path | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One package file and the digest of all its bytes."""

    path: Path
    sha256: Digest
    size_bytes: int
    manifest: ReleaseManifest

    def to_json(self) -> Json:
        """Return the JSON form for `--json`: bytes of the model file, of the download, and on the device's disk."""
        return {
            "package": str(self.path),
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "file_bytes": self.manifest.member(MODEL).size_bytes,
            "download_bytes": self.size_bytes,
            "flash_bytes": self.manifest.flash_bytes,
            "manifest": self.manifest.to_json(),
        }


def build_package(source: PackageSource, out: Path) -> Package:
    """Return the package written to `out`; equal inputs give equal bytes.

    Raises:
        PackageError: a file cannot be read, is empty, or a name or limit is not allowed.
    """
    files = {MODEL: source.model, GOLDEN: source.golden, CARD: source.card, SBOM: source.sbom}
    if source.labels is not None:
        files[LABELS] = source.labels
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".qpkg.", dir=out.parent) as work:
            stored = {name: Path(work) / name for name in files}
            members = tuple(_compress(name, files[name], stored[name]) for name in sorted(files))
            manifest = ReleaseManifest(
                family=source.family,
                version=source.version,
                members=members,
                compat=source.compat,
                inputs=source.inputs,
                outputs=source.outputs,
                golden=source.golden_limits,
                provenance=source.provenance,
            )
            with atomic_path(out) as tmp, tmp.open("wb") as f:
                _write_archive(f, manifest, stored)
    except OSError as e:
        raise PackageError(f"package {out}: {e.filename or ''} {e.strerror}; check the path and the free space") from e
    return Package(path=out, sha256=sha256_file(out), size_bytes=out.stat().st_size, manifest=manifest)


def packed_size(data: bytes) -> int:
    """Return how many bytes a member that holds `data` takes in a package, without its header."""
    return len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(data))


def read_manifest(path: Path) -> ReleaseManifest:
    """Return the manifest of the package `path`; the other members are not read.

    Raises:
        PackageError: not a package that `build_package` wrote.
    """
    with _opened(path) as f:
        return _read_manifest(f)


def unpack_package(path: Path, folder: Path) -> ReleaseManifest:
    """Return the manifest after every member of `path` was verified and written, durably, into the new `folder`.

    Nothing is written outside `folder`, and no member beyond the size that the manifest states. On an error `folder`
    is left for the caller to remove.

    Raises:
        PackageError: the first member that is not exactly what the manifest says; `folder` exists.
        OSError: `folder` cannot be written (disk full).
    """
    with _opened(path) as f:
        manifest = _read_manifest(f)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as e:
            raise PackageError(f"{folder} exists; unpack into a new folder") from e
        _write_file(folder / MANIFEST, canonical_json(manifest.to_json()))
        for member in manifest.members:
            _expect_header(f, f"{member.path}.zst", member.stored_size_bytes)
            _extract(f, member, folder / member.path)
            _expect_zeros(f, -member.stored_size_bytes % _BLOCK, member.path)
        _expect_zeros(f, _tail_length(f.tell()), "end of archive")
        if f.read(1):
            raise PackageError(f"package: bytes after the end of the archive; {_AGAIN}")
    fsync_dir(folder)
    return manifest


def _compress(name: str, source: Path, out: Path) -> Member:
    digest, size = hashlib.sha256(), source.stat().st_size
    if not 0 < size <= MAX_MEMBER_BYTES:  # before two gigabytes are read for nothing
        raise PackageError(f"{source} has {size} bytes; allowed: 1 to {MAX_MEMBER_BYTES} for {name}; make it smaller")
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_content_size=True)
    with source.open("rb") as f, out.open("wb") as g, compressor.stream_writer(g, size=size, closefd=False) as writer:
        while block := f.read(_CHUNK):
            digest.update(block)
            writer.write(block)
    return Member(path=name, size_bytes=size, sha256=digest.hexdigest(), stored_size_bytes=out.stat().st_size)


def _write_archive(f: BinaryIO, manifest: ReleaseManifest, stored: dict[str, Path]) -> None:
    head = canonical_json(manifest.to_json())
    if len(head) > MAX_MANIFEST_BYTES:
        raise PackageError(f"manifest of {len(head)} bytes; allowed: {MAX_MANIFEST_BYTES}; shorten names and lists")
    f.write(_header(MANIFEST, len(head)) + head + bytes(-len(head) % _BLOCK))
    for m in manifest.members:
        f.write(_header(f"{m.path}.zst", m.stored_size_bytes))
        with stored[m.path].open("rb") as g:
            while block := g.read(_CHUNK):
                f.write(block)
        f.write(bytes(-m.stored_size_bytes % _BLOCK))
    f.write(bytes(_tail_length(f.tell())))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, regular file
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def _tail_length(position: int) -> int:
    """Two zero blocks, then zeros to a whole record of 20 blocks, as tar ends."""
    return 2 * _BLOCK + -(position + 2 * _BLOCK) % tarfile.RECORDSIZE


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        f = path.open("rb")
    except OSError as e:
        raise PackageError(f"package {path} cannot be read: {e.strerror}; correct the path") from e
    with f:
        yield f


def _read_manifest(f: BinaryIO) -> ReleaseManifest:
    block = f.read(_BLOCK)
    try:
        size = int(block[124:135], 8)
        expected = _header(MANIFEST, size)
    except ValueError as e:
        raise PackageError(f"not a package: it does not start with {MANIFEST}; pass a .qpkg file") from e
    if block != expected:
        raise PackageError(f"not a package: it starts with {_shown(block)}, expected {MANIFEST}; pass a .qpkg file")
    if size > MAX_MANIFEST_BYTES:
        raise PackageError(f"{MANIFEST}: {size} bytes; allowed: {MAX_MANIFEST_BYTES}; {_AGAIN}")
    data = f.read(size)
    try:
        manifest = manifest_from_json(json.loads(data))
        canonical = canonical_json(manifest.to_json())
    except (ValueError, RecursionError) as e:
        raise PackageError(f"{MANIFEST}: not valid JSON; {_AGAIN}") from e
    if canonical != data:
        raise PackageError(f"{MANIFEST}: not in canonical form; {_AGAIN}")
    _expect_zeros(f, -size % _BLOCK, MANIFEST)
    return manifest


def _expect_header(f: BinaryIO, name: str, size: int) -> None:
    block = f.read(_BLOCK)
    if block != _header(name, size):
        raise PackageError(f"package: found {_shown(block)} where {name} of {size} bytes must be; {_AGAIN}")


def _shown(block: bytes) -> str:
    if len(block) < _BLOCK:
        return "the end of the file"
    if not any(block):
        return "the end of the archive"
    name = block[:100].split(b"\0")[0].decode("ascii", "replace")
    kind = {b"0": "file", b"1": "hard link", b"2": "symbolic link", b"5": "folder"}.get(block[156:157], "special file")
    return f"{kind} {name!r}"


def _expect_zeros(f: BinaryIO, length: int, where: str) -> None:
    if f.read(length) != bytes(length):
        raise PackageError(f"{where}: padding is not zero or cut short; {_AGAIN}")


def _extract(f: BinaryIO, member: Member, target: Path) -> None:
    """Decode one member into `target`, never more than its stated size, and compare size and digest."""
    stored = _Slice(f, member.stored_size_bytes)
    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    digest, left = hashlib.sha256(), member.size_bytes
    with target.open("xb") as g:
        try:
            with decoder.stream_reader(cast(BinaryIO, stored), read_across_frames=True, closefd=False) as reader:
                while block := reader.read(min(_CHUNK, left + 1)):
                    left -= len(block)
                    if left < 0:
                        raise PackageError(f"{member.path}: more than {member.size_bytes} bytes; {_AGAIN}")
                    digest.update(block)
                    g.write(block)
        except zstandard.ZstdError as e:
            raise PackageError(f"{member.path}: not decodable ({e}); {_AGAIN}") from e
        g.flush()
        os.fsync(g.fileno())
    if left or stored.left or digest.hexdigest() != member.sha256:
        raise PackageError(f"{member.path}: bytes differ from the manifest's sha256 {member.sha256[:12]}; {_AGAIN}")


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


class _Slice:
    """The next `left` bytes of a file, as far as zstandard needs a file."""

    def __init__(self, f: BinaryIO, left: int) -> None:
        self.f, self.left = f, left

    def read(self, size: int = -1) -> bytes:
        data = self.f.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data
