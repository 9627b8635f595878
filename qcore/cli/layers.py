"""The verbs that say where accuracy goes, and `mixed`, which spends bits there.

`layers` is for a quantized model, `sensitivity` comes before there is one.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.model import print_breaches
from qcore.cli.output import percent, print_json, print_table, progress, size
from qcore.cli.tracking import tracked

if TYPE_CHECKING:
    from qcore.layers.report import LayerReport
    from qcore.tracking.tracker import Tracker

_SHOWN = 15
_MISSED = 3


def layers(
    model: Annotated[Path, typer.Option("--model", help="The quantized model, in QDQ form.")],
    baseline: opt.Baseline,
    data: opt.Data,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for layers.html and layers.json, or the path of the .html file.")
    ],
    split: opt.EvaluationSplit = "evaluation",
    samples: Annotated[int, typer.Option(min=1, help="How many samples, evenly spread over the split.")] = 32,
    tracking: opt.Tracking = None,
    as_json: opt.AsJson = False,
) -> None:
    """Say which layers of a quantized model are at fault, and which only carry an error on."""
    json_path, page = steps.layer_paths(out)
    with tracked(tracking, json_path, f"layers {model.stem}") as t, progress() as report:
        result = steps.layers(
            model=model, baseline=baseline, data=data, out=out, split=split, samples=samples, progress=report
        )
        _track_layers(t, result, (json_path, page))
    if as_json:
        print_json({**result.to_json(), "output": str(json_path), "page": str(page)})
        return
    _print_layers(result)
    print(f"{page}\n{json_path}")


class Precision(StrEnum):
    """What one layer runs in while the others stay float."""

    int8 = "int8"
    int16 = "int16"
    float16 = "float16"


def sensitivity(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    target: opt.Target = "host",
    recipe: opt.Recipe = "int8",
    split: opt.CalibrationSplit = "calibration",
    samples: Annotated[int, typer.Option(min=1, help="How many samples, evenly spread over the split.")] = 32,
    precision: Annotated[Precision, typer.Option(help="What the one layer runs in.")] = Precision.int8,
    as_json: opt.AsJson = False,
) -> None:
    """Quantize one layer at a time and rank the layers by what that does to the output. Resumes where it was killed."""
    with progress() as report:
        result = steps.sensitivity(
            model=model,
            data=data,
            out=out,
            target=target,
            recipe=recipe,
            split=split,
            samples=samples,
            precision=precision.value,
            progress=report,
        )
    if as_json:
        print_json({**result.to_json(), "output": str(out)})
        return
    total = sum(s.error for s in result.layers) or 1.0
    rows = [
        (f"{k}. {s.node}", s.op_type, f"{s.error:.3g}", percent(s.error / total))
        for k, s in enumerate(result.layers[:_SHOWN], 1)
    ]
    title = f"Layers by sensitivity to {result.precision} on {result.target} ({len(result.layers)} layers, "
    print_table(f"{title}{result.samples} samples)", ("layer", "op", "error", "of the sum"), rows)
    print(f"error: {result.measure}, with this layer alone in {result.precision}")
    print(out)


def mixed(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Most top-1 that may be lost, as a share of 1; 0.01 where the data have labels."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Instead, without labels: largest normalised mean square error of the outputs."),
    ] = None,
    target: opt.Target = "host",
    recipe: opt.Recipe = "int8",
    split: opt.CalibrationSplit = "calibration",
    judged_on: Annotated[
        str | None,
        typer.Option(help="Split that trials are judged on; default: validation, or evaluation where there is none."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples rank the layers.")] = 32,
    tracking: opt.Tracking = None,
    as_json: opt.AsJson = False,
) -> None:
    """Give more than 8 bits to the fewest layers found that hold an accuracy budget. Resumes where it was killed.

    Exit code 3 if the budget does not hold: then no model is written, but OUT.pareto.html and OUT.pareto.json are.
    """
    with tracked(tracking, out, f"mixed {model.stem}") as t, progress() as report:
        result = steps.mixed_precision(
            model=model,
            data=data,
            out=out,
            max_drop=max_drop,
            max_error=max_error,
            target=target,
            recipe=recipe,
            split=split,
            judged_on=judged_on,
            samples=samples,
            progress=report,
            on_trial=t.trial,
        )
        _track_search(t, result)
    if as_json:
        print_json({**result.to_json(), "output": str(out), "report": str(result.report), "page": str(result.page)})
    else:
        _print_mixed(result)
    if not result.found.search.met:
        raise typer.Exit(_MISSED)


def _track_search(tracker: "Tracker", result: steps.MixedSummary) -> None:
    """Track what a search chose, and why, on its run."""
    search, chosen = result.found.search, result.found.search.chosen.trial
    tracker.note(f"{search.why}\n\nThe trials are the runs below this one: select them and compare.")
    tracker.params({"target": result.target, "base": result.base, "measure": result.measure})
    tracker.metrics({"error": chosen.error, "size_bytes": chosen.size_bytes, "trials": len(search.attempts)})
    tracker.tags({"model.sha256": result.model_sha256, "qcore.search": "met" if search.met else "not met"})
    tracker.dataset(result.judged_on, result.data_sha256, "validation")
    for path in (result.page, result.report):
        tracker.artifact(path, "report")


def _track_layers(tracker: "Tracker", report: "LayerReport", files: tuple[Path, ...]) -> None:
    """Track the errors of all layers as series: the step is the layer's number in the table."""
    measured = report.measured
    tracker.note(report.advice())
    tracker.params({"target": measured.target or "none", "samples": measured.data.n})
    tracker.tags({"model.sha256": measured.model.sha256, "baseline.sha256": measured.baseline.sha256})
    tracker.dataset(f"{measured.data.name}/{measured.data.split}", measured.data.sha256, "evaluation")
    tracker.metrics({f"layers_{v}": float(report.count(v)) for v in ("local", "accumulated", "fine")})
    for number, layer in enumerate(report.layers, 1):
        local = {} if layer.local is None else {"layer/local_sqnr_db": layer.local.sqnr_db}
        tracker.metrics({**local, "layer/accumulated_sqnr_db": layer.accumulated.sqnr_db}, step=number)
    for path in files:
        tracker.artifact(path, "report")


