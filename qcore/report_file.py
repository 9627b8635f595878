"""An evaluation report read back from JSON: every field there, of the right type, and none beside them.

Strict, because the gate decides on what it reads: a field that is missing, damaged or unknown refuses the report.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, TypeVar, get_args

from qcore.canonical import Json
from qcore.errors import GateRefused
from qcore.measured import Download, Latency, MeasuredModel, Ratio, Rounds
from qcore.report import (
    REPORT_SCHEMA,
    TIME_FORM,
    ByModel,
    Champion,
    ClassCount,
    ClassDetails,
    Direction,
    EvaluationReport,
    MeasuredData,
    PairedCounts,
    ProbabilityBin,
    Samples,
    Values,
)

T = TypeVar("T")


def report_from_json(value: Json) -> EvaluationReport:
    """Return the report that `to_json` wrote.

    Raises:
        GateRefused: a field is missing, unknown, of another type or of the wrong schema.
    """
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if isinstance(found, str) and found.startswith("qcore.evaluation-part/"):
        raise GateRefused(
            "this is the part that one shard measured, not an evaluation report; run `qcore merge-reports` over the "
            "parts of all shards and pass what it writes"
        )
    if found != REPORT_SCHEMA:
        raise GateRefused(
            f"expected an evaluation report of schema {REPORT_SCHEMA}, found {found}; run `qcore evaluate` again"
        )
    v = _object(value, "report", [*(f.name for f in fields(EvaluationReport)), "schema", "latency_ms"])
    report = EvaluationReport(
        model=_measured(v["model"], "model"),
        baseline=_measured(v["baseline"], "baseline"),
        data=_data(v["data"]),
        n=_whole(v["n"], "n"),
        metrics=_mapping(v["metrics"], "metrics", _number),
        paired=_counts(v["paired"], "paired"),
        samples=_samples(v["samples"]),
        runtime=_mapping(v["runtime"], "runtime", _text),
        qcore_version=_text(v["qcore_version"], "qcore_version"),
        measured_at=_time(v["measured_at"], "measured_at"),
        champion=None if v["champion"] is None else _champion(v["champion"]),
        details=None if v["details"] is None else _details(v["details"]),
        slices=_mapping(v["slices"], "slices", _integers),
        user_metrics=_mapping(v["user_metrics"], "user_metrics", _direction),
        rounds=_mapping(v["rounds"], "rounds", _rounds),
        ratios=_mapping(v["ratios"], "ratios", _ratio),
        machine=_mapping(v["machine"], "machine", _text),
        download=None if v["download"] is None else Download(**_of(Download, v["download"], "download")),
    )
    if _latency(v["latency_ms"], "latency_ms") != report.model.latency_ms:
        raise _wrong("latency_ms", v["latency_ms"], "that of the model")
    return report


def _wrong(where: str, found: object, allowed: str) -> GateRefused:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return GateRefused(f"evaluation report: {where} is {shown}; allowed: {allowed}; run `qcore evaluate` again")


def _object(value: Json, where: str, names: list[str]) -> dict[str, Any]:
    """Return `value` if it is an object with exactly these fields."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    if odd := sorted(set(names) ^ set(value)):
        state = "missing" if odd[0] in names else "unknown"
        raise GateRefused(f"evaluation report: {where} field {odd[0]!r} is {state}; run `qcore evaluate` again")
    return value


def _of(kind: type[T], value: Json, where: str) -> dict[str, Any]:
    return _object(value, where, [f.name for f in fields(kind)])  # type: ignore[arg-type]


def _mapping(value: Json, where: str, each: Callable[[Json, str], T]) -> Mapping[str, T]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    return {k: each(v, f"{where}.{k}") for k, v in value.items()}


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, value, "text")
    return value


def _whole(value: Json, where: str) -> int:
    if type(value) is not int:
        raise _wrong(where, value, "a whole number")
    return value


