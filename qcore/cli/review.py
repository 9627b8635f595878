"""`qcore review`: what was measured and decided about one or more candidates, as people read it."""

from pathlib import Path
from typing import Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.output import percent, print_json, print_table, size
from qcore.review.facts import Review

Files = list[Path] | None


def review(
    report: Annotated[
        list[str],
        typer.Option(
            help="NAME=FILE or FILE: evaluation report of a candidate, such as ptq=ptq.json; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for review.html, review.md and review.json; made if missing.")],
    evidence: Annotated[Files, typer.Option(help="Signed decision of `qcore gate`; may be repeated.")] = None,
    summary: Annotated[
        Files, typer.Option(help="What `qcore compress --json` and its like printed; may be repeated.")
    ] = None,
    layers: Annotated[Files, typer.Option(help="JSON of `qcore layers`; may be repeated.")] = None,
    parity: Annotated[Files, typer.Option(help="Report of `qcore parity`; may be repeated.")] = None,
    model: Annotated[
        Files, typer.Option(help="Candidate whose ranges are drawn over the calibration tables; may be repeated.")
    ] = None,
    table: Annotated[Files, typer.Option(help="Table of `qcore calibrate`; may be repeated.")] = None,
    package: Annotated[Files, typer.Option(help="What `qcore package` wrote; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data card, for the names of the classes.")] = None,
    title: Annotated[
        str, typer.Option(help="What the model is called; default: its file or package name, where known.")
    ] = "",
    as_json: opt.AsJson = False,
) -> None:
    """Write what a reviewer needs as a page without requests, as Markdown and as JSON."""
    files = steps.review_paths(out)
    found = steps.review(
        reports=[_named(text) for text in report],
        out=files,
        beside=steps.Beside(
            evidence=evidence or (),
            summaries=summary or (),
            layers=layers or (),
            parity=parity or (),
            models=model or (),
            tables=table or (),
            packages=package or (),
            data=data,
        ),
        title=title,
    )
    if as_json:
        written = {"output": str(files.page), "markdown": str(files.markdown), "facts": str(files.facts)}
        told = {"verdict": found.verdict, "sure": found.sure, "signature": found.signature}
        print_json({"outcome": found.outcome, **told, **written})
        return
    _print_candidates(found)
    print(found.verdict)
    if found.signature:
        print(found.signature)
    print(found.sure)
    print(files.page)


def _named(text: str) -> tuple[str, Path]:
    """Return name and path: what is in front of `=`, or the name of the file up to its first dot."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name and path else (Path(text).name.partition(".")[0], Path(text))


def _print_candidates(review: Review) -> None:
    """Print a row per candidate."""
    rows = []
    for c in review.candidates:
        model = c.source.report.model
        value = review.measure.worth(c.source.report.metrics[review.measure.key])
        ratio = percent(model.size_bytes / review.baseline.size_bytes)
        rows.append(
            (
                c.label,
                value,
                f"{model.latency_ms.p50:.2f} ms",
                size(model.size_bytes),
                ratio,
                "-" if c.outcome is None else c.stands,
            )
        )
    columns = ("candidate", review.measure.words, "latency p50", "size", "of float", "gate")
    print_table(f"{review.title}, {review.n} samples", columns, rows)
