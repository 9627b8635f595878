"""Calibration: evidence about the activations of one model, mergeable across batches and shards.

A table keeps statistics, not ranges, so one run over the data serves every range rule. Memory does not grow with the
number of samples: one sample's activations (in pieces, if they are large) and one histogram per tensor. Running the
model is somebody else's job (`runtime/ort.py`); this file only counts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcore.canonical import Digest, Json, sha256_json
from qcore.errors import CalibrationError, NotFiniteError
from qcore.files import write_json
from qcore.numerics.stats import (
    DEFAULT_BINS,
    DEFAULT_DECAY,
    TensorStats,
    add_sample,
    average_weight,
    merge_stats,
)

Tensors = Mapping[str, NDArray[Any]]
Positions = tuple[tuple[int, int], ...]
"""Places in a split, from 0: ascending ranges [start, end) that do not touch."""

DEFAULT_VALUES = 1_638_400
"""How many values of a tensor all samples together put into its histogram, about: more cost time, and no range."""

_FEWEST = 1 << 10  # values of a tensor and sample
TABLE_SCHEMA = "qcore.calibration/4"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """What decides a table besides model and data.

    `bins` is the histogram resolution; `decay` what a sample's weight in the moving average is multiplied by with
    each sample after it; `tensors` the patterns that chose the tensors (empty: all); `batch` the samples per run;
    `values` about how many values of a tensor its histogram counts, all samples of the split together: each sample
    gives as many, and at least 1024 if it has them.

    Raises:
        CalibrationError: a value out of range.
    """

    bins: int = DEFAULT_BINS
    decay: float = DEFAULT_DECAY
    tensors: tuple[str, ...] = ()
    batch: int = 1
    values: int = DEFAULT_VALUES

    def __post_init__(self) -> None:
        """Hold 16 <= bins <= 65536, 0 <= decay < 1 and values >= 1."""
        if self.values < 1:
            raise CalibrationError(f"values is {self.values}; allowed: 1 or more; {DEFAULT_VALUES} suits 8 bits")
        if not 16 <= self.bins <= 1 << 16:
            raise CalibrationError(f"bins is {self.bins}; allowed: 16 to 65536; 2048 suits 8 bits")
        if not 0 <= self.decay < 1:
            raise CalibrationError(f"decay is {self.decay}; allowed: 0 to less than 1; 0.99 remembers 100 samples")

    def to_json(self) -> Json:
        """Return the JSON form."""
        own = {"bins": self.bins, "decay": self.decay, "batch": self.batch, "values": self.values}
        return {**own, "tensors": list(self.tensors)}


_DEFAULT_OPTIONS = CalibrationOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What one process counts of a split of `size` samples: those at places `start` to `stop - 1`.

    The model runs in `threads` threads, 0 for one per core; they do not change the result.
    """

    size: int
    start: int
    stop: int
    threads: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTable:
    """Statistics of the float activations of one model over samples of one split.

    `model_sha256`, `data_sha256` (samples, preprocessing, split) and `options` say what was measured; `size` is the
    number of samples of the split, and `positions` those of them that are in the table.
    """

    model_sha256: Digest
    data_sha256: Digest
    options: CalibrationOptions
    size: int
    positions: Positions
    stats: Mapping[str, TensorStats]

    @property
    def samples(self) -> int:
        """How many samples are in the table."""
        return sum(end - start for start, end in self.positions)

    @property
    def key(self) -> Digest:
        """The digest of everything that decides the table of the whole split; shards of one run share it."""
        return sha256_json([self.model_sha256, self.data_sha256, self.options.to_json()])

    def to_json(self) -> Json:
        """Return the JSON form; histograms run from `first` in steps of `2**exponent`, sums are decimal strings."""
        return {
            "schema": TABLE_SCHEMA,
            "key": self.key,
            "model_sha256": self.model_sha256,
            "data_sha256": self.data_sha256,
            "options": self.options.to_json(),
            "size": self.size,
            "positions": [list(p) for p in self.positions],
            "tensors": {name: _stats_to_json(s) for name, s in sorted(self.stats.items())},
        }


