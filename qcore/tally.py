"""What is kept of one pass over samples: per-sample columns, counts, and exact sums. Never outputs.

Tallies of consecutive parts of a split merge into that of the whole, bit for bit: columns are joined, counts added,
and sums of floats are kept as whole numbers in units of the smallest float64, so that their order does not matter.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from qcore.canonical import Json
from qcore.errors import DataError
from qcore.report import Direction, PairedCounts, Task, Values

_UNIT_BITS = 1074  # the smallest float64 is 2**-1074
_INFINITE = 1 << (sys.float_info.max_exp + _UNIT_BITS)


def exact(value: float) -> int:
    """Return `value` in units of the smallest float64; infinity and NaN are more than any float."""
    if not np.isfinite(value):
        return _INFINITE
    numerator, denominator = float(value).as_integer_ratio()
    return numerator << (_UNIT_BITS - (denominator.bit_length() - 1))


def rounded(total: int) -> float:
    """Return the float64 nearest to a sum of `exact` values, infinity above all of them."""
    return float("inf") if total >= _INFINITE else total / (1 << _UNIT_BITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Results of consecutive samples.

    `label`, `baseline`, `candidate` and `champion` are empty where there are none; `values` holds numbers per sample of
    each model. `sums` are of `exact` values: powers of outputs and of their errors, squared errors. `top5` counts
    samples by who has the label among its five largest outputs, `champion_top5` the same of candidate and champion.
    `bins` are those of top probabilities, a row of count, right
    and sum per bin.
    """

    task: Task
    classes: int
    user_metrics: Mapping[str, Direction]
    index: tuple[int, ...]
    label: tuple[int, ...]
    baseline: tuple[int, ...]
    candidate: tuple[int, ...]
    values: Mapping[str, Values] = field(default_factory=dict)
    sums: Mapping[str, int] = field(default_factory=dict)
    top5: PairedCounts | None = None
    champion: tuple[int, ...] = ()
    champion_top5: PairedCounts | None = None
    bins: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.index)


def merged(tallies: Sequence[Tally]) -> Tally:
    """Return the tally of consecutive parts, at least one, in the order of their samples."""
    first = tallies[0]
    for other in tallies:
        same = [(t.task, t.classes, dict(t.user_metrics), set(t.sums), set(t.values)) for t in (first, other)]
        columns = [(bool(t.label), bool(t.champion), t.champion_top5 is None) for t in (first, other)]
        if same[0] != same[1] or columns[0] != columns[1]:
            raise DataError(f"parts of an evaluation measured different things: {same[0]} and {same[1]}; merge one run")
    return Tally(
        task=first.task,
        classes=first.classes,
        user_metrics=first.user_metrics,
        index=_joined([t.index for t in tallies]),
        label=_joined([t.label for t in tallies]),
        baseline=_joined([t.baseline for t in tallies]),
        candidate=_joined([t.candidate for t in tallies]),
        champion=_joined([t.champion for t in tallies]),
        values={name: _joined_values([t.values[name] for t in tallies]) for name in first.values},
        sums={name: sum(t.sums[name] for t in tallies) for name in first.sums},
        top5=_added_counts([t.top5 for t in tallies]),
        champion_top5=_added_counts([t.champion_top5 for t in tallies]),
        bins={name: _added_bins([t.bins[name] for t in tallies]) for name in first.bins},
    )


def _joined(columns: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(v for column in columns for v in column)


def _joined_values(columns: Sequence[Values]) -> Values:
    champion = [c.champion for c in columns if c.champion is not None]
    if len(champion) not in (0, len(columns)):
        raise DataError("parts of an evaluation were measured with and without a champion; merge one run")
    return Values(
        baseline=tuple(v for c in columns for v in c.baseline),
        candidate=tuple(v for c in columns for v in c.candidate),
        champion=tuple(v for column in champion for v in column) if champion else None,
    )


def _added_counts(counts: Sequence[PairedCounts | None]) -> PairedCounts | None:
    there = [c for c in counts if c is not None]
    return added(there) if there else None


def added(counts: Sequence[PairedCounts]) -> PairedCounts:
    """Return the counts of all samples together."""
    return PairedCounts(**{f.name: sum(getattr(c, f.name) for c in counts) for f in fields(PairedCounts)})


def _added_bins(bins: Sequence[tuple[tuple[int, int, int], ...]]) -> tuple[tuple[int, int, int], ...]:
    total = np.sum([np.array(b, np.int64) for b in bins], axis=0)
    return tuple((int(a), int(b), int(c)) for a, b, c in total)


def tally_to_json(tally: Tally) -> Json:
    """Return the JSON form; sums are text, since they are longer than JSON numbers should be."""
    return {
        "task": tally.task,
        "classes": tally.classes,
        "user_metrics": dict(tally.user_metrics),
        "index": tally.index,
        "label": tally.label,
        "baseline": tally.baseline,
        "candidate": tally.candidate,
        "champion": tally.champion,
        "values": {k: {f.name: getattr(v, f.name) for f in fields(Values)} for k, v in tally.values.items()},
        "sums": {k: hex(v) for k, v in tally.sums.items()},
        "top5": None if tally.top5 is None else asdict(tally.top5),
        "champion_top5": None if tally.champion_top5 is None else asdict(tally.champion_top5),
        "bins": tally.bins,
    }


def tally_from_json(value: Json) -> Tally:
    """Return the tally that `tally_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: it did not.
    """
    columns = {k: tuple(int(x) for x in value[k]) for k in ("index", "label", "baseline", "candidate", "champion")}
    return Tally(
        task=value["task"],
        classes=int(value["classes"]),
        user_metrics=dict(value["user_metrics"]),
        **columns,
        values={
            k: Values(
                baseline=tuple(map(float, v["baseline"])),
                candidate=tuple(map(float, v["candidate"])),
                champion=None if v["champion"] is None else tuple(map(float, v["champion"])),
            )
            for k, v in value["values"].items()
        },
        sums={k: int(v, 16) for k, v in value["sums"].items()},
        top5=None if value["top5"] is None else PairedCounts(**value["top5"]),
        champion_top5=None if value["champion_top5"] is None else PairedCounts(**value["champion_top5"]),
        bins={k: tuple((int(a), int(b), int(c)) for a, b, c in v) for k, v in value["bins"].items()},
    )
