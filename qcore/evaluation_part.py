"""Part of an evaluation: what one process measured on consecutive samples of a split, and how parts become a report.

An evaluation in one process is the part that holds all samples, so that shards merge to its bytes; only latency and
the time of measuring differ, as they do between any two runs. Latency is measured by the part with the first sample;
the time is that of the part that began first, since a report is as old as the oldest thing in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from qcore.canonical import Digest, Json
from qcore.derived import latency_of, ratio_of
from qcore.errors import DataError
from qcore.evaluation import result_of
from qcore.measured import Download, MeasuredModel, Rounds
from qcore.report import Champion, EvaluationReport, MeasuredData
from qcore.tally import Tally, merged, tally_from_json, tally_to_json

PART_SCHEMA = "qcore.evaluation-part/2"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """Digest and size of a model file."""

    sha256: Digest
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What the models cost on one machine; of pairs the candidate is first, and None was not measured.

    `rounds` are those of a report, of latency at least.
    """

    rounds: Mapping[str, Rounds]
    package_bytes: tuple[int | None, int | None]
    peak_memory_bytes: tuple[int | None, int | None]
    machine: Mapping[str, str]
    download: Download | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Samples at places `start` to `stop - 1` of a split of `size`.

    `slices` holds the places in the stored data of the whole split; `costs` is None but in the part with the first
    sample. `champion` is the released model's file, None without one. `measured_at` is when this part began, as in the
    report.
    """

    model: ModelFile
    baseline: ModelFile
    data: MeasuredData
    slices: Mapping[str, tuple[int, ...]]
    size: int
    batch: int
    runtime: Mapping[str, str]
    qcore_version: str
    measured_at: str
    champion: ModelFile | None
    start: int
    stop: int
    costs: Costs | None
    tally: Tally


SAME = ("model", "baseline", "champion", "data", "slices", "size", "batch", "runtime", "qcore_version")
"""Fields that all parts of one evaluation share."""


def merge_parts(parts: Sequence[Part]) -> Part:
    """Return all parts of a split as one; their order does not matter.

    Raises:
        DataError: no part, parts of different runs, or samples that are missing or in two of them.
    """
    if not parts:
        raise DataError("there are no parts of an evaluation to merge; pass the files of `qcore evaluate --shard`")
    ordered = sorted(parts, key=lambda p: p.start)
    for part in ordered:
        for name in SAME:
            if getattr(part, name) != getattr(ordered[0], name):
                raise DataError(
                    f"parts disagree on {name}: {_shown(ordered[0], name)} and {_shown(part, name)}; merge shards of "
                    "one run, on machines of one kind"
                )
    place = 0
    for part in ordered:
        if part.start != place:
            state = "missing" if part.start > place else "in two parts"
            first, last = sorted((place, part.start))
            raise DataError(f"samples {first} to {last - 1} of the split are {state}; merge every shard once")
        place = part.stop
    if place != ordered[0].size:
        raise DataError(f"samples {place} to {ordered[0].size - 1} of the split are missing; merge every shard once")
    began = min(p.measured_at for p in ordered)
    return replace(ordered[0], stop=place, measured_at=began, tally=merged([p.tally for p in ordered]))


def _shown(part: Part, name: str) -> str:
    text = str(getattr(part, name))
    return text if len(text) <= 80 else f"{text[:77]}..."


def report_of(part: Part) -> EvaluationReport:
    """Return the report on a split that is whole.

    Raises:
        DataError: it is not, or nobody measured what the models cost.
    """
    if (part.start, part.stop) != (0, part.size) or part.costs is None:
        raise DataError(f"samples {part.start} to {part.stop - 1} of {part.size} are no report; merge all shards first")
    result = result_of(part.tally)
    place = {index: k for k, index in enumerate(result.samples.index)}
    return EvaluationReport(
        model=_measured(part.model, part.costs, 0),
        baseline=_measured(part.baseline, part.costs, 1),
        data=part.data,
        n=result.n,
        metrics=result.metrics,
        paired=result.paired,
        samples=result.samples,
        runtime=part.runtime,
        qcore_version=part.qcore_version,
        measured_at=part.measured_at,
        champion=None
        if part.champion is None
        else Champion(**asdict(part.champion), paired=result.champion_paired, top5=part.tally.champion_top5),
        details=result.details,
        slices={name: tuple(place[i] for i in places if i in place) for name, places in part.slices.items()},
        user_metrics=result.user_metrics,
        rounds=part.costs.rounds,
        ratios={name: ratio_of(rounds) for name, rounds in part.costs.rounds.items()},
        machine=part.costs.machine,
        download=part.costs.download,
    )


def _measured(file: ModelFile, costs: Costs, k: int) -> MeasuredModel:
    """Return the candidate (`k` 0) or the baseline (1) with what it costs."""
    columns = {name: (rounds.candidate, rounds.baseline)[k] for name, rounds in costs.rounds.items()}
    latency = {name: latency_of(column) for name, column in columns.items()}
    return MeasuredModel(
        **asdict(file),
        latency_ms=latency["latency"],
        package_bytes=costs.package_bytes[k],
        latency_all_cores_ms=latency.get("latency_all_cores"),
        cold_start_ms=latency.get("cold_start"),
        peak_memory_bytes=costs.peak_memory_bytes[k],
    )


def part_to_json(part: Part) -> Json:
    """Return the JSON form (`qcore.evaluation-part/2`)."""
    flat = {f.name: getattr(part, f.name) for f in fields(Part) if f.name != "tally"}
    flat |= {name: asdict(flat[name]) for name in ("model", "baseline", "data")}
    flat["champion"] = None if part.champion is None else asdict(part.champion)
    flat["costs"] = None if part.costs is None else asdict(part.costs)
    return {"schema": PART_SCHEMA, **flat, "tally": tally_to_json(part.tally)}


def part_from_json(value: Json) -> Part:
    """Return the part that `part_to_json` wrote.

    Raises:
        DataError: it did not.
    """
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != PART_SCHEMA:
        raise DataError(f"expected schema {PART_SCHEMA}, found {found}; pass the files of `qcore evaluate --shard`")
    try:
        kept = {k: value[k] for k in ("size", "batch", "runtime", "qcore_version", "measured_at", "start", "stop")}
        tally, costs = tally_from_json(value["tally"]), value["costs"]
        if tally.n != value["stop"] - value["start"]:
            raise ValueError(f"{tally.n} samples for places {value['start']} to {value['stop']}")
        return Part(
            **kept,
            model=ModelFile(**value["model"]),
            baseline=ModelFile(**value["baseline"]),
            champion=None if value["champion"] is None else ModelFile(**value["champion"]),
            data=MeasuredData(**value["data"]),
            slices={k: tuple(v) for k, v in value["slices"].items()},
            costs=None if costs is None else _costs(costs),
            tally=tally,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise DataError(f"the part of an evaluation is damaged ({e}); run `qcore evaluate --shard` again") from e


def _costs(value: Json) -> Costs:
    sizes = {k: (value[k][0], value[k][1]) for k in ("package_bytes", "peak_memory_bytes")}
    timed = {k: {who: tuple(map(float, column)) for who, column in v.items()} for k, v in value["rounds"].items()}
    if "latency" not in timed:
        raise ValueError("no latency")
    return Costs(
        **sizes,
        rounds={k: Rounds(**columns) for k, columns in timed.items()},
        machine={str(k): str(v) for k, v in value["machine"].items()},
        download=None if value["download"] is None else Download(**value["download"]),
    )
