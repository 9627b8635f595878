"""What a card says of samples beside their classes: targets of a regression, anomalies, and slices."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qcore.data.card import DataCard
from qcore.data.npz import NpzFile
from qcore.errors import DataError

MAX_SLICES = 1000
"""Values of one array that are slices: more are no groups that anybody looks at."""


def targets_of(card: DataCard, npz: NpzFile, total: int) -> NDArray[np.float64] | None:
    """Return what outputs of all stored samples are held against, (total, outputs); None for classes or no task.

    Raises:
        DataError: targets are not finite, or an anomaly is neither 0 nor 1.
    """
    if card.task not in ("regression", "anomaly"):
        return None
    rows = npz.column(card.y, total).astype(np.float64)
    if not np.isfinite(rows).all():
        at = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise DataError(f"target {at} of {card.name} is NaN or infinite; allowed: finite values; remove the sample")
    if card.task == "anomaly":
        _refuse_other_than_two(card, rows)
    return rows


def targets_of_folders(card: DataCard, labels: Sequence[int]) -> NDArray[np.float64] | None:
    """Return the targets of images in class folders: for anomalies the class number, 0 or 1.

    Raises:
        DataError: images have no targets of a regression, or there are more than two folders.
    """
    if card.task == "regression":
        raise DataError(f"{card.name} is a regression on images, which have class folders only; store an npz with `y`")
    if card.task != "anomaly":
        return None
    rows = np.array(labels, np.float64)[:, None]
    _refuse_other_than_two(card, rows)
    return rows


def _refuse_other_than_two(card: DataCard, rows: NDArray[np.float64]) -> None:
    odd = rows[(rows != 0) & (rows != 1)]
    if odd.size or rows.shape[1] != 1:
        shown = f"{rows.shape[1]} values per sample" if rows.shape[1] != 1 else f"the value {odd[0]:g}"
        raise DataError(
            f"labels of {card.name} hold {shown}; allowed for anomalies: one 0 (normal) or 1 (odd) per sample; correct "
            "`y`, or `classes` of image folders"
        )


def slices_of(card: DataCard, npz: NpzFile | None, total: int) -> Mapping[str, tuple[int, ...]]:
    """Return the places in the stored data of each slice; those of an array are called `array=value`.

    Raises:
        DataError: a place is not in the data, an array does not hold one whole number per sample or too many values.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, where in (card.slices or {}).items():
        if not isinstance(where, str):
            if any(not 0 <= i < total for i in where) or len(set(where)) != len(where):
                raise DataError(f"slice {name!r} of {card.name} has places that repeat or are outside 0 to {total - 1}")
            found[name] = tuple(sorted(where))
        elif npz is None:
            raise DataError(f"slice {name!r} of {card.name} names an array; allowed for image folders: lists of places")
        else:
            found |= _slices_of_array(card, name, npz.column(where, total))
    return found


def _slices_of_array(card: DataCard, name: str, rows: NDArray[np.generic]) -> dict[str, tuple[int, ...]]:
    values = np.unique(rows)
    if rows.shape[1] != 1 or rows.dtype.kind not in "iub" or len(values) > MAX_SLICES:
        raise DataError(
            f"slice {name!r} of {card.name} is {rows.dtype}, {rows.shape[1]} per sample, with {len(values)} values; "
            f"allowed: one whole number per sample, at most {MAX_SLICES} values; correct `slices`"
        )
    return {f"{name}={v}": tuple(np.flatnonzero(rows[:, 0] == v).tolist()) for v in values}
