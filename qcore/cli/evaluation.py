"""The verbs that compare a candidate with its baseline: in one go, in shards, and back together."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import percent, print_facts, print_json, print_table, progress, size
from qcore.report import EvaluationReport


class Costs(StrEnum):
    """How much is measured of what the models cost."""

    brief = "brief"
    standard = "standard"
    full = "full"


def evaluate(
    model: Annotated[Path, typer.Option("--model", help="The candidate.")],
    baseline: opt.Baseline,
    data: opt.Data,
    out: opt.Out,
    split: opt.EvaluationSplit = "evaluation",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Your own: module:function=higher, or =lower where less is better; may be repeated."),
    ] = None,
    champion: Annotated[
        Path | None,
        typer.Option(help="The released model, ONNX or .qpkg; runs over the same samples in the same pass."),
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: only part I of N of the split; see merge-reports. Part 1 measures costs.")
    ] = "1/1",
    costs: Annotated[
        Costs,
        typer.Option(
            help="brief: latency on one thread; standard: also on all cores, cold start, memory, package of the "
            "candidate; full: also of the baseline, about a second per MB."
        ),
    ] = Costs.standard,
    timing_seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Of each latency; more seconds, narrower intervals.")
    ] = steps.TIMING_SECONDS,
    as_json: opt.AsJson = False,
) -> None:
    """Compare a candidate with its baseline, and with what is released, on the same samples, one by one."""
    part, metrics, costing = opt.parsed_shard(shard), metric or (), steps.costing_of(costs.value, timing_seconds)
    with progress() as told:
        if part == (1, 1):
            report = steps.evaluate(
                candidate=model,
                baseline=baseline,
                data=data,
                out=out,
                split=split,
                metrics=metrics,
                champion=champion,
                costing=costing,
                progress=told,
            )
        else:
            made = steps.evaluate_shard(
                candidate=model,
                baseline=baseline,
                data=data,
                out=out,
                shard=part,
                split=split,
                metrics=metrics,
                champion=champion,
                costing=costing,
                progress=told,
            )
    if part == (1, 1):
        _print(report, out, as_json)
        return
    facts = {"output": str(out), "samples": made.tally.n, "start": made.start, "of": made.size}
    if as_json:
        print_json({**facts, "model": {"sha256": made.model.sha256}, "data": {"sha256": made.data.sha256}})
    else:
        print_facts("Part of an evaluation", {k: str(v) for k, v in facts.items()})


def merge_reports(
    parts: Annotated[list[Path], typer.Argument(help="Files of `qcore evaluate --shard`, in any order.")],
    out: opt.Out,
    as_json: opt.AsJson = False,
) -> None:
    """Put the shards of an evaluation together; the report is that of one process, but for costs and time."""
    _print(steps.merge_reports(parts=parts, out=out), out, as_json)


def _print(report: EvaluationReport, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({**report.to_json(), "output": str(out)})
    else:
        print_report(report)


SHARES = {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}
VALUES = {"mae": "mean absolute error", "rmse": "root of the mean squared error", "r2": "R2", "auc": "area under ROC"}


def print_report(report: EvaluationReport) -> None:
    """Print float against candidate, and against the champion where there is one."""
    m = report.metrics
    sides = ("baseline_", "", *(() if report.champion is None else ("champion_",)))

    def row(said: str, key: str, form: Callable[[float], str]) -> tuple[str, ...]:
        return (said, *(form(m[side + key]) if side + key in m else "" for side in sides))

    rows = [row(said, k, percent) for k, said in SHARES.items() if k in m]
    values = VALUES | {name: name for name in report.user_metrics}
    rows += [row(said, k, "{:.5g}".format) for k, said in values.items() if k in m]
    if "agreement" in m:
        rows.append(row("agreement", "agreement", percent))
    rows += [row("output SQNR", "output_sqnr_db", "{:.1f} dB".format), *_cost_rows(report)]
    columns = ("", "baseline", "candidate", *(() if report.champion is None else ("champion",)))
    print_table(f"{report.data.name}/{report.data.split}, {report.n} samples", columns, rows)
    if report.machine:
        print("measured on " + ", ".join(f"{k} {v}" for k, v in sorted(report.machine.items())))


RATIOS = {"latency": "latency, 1 thread", "latency_all_cores": "latency, all cores", "cold_start": "cold start"}


def _cost_rows(report: EvaluationReport) -> list[tuple[str, ...]]:
    """Return a row for everything that was measured: medians, and under each time its ratio with the interval."""
    theirs, ours, released = report.baseline, report.model, report.champion
    rows: list[tuple[str, ...]] = []
    blank = () if released is None else ("",)
    times = {
        "latency": (theirs.latency_ms, ours.latency_ms),
        "latency_all_cores": (theirs.latency_all_cores_ms, ours.latency_all_cores_ms),
        "cold_start": (theirs.cold_start_ms, ours.cold_start_ms),
    }
    for name, (before, after) in times.items():
        if before is None or after is None:
            continue
        was, now = (f"{t.p50:.2f}, {t.p95:.2f} ms" for t in (before, after))
        rows.append((f"{RATIOS[name]}: p50, p95", was, now, *blank))
        ratio = report.ratios.get(name)
        if ratio is not None and ratio.low is not None and ratio.high is not None:
            said = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            rows.append(("  of the baseline, 90 % interval", "", said, *blank))
    delta = None if report.download is None else report.download.delta_bytes
    for what, *sizes in (
        ("peak memory", theirs.peak_memory_bytes, ours.peak_memory_bytes, None),
        ("file size", theirs.size_bytes, ours.size_bytes, None if released is None else released.size_bytes),
        ("in a package", theirs.package_bytes, ours.package_bytes, None),
        ("delta from the champion", None, delta, None),
    ):
        cells = ["" if n is None else size(n) for n in sizes]
        if any(cells):
            rows.append((what, *cells[: 2 + len(blank)]))
    return rows
