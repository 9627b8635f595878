"""The verbs that work on one model: from quantization to publication. Each parses, calls one step, and prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.epochs import gained, print_epochs, training_progress
from qcore.cli.output import percent, plain, print_facts, print_json, print_table, progress, size
from qcore.cli.tracking import tracked
from qcore.errors import ConfigError
from qcore.report import GateDecision

if TYPE_CHECKING:
    from qcore.compression import AppliedStep
    from qcore.methods.finetune import Epoch
    from qcore.tracking.tracker import Tracker

REFUSED = 3
AUTO = "auto"
_ORDER = ("fail", "inconclusive", "pass")
"""How checks are listed: what stops a release first."""


def quantize(
    model: opt.Model,
    table: Annotated[Path, typer.Option("--table", help="Calibration table of this model.")],
    out: opt.Out,
    target: opt.Target = "host",
    recipe: opt.Recipe = "int8",
    as_json: opt.AsJson = False,
) -> None:
    """Quantize a model with the ranges of a calibration table."""
    print_summary(steps.quantize(model=model, table=table, out=out, target=target, recipe=recipe), as_json)


def prune(
    model: opt.Model,
    out: opt.Out,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of every layer's weights to zero, in [0, 1); 0.5 by default.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Instead, N:M such as 2:4: keep N of every M weights along a layer's inputs.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Remove channels: share of the multiply-accumulates to keep, e.g. 0.6.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="Remove channels: share of the file size to keep.")] = None,
    latency: Annotated[float | None, typer.Option(help="Remove channels: share of the latency here to keep.")] = None,
    data: opt.PruningData = None,
    split: opt.CalibrationSplit = "calibration",
    as_json: opt.AsJson = False,
) -> None:
    """Set the smallest weights of every layer to zero, or remove whole channels down to a budget, without training.

    Mostly that loses accuracy: `qcore finetune --method prune` and `--method channels` train what is left.
    """
    if macs is None and size is None and latency is None:
        if data is not None:
            raise ConfigError("--data is for removing channels; add one of --macs, --size and --latency")
        share = 0.5 if sparsity is None else sparsity
        print_summary(steps.prune(model=model, out=out, sparsity=share, pattern=pattern), as_json)
        return
    if sparsity is not None or pattern is not None:
        raise ConfigError(
            "--sparsity and --pattern zero weights, --macs, --size and --latency remove channels; pass one"
        )
    if data is None:
        raise ConfigError("removing channels measures what is lost and got no data; pass --data CARD")
    with progress() as report:
        summary = steps.prune_channels(
            model=model, data=data, out=out, macs=macs, size=size, latency=latency, split=split, progress=report
        )
    print_summary(summary, as_json)


def cluster(
    model: opt.Model,
    out: opt.Out,
    clusters: Annotated[int, typer.Option(help="Distinct values of every layer's weights, 2 to 256.")] = 16,
    as_json: opt.AsJson = False,
) -> None:
    """Let the weights of every layer take only a few values, so that packages are small. Needs no data."""
    print_summary(steps.cluster(model=model, out=out, clusters=clusters), as_json)


def decompose(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    macs: Annotated[
        float | None, typer.Option(help="Share of the multiplications that may be left; default 0.5.")
    ] = None,
    size_share: Annotated[
        float | None, typer.Option("--size", help="Instead, share of the weights that may be left.")
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(help="Of all ranks; default 16, the width of vector kernels. Less for narrow layers.")
    ] = None,
    split: opt.CalibrationSplit = "calibration",
    as_json: opt.AsJson = False,
) -> None:
    """Write layers as chains of smaller ones (SVD, spatial SVD, Tucker-2, CP) within a budget."""
    with progress() as report:
        summary = steps.decompose(
            model=model,
            data=data,
            out=out,
            macs=macs,
            size=size_share,
            multiple=multiple,
            split=split,
            progress=report,
        )
    print_summary(summary, as_json)


def compress(
    model: opt.Model,
    out: opt.Out,
    data: opt.CalibrationData = None,
    recipe: opt.Recipe = "int8",
    target: opt.Target = "host",
    split: opt.CalibrationSplit = "calibration",
    policy: opt.Policy = None,
    device: opt.Device = opt.DeviceKind.auto,
    tracking: opt.Tracking = None,
    as_json: opt.AsJson = False,
) -> None:
    """Apply a whole recipe, calibrating where a step needs it.

    `auto` tries recipes, cheapest first, until one passes the policy, and resumes where it was killed.
    """
    if recipe == AUTO:
        files = _Files(model=model, data=data, out=out, policy=policy)
        _compress_auto(files, target=target, split=split, tracking=tracking, as_json=as_json)
        return
    if policy is not None:
        raise ConfigError(f"--policy is for --recipe auto, which stops at the first pass; {recipe} is applied as it is")
    name = f"compress {model.stem} {Path(recipe).stem}"
    with tracked(tracking, out, name) as t, training_progress() as (report, on_epoch):
        summary = steps.compress(
            model=model,
            data=data,
            out=out,
            recipe=recipe,
            target=target,
            split=split,
            device=device.value,
            progress=report,
            on_epoch=_both(on_epoch, t.epoch),
        )
        _track_summary(t, summary)
    print_summary(summary, as_json)


def _both(first: steps.OnEpoch, second: steps.OnEpoch) -> steps.OnEpoch:
    def told(epoch: "Epoch") -> None:
        first(epoch)
        second(epoch)

    return told


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """What `--recipe auto` reads and writes."""

    model: Path
    data: Path | None
    out: Path
    policy: Path | None


def _track_summary(tracker: "Tracker", summary: steps.CompressionSummary) -> None:
    tracker.params({"recipe": summary.recipe, "target": summary.target})
    tracker.metrics({**summary.sizes, "size_ratio": summary.size_bytes / summary.input_size_bytes})
    tracker.tags({"model.sha256": summary.sha256})


def _compress_auto(files: _Files, *, target: str, split: str, tracking: str | None, as_json: bool) -> None:
    data, out = files.data, files.out
    if data is None:
        raise ConfigError("recipe auto calibrates and judges, and got no data; allowed: a data card; pass --data CARD")
    with tracked(tracking, out, f"compress {files.model.stem} auto") as t, progress() as report:
        result = steps.compress_auto(
            model=files.model,
            data=data,
            out=out,
            target=target,
            split=split,
            policy=files.policy,
            progress=report,
            on_trial=t.trial,
        )
        t.note(f"{result.climb.why}\n\nThe recipes that were tried are the runs below this one: select and compare.")
        _track_summary(t, result.written)
    if as_json:
        print_json(result.to_json())
        return
    _print_ladder(result)
    print_summary(result.written, as_json)
    print(f"stopped: {result.climb.why}")


def _print_ladder(result: steps.AutoSummary) -> None:
    climb = result.climb
    timed = any(a.latency_ms is not None for a in climb.attempts)
    rows = []
    for k, a in enumerate(climb.attempts):
        latency = [] if not timed else ["" if a.latency_ms is None else f"{a.latency_ms:.2f} ms"]
        marks = ("chosen" if k == climb.chosen else "") + ("*" if k in climb.pareto else "")
        rows.append((a.recipe, f"{a.error:.3g}", size(a.size_bytes), *latency, a.outcome, a.reason, marks))
    columns = ("recipe", "held-out error", "size", *(["latency"] if timed else []), "gate", "why", "")
    print_table(f"Ladder, judged on {result.judged_on}; * nothing beats it in all columns", columns, rows)


def package(
    model: Annotated[Path, typer.Option("--model", help="The candidate.")],
    data: opt.Data,
    out: opt.Out,
    family: opt.Family,
    version: opt.Version,
    target: Annotated[
        str | None, typer.Option(help="Target profile; default: the one that the model was quantized for.")
    ] = None,
    split: opt.EvaluationSplit = "evaluation",
    memory_mb: Annotated[
        int, typer.Option("--memory-mb", help="MiB that a process needs that runs the model; 0: not measured.")
    ] = 0,
    control_flow: Annotated[
        bool, typer.Option("--control-flow", help="Declare If, Loop or Scan; only devices that allow it take it then.")
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Build the package that devices download: model, golden samples, card, parts list. The gate decides about it."""
    built = steps.package(
        model=model,
        data=data,
        out=out,
        family=family,
        version=version,
        target=target,
        split=split,
        memory_mb=memory_mb,
        control_flow=control_flow,
    )
    if as_json:
        print_json(built.to_json())
        return
    facts = {"output": str(built.path), "sha256": built.sha256}
    sizes = {k: size(v) for k, v in built.to_json().items() if k in ("file_bytes", "download_bytes", "flash_bytes")}
    print_facts("Package", {**facts, **{k.removesuffix("_bytes"): v for k, v in sizes.items()}})


