"""Numbers that follow from per-sample results: what `evaluate` writes into a report, and the gate counts again."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qcore.measured import Latency, Ratio, Rounds
from qcore.numerics.bounds import roc_area
from qcore.numerics.order import median_bounds
from qcore.numerics.reliability import expected_calibration_error
from qcore.report import ByModel, ClassCount, ClassDetails, EvaluationReport, PairedCounts, Values

Ints = NDArray[np.int64]


def paired_counts(candidate: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> PairedCounts:
    """Return the counts of samples by who is right."""
    both, right, was_right = (int(np.count_nonzero(x)) for x in (candidate & baseline, candidate, baseline))
    return PairedCounts(
        both_right=both,
        only_candidate_right=right - both,
        only_baseline_right=was_right - both,
        both_wrong=len(candidate) - right - was_right + both,
    )


def class_counts(label: Ints, baseline: Ints, candidate: Ints) -> tuple[ClassCount, ...]:
    """Return support and right answers of every class that has samples."""
    columns = [np.bincount(label, weights=w) for w in (None, baseline == label, candidate == label)]
    return tuple(
        ClassCount(label=k, support=int(n), baseline_right=int(b), candidate_right=int(c))
        for k, (n, b, c) in enumerate(zip(*columns, strict=True))
        if n
    )


def confusion(label: Ints, named: Ints) -> tuple[tuple[int, int, int], ...]:
    """Return the cells (label, predicted, count) of the confusion matrix that are not zero, in order."""
    width = int(named.max()) + 1
    cells, counts = np.unique(label * width + named, return_counts=True)
    labels, predicted = np.divmod(cells, width)
    return tuple(zip(labels.tolist(), predicted.tolist(), counts.tolist(), strict=True))


def class_metrics(paired: PairedCounts, details: ClassDetails) -> dict[str, float]:
    """Return the metrics of labelled classes: top-1, top-5 and the expected calibration error."""
    counts = {"top1": paired} | ({} if details.top5 is None else {"top5": details.top5})
    metrics: dict[str, float] = {}
    for name, c in counts.items():
        metrics[name] = (c.both_right + c.only_candidate_right) / c.n
        metrics[f"baseline_{name}"] = (c.both_right + c.only_baseline_right) / c.n
        metrics[f"{name}_delta"] = (c.only_candidate_right - c.only_baseline_right) / c.n
    return metrics | {
        "ece": _calibration_error(details.candidate),
        "baseline_ece": _calibration_error(details.baseline),
    }


def _calibration_error(side: ByModel) -> float:
    rows = np.array([(b.count, b.right, b.confidence) for b in side.reliability], np.float64)
    return expected_calibration_error(*rows.T)


def area_metrics(label: Sequence[int], scores: Values) -> dict[str, float]:
    """Return the areas under the ROC curves; there must be samples of both kinds."""
    positive = np.array(label) == 1
    return {k: roc_area(positive, np.array(column, np.float64)) for k, column in _sides("auc", scores).items()}


def means(name: str, values: Values) -> dict[str, float]:
    """Return the means of a column: `name` of the candidate, `baseline_name`, `champion_name` where there is one."""
    return {k: mean(column) for k, column in _sides(name, values).items()}


def _sides(name: str, values: Values) -> dict[str, Sequence[float]]:
    sides: dict[str, Sequence[float]] = {name: values.candidate, f"baseline_{name}": values.baseline}
    return sides if values.champion is None else {**sides, f"champion_{name}": values.champion}


def agreements(baseline: Sequence[int], candidate: Sequence[int], champion: Sequence[int] | None) -> dict[str, float]:
    """Return the share of samples on which the candidate names the baseline's class, and that of the champion."""
    theirs = np.array(baseline)
    sides = {"agreement": candidate} | ({} if champion is None else {"champion_agreement": champion})
    return {name: float(np.mean(theirs == np.array(column))) for name, column in sides.items()}


def champion_metrics(paired: PairedCounts, top5: PairedCounts | None) -> dict[str, float]:
    """Return the champion's top-1 and top-5, from its counts against the candidate."""
    counts = {"top1": paired} | ({} if top5 is None else {"top5": top5})
    return {f"champion_{k}": (c.both_right + c.only_baseline_right) / c.n for k, c in counts.items()}


def mean(values: Sequence[float]) -> float:
    """Return the mean of a column, rounded once."""
    return math.fsum(values) / len(values)


def latency_of(times: Sequence[float]) -> Latency:
    """Return median and 95th percentile of times in milliseconds, at least one."""
    p50, p95 = np.percentile(np.array(times, np.float64), [50, 95])
    return Latency(p50=float(p50), p95=float(p95), runs=len(times))


def round_ratios(rounds: Rounds) -> tuple[float, ...]:
    """Return candidate / baseline of every round."""
    return tuple(c / b for c, b in zip(rounds.candidate, rounds.baseline, strict=True))


RATIO_CONFIDENCE = 0.95


def ratio_of(rounds: Rounds) -> Ratio:
    """Return the median ratio of neighbours in time, with its bounds at 95 % on both sides.

    A machine that slows down for a while slows both models of a round, so their ratio stays; a call that is interrupted
    spoils one ratio, whose size the median does not see. Ratios of medians have neither property.

    Source: duet benchmarking, Bulej et al. 2020, ICPE, doi 10.1145/3358960.3379132; the interval is that of
    `median_bounds`.
    """
    ratios = round_ratios(rounds)
    low, high = median_bounds(ratios, RATIO_CONFIDENCE) or (None, None)
    return Ratio(value=float(np.median(np.array(ratios))), low=low, high=high)


def cost_metrics(report: EvaluationReport) -> dict[str, float]:
    """Return what the candidate costs as numbers with their units in their names; what was not measured is left out.

    Times are medians; `latency_ratio` comes with the ends of its interval (90 %).
    """
    model = report.model
    timed = {
        "latency_p50_ms": model.latency_ms,
        "latency_all_cores_p50_ms": model.latency_all_cores_ms,
        "cold_start_p50_ms": model.cold_start_ms,
    }
    found: dict[str, float | None] = {name: latency.p50 for name, latency in timed.items() if latency is not None}
    found |= {
        "peak_memory_bytes": model.peak_memory_bytes,
        "size_bytes": model.size_bytes,
        "size_ratio": model.size_bytes / report.baseline.size_bytes,
        "package_bytes": model.package_bytes,
        "download_bytes": None if report.download is None else report.download.delta_bytes,
    }
    for name, ratio in report.ratios.items():
        found |= {f"{name}_ratio": ratio.value, f"{name}_ratio_low": ratio.low, f"{name}_ratio_high": ratio.high}
    return {name: float(value) for name, value in found.items() if value is not None}
