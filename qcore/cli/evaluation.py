"""The verbs that compare a candidate with its baseline: in one go, in shards, and back together."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import percent, print_facts, print_json, print_table, progress, size
from qcore.report import EvaluationReport


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
        str, typer.Option(help="I/N: only part I of N of the split; see merge-reports. Part 1 measures latency.")
    ] = "1/1",
    as_json: opt.AsJson = False,
) -> None:
    """Compare a candidate with its baseline, and with what is released, on the same samples, one by one."""
    part, metrics = opt.parsed_shard(shard), metric or ()
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
    """Put the shards of an evaluation together; the report is that of one process, but for latency and time."""
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
    ours, theirs, released = report.model, report.baseline, report.champion
    blank, packed = ([], []) if released is None else ([""], [size(released.size_bytes)])
    rows += [
        row("output SQNR", "output_sqnr_db", "{:.1f} dB".format),
        ("latency p50, 1 thread", f"{theirs.latency_ms.p50:.2f} ms", f"{ours.latency_ms.p50:.2f} ms", *blank),
        ("file size", size(theirs.size_bytes), size(ours.size_bytes), *packed),
    ]
    columns = ("", "baseline", "candidate", *(() if released is None else ("champion",)))
    print_table(f"{report.data.name}/{report.data.split}, {report.n} samples", columns, rows)
