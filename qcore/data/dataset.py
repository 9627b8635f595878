"""The samples of one split, streamed in batches; memory does not grow with their number.

Samples come in the order of their index in the stored data, whatever permutation chose them: statistics and paired
comparisons do not depend on the order, and a stored array can then be read from front to back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcore.canonical import Digest, sha256_json
from qcore.data.card import DataCard, Split, load_card
from qcore.data.images import image_files, read_image
from qcore.data.npz import NpzFile
from qcore.data.preprocess import prepare_arrays
from qcore.data.truth import slices_of, targets_of, targets_of_folders
from qcore.errors import DataError
from qcore.files import sha256_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some samples: `index` (n,) int64 in the stored data, `x` by model input ("" for the only one), labels, targets.

    `y` (n,) is None where the data has no classes, `target` (n, outputs) where no regression or anomalies.
    """

    index: NDArray[np.int64]
    x: Mapping[str, NDArray[np.generic]]
    y: NDArray[np.int64] | None
    target: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One split of a card, opened but not read.

    `indices` is ascending; `sha256` covers samples, preprocessing and slices. `targets` (stored samples, outputs) are
    what a regression or anomalies are held against, of all stored samples; `slices` holds places in the stored data.
    """

    card: DataCard
    folder: Path
    split: str
    source: Path
    indices: tuple[int, ...]
    labels: tuple[int, ...] | None
    sha256: Digest
    targets: NDArray[np.float64] | None = None
    slices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.indices)


def open_dataset(path: Path, split: str) -> Dataset:
    """Return split `split` of the card at `path`.

    Raises:
        DataError: missing split, file or folder; labels that do not fit; an empty split.
        ConfigError: the card is wrong.
    """
    card, folder, _ = load_card(path)
    if card.inputs and (card.preprocess or card.layout or card.model_layout):
        raise DataError(
            f"data card {card.name} has `inputs` together with preprocess or layout; arrays of several inputs go to "
            "the model as they are stored; store them prepared"
        )
    if split not in card.splits:
        raise DataError(f"data card {card.name} has no split {split!r}; allowed: {', '.join(card.splits)}")
    source = _source(card, folder, card.splits[split])
    npz, targets = None, None
    if is_image_folder(card, source):
        files = image_files(source, card, folder)
        targets = targets_of_folders(card, [file.label for file in files])
        total = len(files)
        indices = _choose(card, split, len(files))
        labels = tuple(files[i].label for i in indices) if card.task == "classification" else None
        content: list[object] = [[files[i].name, sha256_file(source / files[i].name)] for i in indices]
    else:
        _refuse_geometric(card)
        npz = NpzFile(source)
        arrays = list(card.inputs.values()) if card.inputs else [card.x]
        total = npz.rows(arrays)
        indices = _choose(card, split, total)
        labels = npz.labels(card.y, total, indices) if card.task == "classification" else None
        targets = targets_of(card, npz, total)
        content = [*npz.digests(), list(indices)]
    if not indices:
        raise DataError(f"split {split!r} of {card.name} is empty; allowed: at least 1 sample; check the card")
    prepared = card.model_dump(
        mode="json", include={"task", "layout", "model_layout", "preprocess", "inputs", "x", "y"}
    )
    if card.slices:
        prepared["slices"] = card.slices
    return Dataset(
        card=card,
        folder=folder,
        split=split,
        source=source,
        indices=indices,
        labels=labels,
        sha256=sha256_json({"content": content, "prepared": prepared, "split": split}),
        targets=targets,
        slices=slices_of(card, npz, total),
    )


def data_sources(path: Path) -> list[Path]:
    """Return every file and folder that the card at `path` reads, the card itself first."""
    card, folder, file = load_card(path)
    named = {card.path, *(split.path for split in card.splits.values())}
    sources = [folder / p for p in sorted(p for p in named if p is not None)]
    return [file, *sources, *([folder / card.classes] if isinstance(card.classes, str) else [])]


def shared_samples(a: Dataset, b: Dataset) -> int:
    """Return how many samples are in both splits; splits of different files share none."""
    return len(set(a.indices) & set(b.indices)) if a.source.resolve() == b.source.resolve() else 0


FEWEST_FOR_CLASSES = 10
"""Of fewer samples one class alone says nothing about a split."""


def one_class(data: Dataset) -> int | None:
    """Return the class of all samples of `data`, None where they have several, no labels, or are fewer than ten.

    Stored data are often sorted by class; a split that was cut from them sees nothing of the others.
    """
    if data.labels is None or data.n < FEWEST_FOR_CLASSES or any(y != data.labels[0] for y in data.labels):
        return None
    return data.labels[0]


def some_samples(data: Dataset, n: int) -> Dataset:
    """Return `n` samples of `data`, evenly spread over it; all of them if it has no more."""
    if n >= data.n:
        return data
    chosen = [k * data.n // n for k in range(n)]
    indices = tuple(data.indices[k] for k in chosen)
    labels = None if data.labels is None else tuple(data.labels[k] for k in chosen)
    digest = sha256_json({"of": data.sha256, "indices": list(indices)})
    return replace(data, indices=indices, labels=labels, sha256=digest)


def part_of(data: Dataset, start: int, stop: int) -> Dataset:
    """Return the samples of `data` at places `start` to `stop - 1`; the digest stays that of the whole split."""
    labels = None if data.labels is None else data.labels[start:stop]
    return replace(data, indices=data.indices[start:stop], labels=labels)


def batches(data: Dataset, size: int) -> Iterator[Batch]:
    """Yield the samples of `data`, prepared for the model, `size` at a time (the last batch may be smaller).

    Raises:
        DataError: a sample cannot be read, holds NaN or infinity, or does not fit the preprocessing.
    """
    if is_image_folder(data.card, data.source):
        files = image_files(data.source, data.card, data.folder)
        groups: Iterator[dict[str, NDArray[np.generic]]] = (
            {"": np.stack([read_image(data.source / files[i].name, data.card.preprocess) for i in part])}
            for part in _parts(data.indices, size)
        )
    else:
        names = data.card.inputs or {"": data.card.x}
        groups = NpzFile(data.source).batches(names, data.indices, size)
    position = 0
    for group in groups:
        n = len(next(iter(group.values())))
        y = None if data.labels is None else np.array(data.labels[position : position + n], np.int64)
        batch = prepared_batch(data, group, data.indices[position : position + n], y)
        yield batch if data.targets is None else replace(batch, target=data.targets[batch.index])
        position += n


def layouts(data: Dataset) -> tuple[str, str]:
    """Return how samples are stored and how the model wants them; "" where the card does not say."""
    if is_image_folder(data.card, data.source):
        return "NHWC", data.card.model_layout or data.card.layout or "NCHW"
    stored = data.card.layout or ""
    return stored, data.card.model_layout or stored


def prepared_batch(
    data: Dataset, group: Mapping[str, NDArray[np.generic]], index: Sequence[int], y: NDArray[np.int64] | None
) -> Batch:
    """Return the batch of samples that are stored as `group`.

    Args:
        data: the split.
        group: arrays by model input, samples first.
        index: their places in the stored data.
        y: their labels.

    Raises:
        DataError: a sample holds NaN or infinity, or does not fit the preprocessing.
    """
    x = group if data.card.inputs else {"": prepare_arrays(group[""], data.card.preprocess, *layouts(data))}
    _refuse_non_finite(x, index, data)
    return Batch(index=np.array(index, np.int64), x=x, y=y)


def _refuse_geometric(card: DataCard) -> None:
    for step in card.preprocess:
        if step.normalize is None and step.scale is None:
            name = next(iter(step.model_fields_set))
            raise DataError(f"preprocess step {name!r} works on image folders; {card.name} is npz; store it resized")


def _parts(indices: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _refuse_non_finite(x: Mapping[str, NDArray[np.generic]], index: Sequence[int], data: Dataset) -> None:
    for array in x.values():
        if np.issubdtype(array.dtype, np.floating):
            bad = ~np.isfinite(array.reshape(len(array), -1).astype(np.float64)).all(axis=1)
            if bad.any():
                raise DataError(
                    f"sample {index[int(np.argmax(bad))]} of {data.card.name} ({data.source.name}) holds NaN or "
                    "infinity; allowed: finite values; remove or repair the sample"
                )


def _source(card: DataCard, folder: Path, split: Split) -> Path:
    relative = split.path or card.path
    if relative is None:
        raise DataError(f"data card {card.name} has no path; set `path` in the card or in the split")
    source = folder / relative
    if not source.exists():
        raise DataError(f"data {source} of card {card.name} does not exist; check `path` in the card")
    return source


def is_image_folder(card: DataCard, source: Path) -> bool:
    """Say whether the samples are image files and not arrays."""
    if card.format == "image_folder":
        if not source.is_dir():
            raise DataError(f"data {source} is a file; allowed for image_folder: a folder of class folders")
        return True
    return card.format is None and source.is_dir() and not any(source.glob("*.npz"))


def _choose(card: DataCard, split: str, total: int) -> tuple[int, ...]:
    """Return the ascending sample numbers of `split` among `total` samples."""
    wanted = card.splits[split]
    if wanted.range is not None:
        start, end = wanted.range
        if not 0 <= start <= end <= total:
            raise DataError(f"split {split!r} is range [{start}, {end}]; allowed: within [0, {total}]")
        return tuple(range(start, end))
    if wanted.indices is not None:
        if any(not 0 <= i < total for i in wanted.indices) or len(set(wanted.indices)) != len(wanted.indices):
            raise DataError(f"split {split!r} has indices that repeat or are outside 0 to {total - 1}")
        return tuple(sorted(wanted.indices))
    if wanted.count is None and wanted.fraction is None and wanted.rest is None:
        return tuple(range(total))
    order = np.random.default_rng(card.seed).permutation(total)
    start = 0
    for name, other in card.splits.items():
        if other.path != wanted.path or (other.count is None and other.fraction is None and other.rest is None):
            continue
        size = total - start if other.rest else other.count or round((other.fraction or 0) * total)
        if start + size > total:
            raise DataError(f"split {name!r} wants {size} samples; {total - start} of {total} are left; lower it")
        if name == split:
            return tuple(sorted(int(i) for i in order[start : start + size]))
        start += size
    raise AssertionError("the split is one of the card's")  # pragma: no cover
