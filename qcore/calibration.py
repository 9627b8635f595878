"""Calibration: evidence about the activations of one model, mergeable across batches and shards.

A table keeps statistics, not ranges, so one run over the data serves every range rule. Memory does not grow with the
number of samples: one batch of activations and one histogram per tensor. Running the model is somebody else's job
(`runtime/ort.py`); this file only counts.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore.canonical import Digest, Json
from qcore.errors import CalibrationError
from qcore.files import write_json
from qcore.numerics.stats import DEFAULT_BINS, TensorStats, merge_stats, tensor_stats

Tensors = Mapping[str, NDArray[Any]]
TABLE_SCHEMA = "qcore.calibration/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTable:
    """Statistics of the float activations of one model over `samples` samples of one data set.

    `model_sha256` and `data_sha256` say what was measured; `quantize` refuses a table of another model.
    """

    model_sha256: Digest
    data_sha256: Digest
    samples: int
    bins: int
    stats: Mapping[str, TensorStats]

    def to_json(self) -> Json:
        """Return the JSON form; histograms are run from `first` in steps of `2**exponent`."""
        return {
            "schema": TABLE_SCHEMA,
            "model_sha256": self.model_sha256,
            "data_sha256": self.data_sha256,
            "samples": self.samples,
            "bins": self.bins,
            "tensors": {
                name: {
                    "count": s.count,
                    "low": s.low,
                    "high": s.high,
                    "exponent": s.exponent,
                    "first": s.first,
                    "histogram": s.histogram.tolist(),
                }
                for name, s in sorted(self.stats.items())
            },
        }


def calibrate(
    activations: Iterable[tuple[int, Tensors]],
    *,
    model_sha256: Digest,
    data_sha256: Digest,
    bins: int = DEFAULT_BINS,
) -> CalibrationTable:
    """Return the table of all `activations`, read once and not kept.

    Args:
        activations: per batch the number of samples and the float tensors by name.
        model_sha256: digest of the model file that ran.
        data_sha256: digest of the samples and their preprocessing.
        bins: histogram resolution.

    Raises:
        CalibrationError: no batch came, or a tensor holds NaN or infinity.
    """
    stats: dict[str, TensorStats] = {}
    samples = 0
    for n, tensors in activations:
        samples += n
        for name, x in tensors.items():
            try:
                new = tensor_stats(x, bins=bins)
            except ValueError as e:
                raise CalibrationError(
                    f"activation {name}: {e} in samples {samples - n} to {samples - 1}; allowed: finite values; check "
                    "the preprocessing of the data card"
                ) from e
            stats[name] = merge_stats(stats[name], new) if name in stats else new
    if samples == 0:
        raise CalibrationError("the calibration split has no samples; allowed: at least 1; check the data card")
    return CalibrationTable(model_sha256=model_sha256, data_sha256=data_sha256, samples=samples, bins=bins, stats=stats)


def merge_tables(tables: Iterable[CalibrationTable]) -> CalibrationTable:
    """Return the table of all shards together; order and grouping do not matter.

    The data digest of the result is that of the first table: shards of one split carry the same digest.

    Raises:
        CalibrationError: no table, or tables of different models, data, bins or tensors.
    """
    merged: CalibrationTable | None = None
    for table in tables:
        merged = table if merged is None else _merge_two(merged, table)
    if merged is None:
        raise CalibrationError("no calibration tables to merge; pass at least one")
    return merged


def _merge_two(a: CalibrationTable, b: CalibrationTable) -> CalibrationTable:
    for field in ("model_sha256", "data_sha256", "bins"):
        if getattr(a, field) != getattr(b, field):
            raise CalibrationError(
                f"tables disagree on {field}: {getattr(a, field)} and {getattr(b, field)}; merge shards of one run"
            )
    if a.stats.keys() != b.stats.keys():
        odd = sorted(a.stats.keys() ^ b.stats.keys())[0]
        raise CalibrationError(f"tables disagree on tensors (first: {odd}); merge shards of one run")
    stats = {name: merge_stats(a.stats[name], b.stats[name]) for name in a.stats}
    return CalibrationTable(
        model_sha256=a.model_sha256,
        data_sha256=a.data_sha256,
        samples=a.samples + b.samples,
        bins=a.bins,
        stats=stats,
    )


def save_table(table: CalibrationTable, path: Path) -> None:
    """Write `table` to `path` as canonical JSON: the same table gives the same bytes."""
    write_json(path, table.to_json())


def load_table(path: Path) -> CalibrationTable:
    """Return the table that `save_table` wrote.

    Raises:
        CalibrationError: the file is missing or is not a calibration table.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise CalibrationError(f"calibration table {path} does not exist; run `qcore calibrate`") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CalibrationError(f"{path} is not a calibration table ({e}); run `qcore calibrate`") from e
    if not isinstance(value, dict) or value.get("schema") != TABLE_SCHEMA:
        raise CalibrationError(f"{path} is not a calibration table of schema {TABLE_SCHEMA}; run `qcore calibrate`")
    try:
        return _table_from_json(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise CalibrationError(f"{path} is a damaged calibration table ({e}); run `qcore calibrate` again") from e


def _table_from_json(value: Json) -> CalibrationTable:
    """Return the table; each tensor's statistics must follow from one another (`TensorStats`)."""
    bins = value["bins"]
    return CalibrationTable(
        model_sha256=value["model_sha256"],
        data_sha256=value["data_sha256"],
        samples=value["samples"],
        bins=bins,
        stats={
            name: TensorStats(
                s["count"], s["low"], s["high"], bins, s["exponent"], s["first"], np.array(s["histogram"], np.int64)
            )
            for name, s in value["tensors"].items()
        },
    )
