"""Does a report follow from its own samples? What can be counted again is; what does not fit is refused."""

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from qcore.derived import (
    agreements,
    area_metrics,
    champion_metrics,
    class_counts,
    class_metrics,
    confusion,
    latency_of,
    means,
    paired_counts,
    ratio_of,
)
from qcore.errors import GateRefused
from qcore.measured import TIMED, Latency, Ratio
from qcore.report import ClassDetails, EvaluationReport, Samples

ROUNDING = 1e-9  # of a number that was computed twice in float64, relative where it is above 1
AGAIN = "run `qcore evaluate` again"


def refuse_contradictions(report: EvaluationReport) -> None:
    """Refuse a report that lacks what its task has, or whose numbers do not follow from its samples.

    Raises:
        GateRefused: with the first thing that does not fit.
    """
    _refuse_lengths(report)
    _refuse_parts(report)
    _refuse_costs(report)
    derived = _derived(report)
    expected = {"output_sqnr_db", *derived} | set(_errors(report))
    expected |= set() if report.champion is None else {"champion_output_sqnr_db"}
    if odd := sorted(expected ^ set(report.metrics)):
        state = "lacks" if odd[0] in expected else "should not hold"
        raise GateRefused(f"the report {state} {odd[0]}; {AGAIN}")
    if any(not math.isfinite(v) for v in report.metrics.values()):
        raise GateRefused(f"the report holds a metric that is not finite; {AGAIN}")
    for name, value in derived.items():
        if abs(report.metrics[name] - value) > ROUNDING * max(1.0, abs(value)):
            raise GateRefused(f"the report's {name} does not follow from its samples; {AGAIN}")


def _refuse_lengths(report: EvaluationReport) -> None:
    s = report.samples
    named = (s.label, s.baseline, s.candidate, s.champion)
    columns: list[Sequence[float]] = [s.index, *(c for c in named if c is not None)]
    columns += [c for v in s.values.values() for c in (v.baseline, v.candidate, v.champion) if c is not None]
    lengths = {len(c) for c in columns}
    if lengths != {report.n} or report.n == 0:
        raise GateRefused(f"the report says n={report.n} but holds {sorted(lengths)} samples; {AGAIN}")
    if len(set(s.index)) != report.n or min(s.index) < 0:
        raise GateRefused(f"the report counts a sample twice, or one below 0; {AGAIN}")
    if {name: len(places) for name, places in report.slices.items()} != report.data.slices:
        raise GateRefused(f"the report's slices are not those of its data; {AGAIN}")
    for name, places in report.slices.items():
        if len(set(places)) != len(places) or not all(0 <= k < report.n for k in places):
            raise GateRefused(f"slice {name} names a sample twice, or one that is not there; {AGAIN}")


def _refuse_parts(report: EvaluationReport) -> None:
    """Refuse a report that lacks what its task has, or has more."""
    s, task = report.samples, report.data.task
    labelled = task == "classification"
    of_task = {"regression": {"absolute_error"}, "anomaly": {"score"}}.get(task, set())
    named = s.baseline is not None
    fits = {
        "labels": (s.label is not None) == (task in ("classification", "anomaly")),
        "arg-max": named == (s.candidate is not None) and (named == labelled or task == "none"),
        "paired counts": (report.paired is not None) == labelled,
        "details of classes": (report.details is not None) == labelled,
        "values": set(s.values) == of_task | set(report.user_metrics),
        "columns of a champion": _champion_fits(report),
    }
    for what, fit in fits.items():
        if not fit:
            raise GateRefused(f"the report's {what} are not those of task {task}; {AGAIN}")


def _champion_fits(report: EvaluationReport) -> bool:
    """Say whether the champion has results where the baseline has, and none where there is no champion."""
    s, champion = report.samples, report.champion
    there = champion is not None
    five = report.details is not None and report.details.top5 is not None
    return (
        (s.champion is not None) == (there and s.baseline is not None)
        and all((v.champion is not None) == there for v in s.values.values())
        and (champion is None or (champion.paired is not None) == (report.paired is not None))
        and (champion is None or (champion.top5 is not None) == five)
    )


def _refuse_costs(report: EvaluationReport) -> None:
    """Refuse latencies and ratios that do not follow from the rounds, and costs that no file has."""
    if odd := sorted(set(report.rounds) - set(TIMED)) or sorted(set(report.rounds) ^ set(report.ratios)):
        raise GateRefused(f"the report's rounds and ratios do not fit: {odd[0]}; {AGAIN}")
    for name, rounds in report.rounds.items():
        if not _same(report.ratios[name], ratio_of(rounds)):
            raise GateRefused(f"the report's ratio of {name} does not follow from its rounds; {AGAIN}")
    for who, model in (("baseline", report.baseline), ("candidate", report.model)):
        stated = dict(zip(TIMED, (model.latency_ms, model.latency_all_cores_ms, model.cold_start_ms), strict=True))
        for name, latency in stated.items():
            timed = report.rounds.get(name)
            if timed is None:
                follows = latency is None or name == "latency"  # a report always has one
            else:
                follows = latency is not None and _same(latency, latency_of(getattr(timed, who)))
            if not follows:
                raise GateRefused(f"the report's {name} of the {who} does not follow from its rounds; {AGAIN}")