def calibrate(
    activations: Iterable[tuple[int, Tensors]],
    *,
    model_sha256: Digest,
    data_sha256: Digest,
    options: CalibrationOptions = _DEFAULT_OPTIONS,
    shard: Shard | None = None,
) -> CalibrationTable:
    """Return the table of all `activations`, read once and not kept.

    Args:
        activations: the number of samples of a batch and float tensors by name; further tensors of the same batch
            may follow with the number 0. Samples of a batch are told apart along axis 0, if a tensor has it.
        model_sha256: digest of the model file that ran.
        data_sha256: digest of the samples and their preprocessing.
        options: what is counted, and how finely.
        shard: which samples these are. None: they are a whole split; then all activations are held until their
            number is known.

    Raises:
        CalibrationError: the samples are not those of the shard, or a tensor holds NaN or infinity.
    """
    if shard is None:
        activations = list(activations)
        total = sum(n for n, _ in activations)
        shard = Shard(size=total, start=0, stop=total)
    stats: dict[str, TensorStats] = {}
    end = shard.start
    weights: tuple[int, ...] = ()
    values = max(_FEWEST, options.values // max(1, shard.size))
    for n, tensors in activations:
        if n:
            weights = tuple(average_weight(end + k, shard.size, options.decay) for k in range(n))
            end += n
        place = _Place(weights=weights, end=end, bins=options.bins, values=values)
        # One after the other: counting holds the interpreter's lock, and threads would only wait for each other.
        for name, x in tensors.items():
            if x.size:
                stats[name] = _count(stats.get(name), name, x, place)
        del tensors  # or it would live while the next one is made
    if end == shard.start:
        raise CalibrationError("the calibration split has no samples; allowed: at least 1; check the data card")
    if end != shard.stop:
        raise CalibrationError(f"samples {shard.start} to {shard.stop - 1} were announced, but they end at {end - 1}")
    return CalibrationTable(
        model_sha256=model_sha256,
        data_sha256=data_sha256,
        options=options,
        size=shard.size,
        positions=((shard.start, end),),
        stats=stats,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """The weights of the samples of a batch, the place of the sample behind it, and what is counted how finely.

    `values` is how many values of a tensor each sample's histogram counts, about.
    """

    weights: tuple[int, ...]
    end: int
    bins: int
    values: int


def _count(stats: TensorStats | None, name: str, x: NDArray[Any], place: _Place) -> TensorStats:
    many = len(place.weights) > 1 and x.ndim > 0 and len(x) == len(place.weights)
    rows = zip(x, place.weights, strict=True) if many else [(x, sum(place.weights))]
    try:
        for row, weight in rows:
            stats = add_sample(stats, row, bins=place.bins, weight=weight, values=place.values)
    except ValueError as e:
        first = place.end - len(place.weights)
        where = f"sample {first}" if first + 1 == place.end else f"samples {first} to {place.end - 1}"
        raise NotFiniteError(
            f"activation {name}: {e} in {where} of the split; allowed: finite values; check the preprocessing of the "
            "data card"
        ) from e
    assert stats is not None  # noqa: S101 - a batch has at least one sample
    return stats


def shard_of(size: int, index: int, count: int, *, batch: int = 1) -> Shard:
    """Return shard `index` (from 1) of `count`: consecutive samples, cut between batches, so no batch is torn.

    Raises:
        CalibrationError: there is no such shard, or it would be empty.
    """
    if not 1 <= index <= count:
        raise CalibrationError(f"shard {index}/{count} does not exist; allowed: 1/{count} to {count}/{count}")
    groups = -(-size // batch)
    start, stop = (min(size, batch * (groups * k // count)) for k in (index - 1, index))
    if start == stop:
        raise CalibrationError(
            f"shard {index}/{count} of {size} samples is empty; allowed: at most {groups} shards; ask for fewer"
        )
    return Shard(size=size, start=start, stop=stop)


def merge_tables(tables: Iterable[CalibrationTable]) -> CalibrationTable:
    """Return the table of all shards together; order and grouping do not matter.

    Raises:
        CalibrationError: no table; tables of different models, data or options; or a sample that is in two of them.
    """
    merged: CalibrationTable | None = None
    for table in tables:
        merged = table if merged is None else _merge_two(merged, table)
    if merged is None:
        raise CalibrationError("no calibration tables to merge; pass at least one")
    return merged


def _merge_two(a: CalibrationTable, b: CalibrationTable) -> CalibrationTable:
    for what in ("model_sha256", "data_sha256", "options", "size"):
        if getattr(a, what) != getattr(b, what):
            raise CalibrationError(
                f"tables disagree on {what}: {getattr(a, what)} and {getattr(b, what)}; merge shards of one run"
            )
    stats = dict(a.stats)
    for name, s in b.stats.items():
        stats[name] = merge_stats(stats[name], s) if name in stats else s
    return CalibrationTable(
        model_sha256=a.model_sha256,
        data_sha256=a.data_sha256,
        options=a.options,
        size=a.size,
        positions=_joined([*a.positions, *b.positions]),
        stats=stats,
    )


def _joined(ranges: Sequence[tuple[int, int]]) -> Positions:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            twice = (start, min(end, joined[-1][1]))
            raise CalibrationError(f"tables share samples {_places([twice])} of the split; merge every shard once")
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def missing_positions(table: CalibrationTable) -> Positions:
    """Return the places of the split that are not in `table`."""
    ends = [0, *(end for _, end in table.positions)]
    starts = [*(start for start, _ in table.positions), table.size]
    return tuple((a, b) for a, b in zip(ends, starts, strict=True) if a < b)


def check_table(table: CalibrationTable, *, model_sha256: Digest, name: str) -> None:
    """Hold that `table` is of the whole split, and of this model.

    Args:
        table: the table that ranges will be read from.
        model_sha256: digest of the model that will be quantized.
        name: what messages call the model.

    Raises:
        CalibrationError: it is of another model, or samples are missing.
    """
    if table.model_sha256 != model_sha256:
        raise CalibrationError(
            f"the calibration table is of model {table.model_sha256[:12]}, but {name} is {model_sha256[:12]}; run "
            "`qcore calibrate` on this model"
        )
    if missing := missing_positions(table):
        raise CalibrationError(
            f"the calibration table holds {table.samples} of {table.size} samples; missing: {_places(missing)}; run "
            "`qcore merge-tables` with all shards"
        )


def _places(ranges: Sequence[tuple[int, int]]) -> str:
    named = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in ranges]
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more ranges" if len(named) > 5 else "")


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
        table = _table_from_json(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise CalibrationError(f"{path} is a damaged calibration table ({e}); run `qcore calibrate` again") from e
    if value.get("key") != table.key:
        raise CalibrationError(f"{path} is a damaged calibration table (its key differs); run `qcore calibrate` again")
    return table


def _stats_to_json(s: TensorStats) -> Json:
    return {
        "count": s.count,
        "low": s.low,
        "high": s.high,
        "exponent": s.exponent,
        "first": s.first,
        "histogram": s.histogram.tolist(),
        "average": {"weight": str(s.weight), "low_sum": str(s.low_sum), "high_sum": str(s.high_sum)},
    }


def _stats_from_json(s: Json, bins: int) -> TensorStats:
    average = (int(s["average"][k]) for k in ("weight", "low_sum", "high_sum"))
    histogram = np.array(s["histogram"], np.int64)
    stats = TensorStats(s["count"], s["low"], s["high"], bins, s["exponent"], s["first"], histogram, *average)
    stats.check()
    return stats


def _table_from_json(value: Json) -> CalibrationTable:
    """Return the table; each tensor's statistics must follow from one another (`TensorStats`)."""
    options = CalibrationOptions(**{**value["options"], "tensors": tuple(value["options"]["tensors"])})
    positions = tuple((int(start), int(end)) for start, end in value["positions"])
    flat = [place for p in positions for place in p]
    if not flat or flat != sorted(set(flat)) or flat[0] < 0 or flat[-1] > value["size"]:
        raise ValueError(f"positions {positions} in a split of {value['size']}")
    return CalibrationTable(
        model_sha256=value["model_sha256"],
        data_sha256=value["data_sha256"],
        options=options,
        size=value["size"],
        positions=positions,
        stats={name: _stats_from_json(s, options.bins) for name, s in value["tensors"].items()},
    )
