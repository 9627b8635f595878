"""`qcore parity`: will the file compute the same on the target?

A verb of its own and no option of `qcore evaluate`: it compares a file with itself and needs no baseline, its reference
executor is too slow for whole splits, and it leaves the report that the gate reads as it is.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import percent, print_json, print_table, progress

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport


def parity(
    model: Annotated[Path, typer.Option("--model", help="The model as it will be installed; it is only read.")],
    data: opt.Data,
    out: opt.Out,
    split: opt.EvaluationSplit = "evaluation",
    samples: Annotated[int, typer.Option(min=1, help="How many samples, evenly spread over the split.")] = 64,
    as_json: opt.AsJson = False,
) -> None:
    """Run a model as other runtimes and CPUs would, and name the worst case: unfused, exact integers, 16-bit sums."""
    with progress() as report:
        result = steps.parity(model=model, data=data, out=out, split=split, samples=samples, progress=report)
    if as_json:
        print_json({**result.to_json(), "output": str(out)})
        return
    _print_parity(result)
    print(out)


def _print_parity(report: "ParityReport") -> None:
    """Print a row per condition, what each stands for, and the worst case."""
    rows = [
        (
            c.name,
            "" if c.agreement is None else percent(c.agreement),
            *([] if report.top1 is None else ["" if c.top1 is None else percent(c.top1)]),
            "equal" if c.verdict == "equal" else f"{c.sqnr_db:.1f} dB",
            c.verdict,
        )
        for c in report.conditions
    ]
    accuracy = [] if report.top1 is None else [f"top-1 (as evaluated {percent(report.top1)})"]
    title = f"{report.measured.model} on {report.measured.n} samples, against its outputs as evaluated"
    print_table(title, ("condition", "agreement", *accuracy, "output SQNR", "verdict"), rows)
    for c in report.conditions:
        print(f"{c.name}: {c.meaning}; {c.advice}")
    print(report.advice())