def publish(
    package: Annotated[Path, typer.Option("--package", help="Package of `qcore package`.")],
    evidence: Annotated[Path, typer.Option("--evidence", help="Signed decision of `qcore gate`.")],
    repository: opt.Repository,
    keys: opt.Keys,
    channel: opt.Channel = "stable",
    provenance: Annotated[
        Path | None, typer.Option("--provenance", help="Signed provenance of `qcore provenance`, published beside it.")
    ] = None,
    cosigned: Annotated[
        Path | None, typer.Option("--cosigned", help="Role of `qcore repo cosign`; without it --keys holds the gate's.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Sign a package into the repository and point a channel at it."""
    signed = {"provenance": provenance, "cosigned": cosigned}
    release = steps.publish(
        package=package, evidence=evidence, repository=repository, keys=keys, channel=channel, **signed
    )
    if as_json:
        print_json(release.to_json())
    else:
        facts = {k: str(v) for k, v in release.to_json().items() if k in ("family", "version", "channel", "counter")}
        print_facts("Published", {**facts, "sha256": release.sha256})


def provenance(
    package: Annotated[Path, typer.Option("--package", help="Package of `qcore package`.")],
    key: Annotated[Path, typer.Option("--key", help="Private key file of the gate or the publisher.")],
    builder: Annotated[str, typer.Option("--builder", help="URI of what built it.")],
    out: opt.Out,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", help="NAME=VALUE: recipe, target, seed ...; repeatable.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=FILE it was built from: model, data ...; repeatable.")
    ] = None,
    invocation: Annotated[str, typer.Option("--invocation", help="The run that built it.")] = "",
    as_json: opt.AsJson = False,
) -> None:
    """Sign where a package comes from: an in-toto statement with SLSA provenance v1."""
    inputs = {name: Path(path) for name, path in _pairs(source or (), "--input").items()}
    build = steps.provenance(
        package=package,
        out=out,
        key=key,
        builder=builder,
        parameters=_pairs(parameter or (), "--parameter"),
        inputs=inputs,
        invocation=invocation,
    )
    facts = {"output": str(out), "package": build.package_sha256, "builder": build.builder}
    print_json({**facts, "inputs": dict(build.inputs)}) if as_json else print_facts("Provenance", facts)


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Return NAME=VALUE texts as a mapping."""
    pairs = [text.partition("=") for text in texts]
    if odd := [text for text, (name, equals, _) in zip(texts, pairs, strict=True) if not (name and equals)]:
        raise typer.BadParameter(f"{odd[0]!r}; allowed: NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def outcome_line(decision: GateDecision) -> str:
    """Return the outcome with the checks that make it, and how many samples would decide where nothing fails."""
    if decision.outcome == "pass":
        return f"pass by waiver of {', '.join(decision.waived)}" if decision.waived else "pass"
    open_ = [c for c in decision.checks if c.outcome != "pass" and c.name not in decision.waived]
    words = [f"{o}: {', '.join(names)}" for o in _ORDER if (names := [c.name for c in open_ if c.outcome == o])]
    needs = max((c.needs_samples or 0 for c in open_), default=0) if decision.outcome == "inconclusive" else 0
    more = f" (about {needs:,} more samples would decide)" if needs else ""
    first = words[0].removeprefix(f"{decision.outcome}: ")
    return f"{decision.outcome} ({'; '.join([first, *words[1:]])}){more}"


def print_decision(decision: GateDecision) -> None:
    """Print the checks, what does not pass first, then the outcome in one line, and who overrode it or may."""
    rows = [
        (
            c.name,
            *map(plain, (c.observed, c.bound, c.limit)),
            f"{c.outcome}, waived" if c.name in decision.waived else c.outcome,
            c.reason,
        )
        for c in sorted(decision.checks, key=lambda c: (_ORDER.index(c.outcome), c.name not in decision.waived))
    ]
    title = f"Gate, {percent(decision.confidence)} one-sided confidence, {decision.n} samples"
    print_table(title, ("check", "observed", "bound", "limit", "outcome", "why"), rows)
    print(f"outcome: {outcome_line(decision)}")
    if decision.outcome != "pass" or decision.waivers:
        print(decision.who_may_override())


def print_summary(summary: steps.CompressionSummary, as_json: bool) -> None:
    """Print what the steps of a recipe did, where the model is not what its target wants, and how large it is."""
    if not steps.is_first():
        return
    if as_json:
        print_json(summary.to_json())
        return
    rows = [(s.method, str(len(s.changed)), str(len(s.skipped)), _recovered(s)) for s in summary.steps]
    columns = ("step", "changed", "left alone", "held-out error")
    print_table(f"Recipe {summary.recipe} for {summary.target}", columns, rows)
    for step in summary.steps:
        if step.epochs:
            print_epochs(step)
    reasons: dict[tuple[str, str], int] = {}
    for skip in (k for s in summary.steps for k in s.skipped):
        reasons[skip.op_type, skip.reason] = reasons.get((skip.op_type, skip.reason), 0) + 1
    if reasons:
        print_table("Left alone", ("op", "nodes", "why"), [(op, str(n), why) for (op, why), n in reasons.items()])
    for step in summary.steps:
        _print_ranks(step)
    print_breaches(summary)
    if resized := [r for s in summary.steps for r in s.resized]:
        shown = [(r.of, r.what, f"{r.before:.4g}", f"{r.after:.4g}", percent(r.after / r.before)) for r in resized]
        print_table("Smaller", ("node", "what", "before", "after", ""), shown)
    ratio = summary.size_bytes / summary.input_size_bytes
    print(f"{summary.output}: {size(summary.size_bytes)}, {percent(ratio)} of {size(summary.input_size_bytes)}")
    if summary.packed_bytes is not None and summary.input_packed_bytes:
        ratio = summary.packed_bytes / summary.input_packed_bytes
        print(f"in a package: {size(summary.packed_bytes)}, {percent(ratio)} of {size(summary.input_packed_bytes)}")


def _print_ranks(step: "AppliedStep") -> None:
    """Print the layers that became chains."""
    rows = [
        (
            la.node,
            chosen.kind,
            " x ".join(map(str, chosen.ranks)),
            percent(chosen.macs / la.macs),
            f"{chosen.score:.3g}",
        )
        for la in step.layers
        if (chosen := la.choice) is not None
    ]
    if rows:
        columns = ("layer", "chain", "rank", "multiplications left", "output error alone")
        print_table("Layers written as chains", columns, rows)


def print_breaches(summary: steps.CompressionSummary) -> None:
    """Print where a written model is not what its target wants, a row per rule and kind; nothing where it is."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for b in summary.breaches:
        kinds.setdefault((b.rule, b.observed.split(" with ")[0]), []).append(b.where)
    if kinds:
        rows = [(rule, observed, str(len(where)), where[0]) for (rule, observed), where in kinds.items()]
        title = f"Not as {summary.target} wants it ({len(summary.breaches)} findings; `qcore lint` names all)"
        print_table(title, ("rule", "observed", "times", "first"), rows)


def _recovered(step: "AppliedStep") -> str:
    if step.epochs:
        return gained(step)
    if step.error_before is None or step.error_after is None:
        return step.reason or ""
    return f"{step.error_before:.3g} -> {step.error_after:.3g}" + ("" if step.kept else ", not kept")
