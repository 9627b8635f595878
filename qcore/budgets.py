"""The budgets of a policy: what a candidate may cost at most, in bytes and milliseconds, and against its baseline.

Sizes are what they are. Times are medians, held against their limit by the upper end of a confidence interval: inside
passes, a median outside fails, and between the two more runs would decide. What was not measured is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from qcore.config import Config
from qcore.derived import round_ratios
from qcore.errors import GateRefused
from qcore.numerics.order import median_bounds, runs_needed
from qcore.report import Check, EvaluationReport, Outcome

SHARE = "bytes of the model's share of a package, compressed; with --package the whole file is judged"
"""What `package_bytes` is where no package is there yet."""


class Budgets(Config):
    """Upper limits; ratios are candidate / baseline.

    Bytes of the file, of the package (of the model's share of it where there is none yet), of the download by a device
    that has the released model (`download_bytes`), and of memory. Times, judged by the upper end of their interval at
    the policy's confidence: of one inference at batch 1 on one thread (`latency_ms`) and of a start in a fresh process.
    """

    size_bytes: int | None = Field(default=None, gt=0)
    size_ratio: float | None = Field(default=None, gt=0)
    package_bytes: int | None = Field(default=None, gt=0)
    package_ratio: float | None = Field(default=None, gt=0)
    download_bytes: int | None = Field(default=None, gt=0)
    latency_ms: float | None = Field(default=None, gt=0)
    latency_ratio: float | None = Field(default=None, gt=0)
    latency_all_cores_ratio: float | None = Field(default=None, gt=0)
    cold_start_ms: float | None = Field(default=None, gt=0)
    memory_bytes: int | None = Field(default=None, gt=0)
    memory_ratio: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """A value without sampling error; None where it was not measured, and then what to do."""

    value: float | None
    what: str
    remedy: str = "run `qcore evaluate` again"


def budget_checks(
    report: EvaluationReport, budgets: Budgets, confidence: float, package_bytes: int | None = None
) -> list[Check]:
    """Return one check for every limit of `budgets`.

    Args:
        report: what was measured.
        budgets: the limits.
        confidence: one-sided, of times.
        package_bytes: size of the package file that shall be released; None: the model's share of one is judged.

    Raises:
        GateRefused: a limit is on what was not measured.
    """
    sizes, times, checks = _sizes(report, package_bytes), _times(report), []
    for name, limit in budgets.model_dump(exclude_none=True).items():
        if name in sizes:
            checks.append(_judged_size(name, sizes[name], float(limit)))
            continue
        values, what = times[name]
        if not values:
            raise GateRefused(f"the policy limits {name}, which the report lacks; run `qcore evaluate` again")
        checks.append(_judged_median(name, values, float(limit), (confidence, what)))
    return checks


def _sizes(report: EvaluationReport, package_bytes: int | None) -> dict[str, _Size]:
    ours, theirs, full = report.model, report.baseline, "run `qcore evaluate --costs full`"
    delta = None if report.download is None else report.download.delta_bytes
    released = "run `qcore evaluate` with the released model (--champion FILE)"
    linux = "run `qcore evaluate` on Linux, where it is measured"
    return {
        "size_bytes": _Size(value=ours.size_bytes, what="bytes of the model file"),
        "size_ratio": _Size(value=_over(ours.size_bytes, theirs.size_bytes), what="of the baseline's file size"),
        "package_bytes": _Size(value=ours.package_bytes, what=SHARE)
        if package_bytes is None
        else _Size(value=package_bytes, what="bytes of the package, the whole download of a new device"),
        "package_ratio": _Size(
            value=_over(ours.package_bytes, theirs.package_bytes), what="of the baseline's in a package", remedy=full
        ),
        "download_bytes": _Size(value=delta, what="bytes of the delta against the released model", remedy=released),
        "memory_bytes": _Size(value=ours.peak_memory_bytes, what="bytes at most in a process of its own", remedy=linux),
        "memory_ratio": _Size(
            value=_over(ours.peak_memory_bytes, theirs.peak_memory_bytes), what="of the baseline's memory", remedy=linux
        ),
    }


def _over(ours: int | None, theirs: int | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def _times(report: EvaluationReport) -> dict[str, tuple[Sequence[float], str]]:
    """Return, of each limit on time, what was measured in every round, and what that is in words."""
    timed: dict[str, tuple[Sequence[float], str]] = {}
    for name, rounds, what in (
        ("latency_ms", "latency", "ms on one thread"),
        ("cold_start_ms", "cold_start", "ms from the file to the first answer"),
    ):
        timed[name] = (report.rounds[rounds].candidate if rounds in report.rounds else (), what)
    for name, rounds, what in (
        ("latency_ratio", "latency", "of the baseline's time on one thread"),
        ("latency_all_cores_ratio", "latency_all_cores", "of the baseline's time on all cores"),
    ):
        timed[name] = (round_ratios(report.rounds[rounds]) if rounds in report.rounds else (), what)
    return timed


def _judged_size(name: str, size: _Size, limit: float) -> Check:
    if size.value is None:
        raise GateRefused(f"the policy limits {name}, which was not measured; {size.remedy}")
    outcome: Outcome = "pass" if size.value <= limit else "fail"
    return Check(name=name, outcome=outcome, observed=size.value, bound=size.value, limit=limit, reason=size.what)


def _judged_median(name: str, values: Sequence[float], limit: float, of: tuple[float, str]) -> Check:
    """Return the check that the median of what `values` are drawn from is at most `limit`."""
    confidence, what = of
    observed, n = float(np.median(np.array(values, np.float64))), len(values)
    bounds = median_bounds(values, confidence)
    high = math.nextafter(max(limit, *values), math.inf) if bounds is None else bounds[1]
    outcome: Outcome = "fail" if observed > limit else "pass" if high <= limit else "inconclusive"
    reason, needs = f"median {what}, {n} interleaved runs", None
    if outcome == "inconclusive":
        total = runs_needed(sum(v <= limit for v in values), n, confidence)
        needs = None if total is None else max(1, total - n)
        more = "" if needs is None else f", about {needs} more would decide (--timing-seconds)"
        reason += f": inside the limit, but too few to be sure{more}"
    bound = max(high, observed)
    return Check(
        name=name, outcome=outcome, observed=observed, bound=bound, limit=limit, reason=reason, needs_runs=needs
    )