def _print_mixed(result: steps.MixedSummary) -> None:
    """Print the trials that nothing beats, then the layers that got more bits, and what was written."""
    search = result.found.search
    chosen = search.attempts.index(search.chosen)
    timed = search.chosen.trial.latency_ms is not None
    rows = []
    for k in sorted({*search.pareto, chosen}, key=lambda k: search.attempts[k].trial.error):
        trial = search.attempts[k].trial
        latency = "" if trial.latency_ms is None else f"{trial.latency_ms:.2f} ms"
        cells = (result.words(k), f"{trial.error:.3g}", size(trial.size_bytes), *([latency] if timed else []))
        rows.append((*cells, "holds" if trial.holds else "does not", "<-" if k == chosen else ""))
    columns = ("precisions", "error", "size", *(["latency"] if timed else []), "budget", "chosen")
    title = f"Pareto front of {len(search.attempts)} trials on {result.samples} samples of {result.judged_on}"
    print_table(title, columns, rows)
    promoted = [s for s in result.found.layers if s.node in search.chosen.precision]
    shown = [(s.node, s.op_type, f"{s.error:.3g}", search.chosen.precision[s.node]) for s in promoted[:_SHOWN]]
    if shown:
        more = f"; {len(shown)} of {len(promoted)} shown" if len(promoted) > len(shown) else ""
        print_table(f"Layers in more bits{more}", ("layer", "op", "sensitivity", "runs in"), shown)
    print(f"error: {result.measure}")
    print(search.why)
    if result.written is None:
        print("no model written; allow more in the budget, or train: qcore finetune --method qat")
    else:
        print_breaches(result.written)
        print(f"{result.written.output}: {size(result.written.size_bytes)}")
    print(f"{result.page}\n{result.report}")


def _print_layers(report: "LayerReport") -> None:
    """Print the layers that are not fine, worst first, and what may help those at fault."""
    numbers = {e.node: f"#{k}" for k, e in enumerate(report.layers, 1)}
    noted = [e for e in report.layers if e.verdict != "fine"]
    worst = sorted(noted, key=lambda e: (e.verdict != "local", e.accumulated.sqnr_db))[:_SHOWN]
    rows = [
        (
            f"{numbers[e.node]} {e.node}",
            e.op_type,
            e.verdict,
            "float" if e.local is None else f"{e.local.sqnr_db:.1f}",
            f"{e.accumulated.sqnr_db:.1f}",
            numbers.get(e.source or "", ""),
        )
        for e in worst
    ]
    counts = ", ".join(f"{report.count(v)} {v}" for v in ("local", "accumulated", "fine"))
    if rows:
        more = f"; {len(rows)} of {len(noted)} shown" if len(noted) > len(rows) else ""
        columns = ("layer", "op", "verdict", "local dB", "accumulated dB", "worst before it")
        print_table(f"Layers that lose the most ({counts}{more})", columns, rows)
    else:
        print(f"all {len(report.layers)} layers are fine")
    for e in worst:
        if e.verdict == "local":
            print(f"{numbers[e.node]}: {e.why}")
    print(report.advice())