def _number(value: Json, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong(where, value, "a finite number")
    return float(value)


def _direction(value: Json, where: str) -> Direction:
    if value not in get_args(Direction):
        raise _wrong(where, value, ", ".join(get_args(Direction)))
    return value  # type: ignore[no-any-return]


def _column(value: Json, where: str, kinds: set[type]) -> tuple[Any, ...]:
    """Return a list of numbers as a tuple; the types are compared at once, since there may be millions."""
    if not isinstance(value, list | tuple) or not set(map(type, value)) <= kinds:
        raise _wrong(where, value, "a list of numbers")
    return tuple(value)


def _integers(value: Json, where: str) -> tuple[int, ...]:
    column = _column(value, where, {int})
    if column and not -(1 << 63) <= min(column) <= max(column) < 1 << 63:
        raise _wrong(where, "a number beyond 64 bits", "whole numbers of 64 bits")
    return column


def _optional(value: Json, where: str) -> tuple[int, ...] | None:
    return None if value is None else _integers(value, where)


def _numbers(value: Json, where: str) -> tuple[float, ...]:
    column = _column(value, where, {int, float})
    if not all(map(math.isfinite, column)):
        raise _wrong(where, value, "finite numbers")
    return column


def _latency(value: Json, where: str) -> Latency:
    v = _of(Latency, value, where)
    return Latency(p50=_number(v["p50"], where), p95=_number(v["p95"], where), runs=_whole(v["runs"], where))


def _measured(value: Json, where: str) -> MeasuredModel:
    v = _of(MeasuredModel, value, where)
    further = ("latency_all_cores_ms", "cold_start_ms")
    timed = {k: None if v[k] is None else _latency(v[k], f"{where}.{k}") for k in further}
    return MeasuredModel(**{**v, **timed, "latency_ms": _latency(v["latency_ms"], f"{where}.latency_ms")})


def _rounds(value: Json, where: str) -> Rounds:
    v = _of(Rounds, value, where)
    return Rounds(baseline=_numbers(v["baseline"], where), candidate=_numbers(v["candidate"], where))


def _ratio(value: Json, where: str) -> Ratio:
    v = _of(Ratio, value, where)
    low, high = (None if v[k] is None else _number(v[k], f"{where}.{k}") for k in ("low", "high"))
    return Ratio(value=_number(v["value"], where), low=low, high=high)


def _data(value: Json) -> MeasuredData:
    v = _of(MeasuredData, value, "data")
    return MeasuredData(**{**v, "slices": _mapping(v["slices"], "data.slices", _whole)})


def _time(value: Json, where: str) -> str:
    text = _text(value, where)
    try:
        if datetime.strptime(text, TIME_FORM).strftime(TIME_FORM) == text:
            return text
    except ValueError:
        pass
    raise _wrong(where, value, "a time in UTC such as 2026-11-27T14:30:00Z")


def _champion(value: Json) -> Champion:
    v = _of(Champion, value, "champion")
    return Champion(
        sha256=v["sha256"],
        size_bytes=v["size_bytes"],
        paired=_counts(v["paired"], "champion.paired"),
        top5=_counts(v["top5"], "champion.top5"),
    )


def _counts(value: Json, where: str) -> PairedCounts | None:
    return None if value is None else PairedCounts(**_of(PairedCounts, value, where))


def _samples(value: Json) -> Samples:
    v = _of(Samples, value, "samples")
    return Samples(
        index=_integers(v["index"], "samples.index"),
        label=_optional(v["label"], "samples.label"),
        baseline=_optional(v["baseline"], "samples.baseline"),
        candidate=_optional(v["candidate"], "samples.candidate"),
        values=_mapping(v["values"], "samples.values", _values),
        champion=_optional(v["champion"], "samples.champion"),
    )


def _values(value: Json, where: str) -> Values:
    v = _of(Values, value, where)
    champion = None if v["champion"] is None else _numbers(v["champion"], where)
    return Values(baseline=_numbers(v["baseline"], where), candidate=_numbers(v["candidate"], where), champion=champion)


def _details(value: Json) -> ClassDetails:
    v = _of(ClassDetails, value, "details")
    rows = v["classes"] if isinstance(v["classes"], list | tuple) else [v["classes"]]
    classes = (_of(ClassCount, row, "details.classes") for row in rows)
    return ClassDetails(
        classes=tuple(ClassCount(**{k: _whole(x, f"details.classes.{k}") for k, x in c.items()}) for c in classes),
        baseline=_by_model(v["baseline"], "details.baseline"),
        candidate=_by_model(v["candidate"], "details.candidate"),
        top5=_counts(v["top5"], "details.top5"),
    )


def _by_model(value: Json, where: str) -> ByModel:
    v = _of(ByModel, value, where)
    if not all(isinstance(v[k], list | tuple) for k in ("confusion", "reliability")):
        raise _wrong(where, value, "lists of cells and bins")
    cells = [_integers(cell, f"{where}.confusion") for cell in v["confusion"]]
    if any(len(cell) != 3 for cell in cells):
        raise _wrong(f"{where}.confusion", v["confusion"], "triples")
    bins = [_of(ProbabilityBin, b, f"{where}.reliability") for b in v["reliability"]]
    return ByModel(
        confusion=tuple((a, b, c) for a, b, c in cells),
        reliability=tuple(
            ProbabilityBin(
                count=_whole(b["count"], f"{where}.reliability"),
                right=_whole(b["right"], f"{where}.reliability"),
                confidence=_number(b["confidence"], f"{where}.reliability"),
            )
            for b in bins
        ),
    )
