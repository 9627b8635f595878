"""The verbs that make calibration tables: in one go, in shards, and back together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import print_facts, print_json, progress

if TYPE_CHECKING:
    from qcore.calibration import CalibrationTable


def calibrate(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    split: opt.CalibrationSplit = "calibration",
    shard: Annotated[str, typer.Option(help="I/N: only part I of N of the split; see merge-tables.")] = "1/1",
    jobs: Annotated[int, typer.Option(help="Processes to count with; the table is the same.")] = 1,
    tensors: Annotated[
        list[str] | None, typer.Option(help="Name or pattern (*, ?) of activations to measure; may be repeated.")
    ] = None,
    bins: Annotated[int, typer.Option(help="Histogram bins per tensor.")] = steps.CALIBRATION_BINS,
    decay: Annotated[float, typer.Option(help="Of the moving average, per sample.")] = steps.CALIBRATION_DECAY,
    as_json: opt.AsJson = False,
) -> None:
    """Measure the activation ranges of a model on a split of a data set."""
    part = opt.parsed_shard(shard)
    with progress() as report:
        table = steps.calibrate(
            model=model,
            data=data,
            out=out,
            split=split,
            shard=part,
            jobs=jobs,
            tensors=tensors or (),
            bins=bins,
            decay=decay,
            progress=report,
        )
    _print(table, out, as_json)


def merge_tables(
    tables: Annotated[list[Path], typer.Argument(help="Tables of `qcore calibrate --shard`, in any order.")],
    out: opt.Out,
    as_json: opt.AsJson = False,
) -> None:
    """Put the tables of shards together; the result is that of one process, byte for byte."""
    _print(steps.merge_tables(tables=tables, out=out), out, as_json)


def _print(table: "CalibrationTable", out: Path, as_json: bool) -> None:
    from qcore.calibration import missing_positions

    facts = {
        "output": str(out),
        "samples": table.samples,
        "missing": sum(end - start for start, end in missing_positions(table)),
        "tensors": len(table.stats),
        "key": table.key,
        "model": {"sha256": table.model_sha256},
        "data": {"sha256": table.data_sha256},
    }
    if as_json:
        print_json(facts)
    else:
        print_facts("Calibration table", {k: str(facts[k]) for k in ("output", "samples", "missing", "tensors")})
