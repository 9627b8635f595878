"""Samples of a split by their place, in any order: what training asks for. Memory does not grow with their number.

Arrays of an `.npz` are compressed front to back, so each is unpacked once to a file of raw rows, which the operating
system maps into memory as far as it likes. Images are read one by one.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj

import numpy as np
from numpy.typing import NDArray

from qcore.data.dataset import Batch, Dataset, is_image_folder, prepared_batch
from qcore.data.images import ImageFile, image_files, read_image

Rows = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """An opened split; `read` gives any of its samples."""

    data: Dataset
    columns: Mapping[str, Sequence[Rows]]
    images: tuple[ImageFile, ...]

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.data.n

    def read(self, places: NDArray[np.int64]) -> Batch:
        """Return the samples at `places` of the split (0 to n - 1), in that order, prepared for the model.

        Raises:
            DataError: one cannot be read, holds NaN or infinity, or does not fit the preprocessing.
        """
        index = tuple(self.data.indices[int(k)] for k in places)
        if self.images:
            card = self.data.card
            read = [read_image(self.data.source / self.images[i].name, card.preprocess) for i in index]
            group: dict[str, Rows] = {"": np.stack(read)}
        else:
            group = {name: np.stack([_row(shards, i) for i in index]) for name, shards in self.columns.items()}
        labels = self.data.labels
        y = None if labels is None else np.array([labels[int(k)] for k in places], np.int64)
        return prepared_batch(self.data, group, index, y)


def open_samples(data: Dataset, folder: Path) -> Samples:
    """Return the samples of `data` ready to be read in any order.

    Args:
        data: one split.
        folder: an existing one; unpacked arrays are written there and stay until the caller removes it.
    """
    if is_image_folder(data.card, data.source):
        return Samples(data=data, columns={}, images=tuple(image_files(data.source, data.card, data.folder)))
    names = data.card.inputs or {"": data.card.x}
    shards = sorted(data.source.glob("*.npz")) if data.source.is_dir() else [data.source]
    columns = {
        name: [_unpacked(shard, array, folder / f"{k}-{c}.npy") for k, shard in enumerate(shards)]
        for c, (name, array) in enumerate(names.items())
    }
    return Samples(data=data, columns=columns, images=())


def _unpacked(shard: Path, array: str, out: Path) -> Rows:
    with zipfile.ZipFile(shard) as archive, archive.open(f"{array}.npy") as stored, out.open("wb") as file:
        copyfileobj(stored, file, 1 << 20)
    rows: Rows = np.load(out, mmap_mode="r")
    return rows


def _row(shards: Sequence[Rows], index: int) -> Rows:
    for rows in shards:
        if index < len(rows):
            found: Rows = rows[index]
            return found
        index -= len(rows)
    raise IndexError(index)