def _same(stated: Latency | Ratio, derived: Latency | Ratio) -> bool:
    """Say whether two results are equal but for rounding."""
    pairs = [(getattr(stated, f.name), getattr(derived, f.name)) for f in fields(derived)]
    return all(a is b or (None not in (a, b) and math.isclose(a, b, rel_tol=ROUNDING)) for a, b in pairs)


def _derived(report: EvaluationReport) -> dict[str, float]:
    """Return the metrics that follow from the samples, after a look at everything else that does."""
    s = report.samples
    derived: dict[str, float] = {}
    if s.baseline is not None and s.candidate is not None:
        derived |= agreements(s.baseline, s.candidate, s.champion)
        if min(*s.baseline, *s.candidate, *(s.champion or ())) < 0:
            raise GateRefused(f"the report holds a class below 0; {AGAIN}")
    if report.details is not None:
        derived |= _class_metrics(report, report.details, s)
    if report.data.task == "regression":
        error = s.values["absolute_error"]
        derived |= means("mae", error)
        if min(*error.candidate, *error.baseline, *(error.champion or ())) < 0:
            raise GateRefused(f"the report holds an absolute error below 0; {AGAIN}")
    if report.data.task == "anomaly" and s.label is not None:
        if set(s.label) != {0, 1}:
            raise GateRefused(f"the report's labels are not both 0 and 1; {AGAIN}")
        derived |= area_metrics(s.label, s.values["score"])
    for name in report.user_metrics:
        derived |= means(name, s.values[name])
    return derived


def _class_metrics(report: EvaluationReport, details: ClassDetails, s: Samples) -> dict[str, float]:
    columns = (s.label or (), s.baseline or (), s.candidate or ())
    label, theirs, ours = (np.array(c, np.int64) for c in columns)
    if label.min() < 0:
        raise GateRefused(f"the report holds a label below 0; {AGAIN}")
    paired = paired_counts(ours == label, theirs == label)
    if report.paired != paired:
        raise GateRefused(f"the report's paired counts do not follow from its samples; {AGAIN}")
    follows = [
        details.classes == class_counts(label, theirs, ours),
        details.baseline.confusion == confusion(label, theirs),
        details.candidate.confusion == confusion(label, ours),
        details.top5 is None or details.top5.n == report.n,
    ]
    for side, right in (
        (details.baseline, paired.both_right + paired.only_baseline_right),
        (details.candidate, paired.both_right + paired.only_candidate_right),
    ):
        bins = side.reliability
        follows.append((sum(b.count for b in bins), sum(b.right for b in bins)) == (report.n, right))
        follows.append(all(0 <= b.right <= b.count and 0 <= b.confidence <= 1 for b in bins))
    if not all(follows):
        raise GateRefused(f"the report's details of classes do not follow from its samples; {AGAIN}")
    return class_metrics(paired, details) | _champion_metrics(report, details, ours == label)


def _champion_metrics(report: EvaluationReport, details: ClassDetails, right: NDArray[np.bool_]) -> dict[str, float]:
    """Return the champion's metrics of labelled classes, after a look at its counts; `right` are the candidate's."""
    champion, s = report.champion, report.samples
    if champion is None or champion.paired is None or s.champion is None:
        return {}
    if champion.paired != paired_counts(right, np.array(s.champion, np.int64) == np.array(s.label, np.int64)):
        raise GateRefused(f"the report's counts against the champion do not follow from its samples; {AGAIN}")
    five = (details.top5, champion.top5)
    if len({(c.n, c.both_right + c.only_candidate_right) for c in five if c is not None}) > 1:
        raise GateRefused(f"the report's top-5 counts against baseline and champion contradict each other; {AGAIN}")
    return champion_metrics(champion.paired, champion.top5)


def _errors(report: EvaluationReport) -> dict[str, float]:
    """Return the metrics of a regression that its samples do not give, after a look at whether they can be true."""
    m = report.metrics
    if report.data.task != "regression":
        return {}
    prefixes = ("", "baseline_") if report.champion is None else ("", "baseline_", "champion_")
    squared = any(f"{prefix}r2" in m for prefix in prefixes)
    names = [f"{prefix}{k}" for prefix in prefixes for k in ("rmse", *(["r2"] if squared else []))]
    for prefix in prefixes:
        if m.get(f"{prefix}rmse", math.inf) < m.get(f"{prefix}mae", 0.0) * (1 - ROUNDING):
            raise GateRefused(f"the report's {prefix}rmse is below its {prefix}mae; {AGAIN}")
    return dict.fromkeys(names, 0.0)
