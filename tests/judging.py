"""Reports as a gate reads them, made from columns; and every way to damage one."""

import copy
from dataclasses import replace

import numpy as np

from qcore.derived import (
    agreements,
    area_metrics,
    champion_metrics,
    class_counts,
    class_metrics,
    confusion,
    latency_of,
    mean,
    means,
    paired_counts,
    ratio_of,
)
from qcore.measured import Download, MeasuredModel, Rounds
from qcore.report import (
    ByModel,
    Champion,
    ClassDetails,
    EvaluationReport,
    MeasuredData,
    ProbabilityBin,
    Samples,
    Values,
)

MEASURED_AT = "2026-11-27T12:00:00Z"


TIMES = tuple(1 + 0.01 * k for k in range(-10, 10))
ROUNDS = Rounds(candidate=TIMES, baseline=tuple(2 * t for t in TIMES))
COSTS = {
    "rounds": {"latency": ROUNDS},
    "ratios": {"latency": ratio_of(ROUNDS)},
    "machine": {"cpu": "one"},
    "download": Download(released_sha256="d" * 64, delta_bytes=30),
}


def measured(digest: str, size: int = 100, factor: float = 1.0) -> MeasuredModel:
    latency = latency_of([factor * t for t in TIMES])
    return MeasuredModel(sha256=digest * 64, size_bytes=size, latency_ms=latency, package_bytes=size // 2)


def by_model(label, named):
    right = int((label == named).sum())
    return ByModel(
        confusion=confusion(label, named), reliability=(ProbabilityBin(count=len(label), right=right, confidence=0.9),)
    )


def report(wins: int, losses: int, n: int, *, both_wrong: int = 0, labelled: bool = True) -> EvaluationReport:
    """Return a report with these counts: classes 0 and 1, every label 0."""
    right = n - wins - losses - both_wrong
    candidate = (0,) * (right + wins) + (1,) * (losses + both_wrong)
    baseline = (0,) * right + (1,) * wins + (0,) * losses + (1,) * both_wrong
    return classified((0,) * n if labelled else None, baseline, candidate)


def classified(label, baseline, candidate, slices=None) -> EvaluationReport:
    """Return the report on these classes."""
    n, paired, details = len(baseline), None, None
    metrics = {"agreement": sum(b == c for b, c in zip(baseline, candidate, strict=True)) / n, "output_sqnr_db": 30.0}
    if label is not None:
        y, b, c = (np.array(column, np.int64) for column in (label, baseline, candidate))
        paired = paired_counts(c == y, b == y)
        details = ClassDetails(
            classes=class_counts(y, b, c), baseline=by_model(y, b), candidate=by_model(y, c), top5=None
        )
        metrics |= class_metrics(paired, details)
    data = MeasuredData(
        name="d",
        split="evaluation",
        task="none" if label is None else "classification",
        sha256="c" * 64,
        slices={name: len(part) for name, part in (slices or {}).items()},
    )
    return EvaluationReport(
        model=measured("a"),
        baseline=measured("b", 400, 2.0),
        data=data,
        n=n,
        metrics=metrics,
        paired=paired,
        details=details,
        samples=Samples(index=tuple(range(n)), label=label, baseline=baseline, candidate=candidate),
        slices=slices or {},
        runtime={},
        qcore_version="0",
        measured_at=MEASURED_AT,
        **COSTS,
    )


def valued(task, label=None, **values) -> EvaluationReport:
    """Return the report on a regression or on anomalies: pairs of columns by name."""
    columns = {k: Values(baseline=tuple(map(float, b)), candidate=tuple(map(float, c))) for k, (b, c) in values.items()}
    n = len(next(iter(columns.values())).baseline)
    metrics = {"output_sqnr_db": 30.0}
    if task == "regression":
        error = columns["absolute_error"]
        metrics |= {"mae": mean(error.candidate), "baseline_mae": mean(error.baseline)}
        metrics |= {"rmse": 2 * metrics["mae"], "baseline_rmse": 2 * metrics["baseline_mae"]}
    if task == "anomaly":
        metrics |= area_metrics(label, columns["score"])
    return EvaluationReport(
        model=measured("a"),
        baseline=measured("b", 400, 2.0),
        data=MeasuredData(name="d", split="evaluation", task=task, sha256="c" * 64),
        n=n,
        metrics=metrics,
        paired=None,
        samples=Samples(index=tuple(range(n)), label=label, baseline=None, candidate=None, values=columns),
        runtime={},
        qcore_version="0",
        measured_at=MEASURED_AT,
        **COSTS,
    )


def with_champion(given: EvaluationReport, champion, digest="e") -> EvaluationReport:
    """Return the report with a champion: the classes that it names, or numbers per sample by name of the column."""
    s, metrics, paired, released = given.samples, {**given.metrics, "champion_output_sqnr_db": 20.0}, None, {}
    if isinstance(champion, dict):
        values = {k: replace(v, champion=tuple(map(float, champion[k]))) for k, v in s.values.items()}
        samples = replace(s, values=values)
        if given.data.task == "regression":
            metrics |= means("mae", values["absolute_error"])
            metrics["champion_rmse"] = 2 * metrics["champion_mae"]
        if given.data.task == "anomaly":
            metrics |= area_metrics(s.label, values["score"])
        for name in given.user_metrics:
            metrics |= means(name, values[name])
    else:
        samples = replace(s, champion=tuple(champion))
        metrics |= agreements(s.baseline, s.candidate, champion)
        if s.label is not None:
            y, c, r = (np.array(column, np.int64) for column in (s.label, s.candidate, champion))
            paired = paired_counts(c == y, r == y)
            released = champion_metrics(paired, None)
    model = Champion(sha256=digest * 64, size_bytes=90, paired=paired, top5=None)
    return replace(given, samples=samples, metrics=metrics | released, champion=model)


def errors(n, more, rng=None):
    rng = rng or np.random.default_rng(0)
    base = rng.exponential(size=n)
    return valued("regression", absolute_error=(base, np.maximum(base + more + 0.05 * rng.normal(size=n), 0)))


def anomalies(positives, negatives, noise, seed=0):
    rng = np.random.default_rng(seed)
    label = (1,) * positives + (0,) * negatives
    base = rng.normal(size=len(label)) + 2 * np.array(label)
    return valued("anomaly", label, score=(base, base + noise * rng.normal(size=len(label))))


def grouped(sizes, losses):
    """Return a report whose slices have these sizes and lost so many samples."""
    n, slices, candidate, start = sum(sizes), {}, [0] * sum(sizes), 0
    for k, (size, lost) in enumerate(zip(sizes, losses, strict=True)):
        slices[f"s{k}"] = tuple(range(start, start + size))
        candidate[start : start + lost] = [1] * lost
        start += size
    return classified((0,) * n, (0,) * n, tuple(candidate), slices)


def places(value, path=()):
    """Yield the path of every field and of the first and last entry of every list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        if isinstance(value, dict) or key in (0, len(value) - 1):
            yield (*path, key)
            yield from places(part, (*path, key))


def damaged(value, path, how):
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if how == "deleted":
        del at[path[-1]]
    else:
        at[path[-1]] = how
    return value


WRONG = ["deleted", None, "x", float("nan"), float("inf"), -1, -0.5, True, [], {}, {"a": 1}, [None], "0"]
