"""Admission of golden samples: is this `.npz` what numpy may load? Read without numpy, header by header.

An `.npz` is a zip of `.npy` files. A header of a hundred bytes may claim a terabyte, a deflated member may be a bomb,
and a dtype of objects is a pickle, which is a program. So members are stored and not deflated, headers are of the one
form that numpy writes, and every array has exactly the bytes that its shape and type want.

Standard library only, because the device asks too. Source: numpy.lib.format (NEP 1), PKWARE APPNOTE 6.3.10.
"""

import math
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from qcore.errors import PackageError
from qcore.release.manifest import ReleaseManifest, TensorInfo

MAX_HEADER_BYTES = 1 << 12
MAX_ARRAYS = 256
MAX_RANK = 32
_MAGIC = re.compile(rb"\x93NUMPY([\x01\x02\x03])\x00", re.DOTALL)
_HEADER = re.compile(
    r"\{'descr': '[<|]([fiubUS])(\d{1,6})', 'fortran_order': (?:False|True), "
    r"'shape': \(((?:\d{1,12}, )*\d{1,12},?|)\), \} *\n",
    re.ASCII,
)
_ELEMENTS = {"U": 4}
"""Bytes of a unit of the size in a type's name, where it is not one byte."""
_AGAIN = "build the package again"
_BROKEN = (zipfile.BadZipFile, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError, OverflowError)
"""What zipfile raises for files that are none, for unknown versions and for encryption."""


def admit_golden(path: Path, manifest: ReleaseManifest) -> None:
    """Return if `path` holds the golden samples that `manifest` speaks of, and nothing that surprises a reader.

    Raises:
        PackageError: with the first thing that is not admitted.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    wanted = [*_names("input", manifest.inputs), *_names("output", manifest.outputs)]
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            found = sorted(m.filename for m in members)
            if found != sorted(wanted) or len(found) > MAX_ARRAYS:
                raise PackageError(f"{path.name}: holds {found[:8]}, expected {sorted(wanted)[:8]}; {_AGAIN}")
            offsets = [m.header_offset for m in members]
            if sum(m.compress_size for m in members) > size or min(offsets) != 0 or max(offsets) >= size:
                raise PackageError(f"{path.name}: its members overlap, are cut short, or something precedes; {_AGAIN}")
            for member in members:
                shape = _admit_member(archive, member)
                if member.filename.startswith("output:") and shape[:1] != (manifest.golden.n,):
                    raise PackageError(f"{member.filename}: shape {shape}, expected n={manifest.golden.n}; {_AGAIN}")
    except _BROKEN as e:
        raise PackageError(f"{path.name}: not an .npz file ({' '.join(str(e).split())[:100]}); {_AGAIN}") from e


def _names(kind: str, tensors: Sequence[TensorInfo]) -> list[str]:
    return [f"{kind}:{t.name}.npy" for t in tensors]


def _admit_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[int, ...]:
    """Return the shape of an array whose bytes are those that its header asks for."""
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise PackageError(f"{name}: compressed inside the .npz, expected stored; write it with numpy.savez")
    with archive.open(member) as f:
        shape, item, head = _header(f, name)
    if head + (wanted := item * math.prod(shape)) != member.file_size:
        raise PackageError(f"{name}: {member.file_size - head} bytes of values, shape {shape} wants {wanted}; {_AGAIN}")
    return shape


def _header(f: IO[bytes], name: str) -> tuple[tuple[int, ...], int, int]:
    """Return shape, bytes of an element, and bytes of the header of one `.npy` file."""
    start = f.read(8)
    magic = _MAGIC.fullmatch(start)
    if magic is None:
        raise PackageError(f"{name}: not an .npy file; {_AGAIN}")
    width = 2 if magic[1] == b"\x01" else 4
    length = int.from_bytes(f.read(width), "little")
    if length > MAX_HEADER_BYTES:
        raise PackageError(f"{name}: a header of {length} bytes; allowed: {MAX_HEADER_BYTES}; {_AGAIN}")
    text = f.read(length)
    header = _HEADER.fullmatch(text.decode("latin-1"))
    if len(text) != length or header is None:
        raise PackageError(
            f"{name}: header {text[:60]!r} is not one of plain numbers or text; objects are never loaded; {_AGAIN}"
        )
    shape = tuple(int(s) for s in header[3].replace(" ", "").split(",") if s)
    if len(shape) > MAX_RANK:
        raise PackageError(f"{name}: {len(shape)} dimensions; allowed: {MAX_RANK}; {_AGAIN}")
    return shape, int(header[2]) * _ELEMENTS.get(header[1], 1), 8 + width + length
