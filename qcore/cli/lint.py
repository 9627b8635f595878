"""`qcore lint`: does a file satisfy a target profile?"""

from pathlib import Path
from typing import Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import print_json, print_table

FOUND = 1


def lint(
    model: Annotated[Path, typer.Option("--model", help="The quantized ONNX model; it is only read.")],
    target: opt.Target = "host",
    as_json: opt.AsJson = False,
) -> None:
    """Prove that a model satisfies a target profile, or name every place where it does not (exit code 1)."""
    report = steps.lint(model=model, target=target)
    if as_json:
        print_json(report.to_json())
    elif report.findings:
        rows = [(f.rule, f.where, f.observed, f.allowed) for f in report.findings]
        print_table(f"{report.model} is not what {report.target} wants", ("rule", "where", "observed", "allowed"), rows)
    if not as_json:
        print(f"{report.model}: {len(report.findings)} findings for {report.target}")
    if report.findings:
        raise typer.Exit(FOUND)
