"""Arrays in `.npz` files, read row by row: the whole array is never in memory.

`np.load` would decompress an array at once. Here the `.npy` member is a stream: header first, then rows in order.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qcore.errors import DataError
from qcore.files import sha256_file

MAX_LABEL = 1 << 31


class NpzFile:
    """One `.npz`, or a folder of `.npz` shards that are read as one, in sorted order of their names."""

    def __init__(self, path: Path) -> None:
        self.shards = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not self.shards:
            raise DataError(f"folder {path} holds no .npz files; check `path` in the card")

    def digests(self) -> list[str]:
        """Return the SHA-256 of every shard, in order."""
        return [sha256_file(shard) for shard in self.shards]

    def rows(self, arrays: Sequence[str]) -> int:
        """Return the number of samples; all `arrays` must have it in every shard."""
        return sum(self._shard_rows(shard, arrays) for shard in self.shards)

    def labels(self, array: str, total: int, indices: Sequence[int]) -> tuple[int, ...]:
        """Return the labels at `indices`.

        Raises:
            DataError: no such array, not integers, or not one per sample.
        """
        parts = [self._whole(shard, array) for shard in self.shards]
        y = np.concatenate([p.reshape(len(p), int(np.prod(p.shape[1:]))) if p.ndim else p.reshape(1, 1) for p in parts])
        if y.shape != (total, 1):
            raise DataError(f"labels {array!r} in {self.shards[0].name} have shape {y.shape}; allowed: ({total},)")
        if not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"labels {array!r} in {self.shards[0].name} are {y.dtype}; allowed: integer class numbers")
        if y.max(initial=0) > MAX_LABEL or y.min(initial=0) < -MAX_LABEL:
            raise DataError(f"labels {array!r} in {self.shards[0].name} exceed {MAX_LABEL}; allowed: class numbers")
        return tuple(int(v) for v in y[list(indices), 0])

    def column(self, array: str, total: int) -> NDArray[np.generic]:
        """Return an array with one row of numbers per sample as (total, values).

        Raises:
            DataError: no such array, or not one row per sample.
        """
        parts = [self._whole(shard, array) for shard in self.shards]
        rows = np.concatenate([p.reshape(len(p), -1) if p.size and p.ndim else p.reshape(0, 1) for p in parts])
        if len(rows) != total:
            raise DataError(
                f"array {array!r} in {self.shards[0].name} has {len(rows)} rows; allowed: {total}, one per sample; "
                "correct the card"
            )
        return rows

    def batches(
        self, arrays: Mapping[str, str], indices: Sequence[int], size: int
    ) -> Iterator[dict[str, NDArray[np.generic]]]:
        """Yield the rows `indices` (ascending) of `arrays` (model input -> array name), `size` at a time."""
        columns = {name: self._picked(array, indices) for name, array in arrays.items()}
        for start in range(0, len(indices), size):
            n = min(size, len(indices) - start)
            with _readable(self.shards[0]):
                batch = {name: np.stack([next(column) for _ in range(n)]) for name, column in columns.items()}
            yield batch
        with _readable(self.shards[0]):
            for column in columns.values():
                next(column, None)  # reads the rest, so that damage anywhere is seen

    def _picked(self, array: str, indices: Sequence[int]) -> Iterator[NDArray[np.generic]]:
        wanted, offset = iter(indices), 0
        target = next(wanted, None)
        for shard in self.shards:
            rows = self._shard_rows(shard, [array])
            if target is not None and target < offset + rows:
                with zipfile.ZipFile(shard) as archive, archive.open(f"{array}.npy") as stream:
                    shape, dtype = _header(stream, shard, array)
                    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
                    position = offset
                    while target is not None and target < offset + rows:
                        _skip(stream, (target - position) * row_bytes)
                        yield np.frombuffer(_exactly(stream, row_bytes, shard), dtype).reshape(shape[1:])
                        position = target + 1
                        target = next(wanted, None)
                    while stream.read(1 << 20):
                        pass  # only at its end is the member's checksum compared
            offset += rows

    def _shard_rows(self, shard: Path, arrays: Sequence[str]) -> int:
        counts = {}
        for array in arrays:
            with _readable(shard), _opened(shard, array) as stream:
                shape, _ = _header(stream, shard, array)
                counts[array] = shape[0] if shape else 0
        if len(set(counts.values())) != 1:
            raise DataError(f"arrays of {shard.name} have different lengths: {counts}; allowed: one row per sample")
        return next(iter(counts.values()))

    def _whole(self, shard: Path, array: str) -> NDArray[np.generic]:
        with _readable(shard), _opened(shard, array) as stream:
            _header(stream, shard, array)
        with _readable(shard), _opened(shard, array) as stream:
            result: NDArray[np.generic] = npy.read_array(stream, allow_pickle=False)
            return result


@contextmanager
def _readable(shard: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as e:
        raise DataError(f"{shard.name} is damaged ({e}); write it again with numpy.savez") from e


def _opened(shard: Path, array: str) -> IO[bytes]:
    """Open one member of a shard; closing the stream closes nothing else, the archive goes with it."""
    try:
        archive = zipfile.ZipFile(shard)
    except zipfile.BadZipFile as e:
        raise DataError(f"{shard} is not an .npz file ({e}); write it with numpy.savez") from e
    except OSError as e:
        raise DataError(f"{shard} cannot be read: {e.strerror}; check its permissions") from e
    try:
        return archive.open(f"{array}.npy")
    except KeyError as e:
        known = ", ".join(n.removesuffix(".npy") for n in archive.namelist())
        raise DataError(f"{shard.name} has no array {array!r}; it holds: {known}; set `x`, `y` in the card") from e


def _header(stream: IO[bytes], shard: Path, array: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as e:
        raise DataError(f"array {array!r} in {shard.name} is not a numpy array ({e}); write it again") from e
    if dtype.kind not in "fiub":
        kind = "Python objects" if dtype.hasobject else f"of dtype {dtype}"
        raise DataError(f"array {array!r} in {shard.name} is {kind}; allowed: real numbers; convert and write it again")
    if fortran and len(shape) > 1:
        raise DataError(f"array {array!r} in {shard.name} is column-major; pass it through numpy.ascontiguousarray")
    return shape, dtype


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(_exactly(stream, min(size, 1 << 20), None))


def _exactly(stream: IO[bytes], size: int, shard: Path | None) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise DataError(f"{shard.name if shard else 'npz file'} is truncated; write it again")
    return data
