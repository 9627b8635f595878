"""`qcore demo`: the whole main path on real digits, then a candidate that the gate must stop."""

import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.output import percent, print_json, print_table, size
from qcore.cli.workspace import Workspace, install_on_device, prepare, refresh
from qcore.errors import GateRefused
from qcore.files import write_atomic

if TYPE_CHECKING:
    from qcore.device.updater import Installed
    from qcore.pipelines.local import ReleaseRun
    from qcore.report import EvaluationReport

FAMILY, CHANNEL = "digits", "stable"
GOOD, COARSE = "int8", "int2-weights"
POLICY = """\
# 697 images cannot show a drop of one point on every CPU; two points they can.
name: digits
confidence: 0.95
top1: {max_drop: 0.02}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """What both candidates are made from and judged by."""

    model: Path
    card: Path
    policy: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """What the demo found out, for the table."""

    good: "ReleaseRun"
    coarse: "ReleaseRun"
    reports: "tuple[EvaluationReport, EvaluationReport]"
    installed: "Installed"
    prediction: int
    label: int
    float_download: int
    seconds: float


def demo(
    workspace: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("qcore-demo"),
    as_json: opt.AsJson = False,
) -> None:
    """Release a small digits model to a local device, then see a too coarse one stopped. About half a minute."""
    from qcore.demo.make_data import write_digits

    started = time.monotonic()
    typer.echo(
        f"demo in {workspace}: real digits, KFP local runner, sqlite MLflow, a folder as OTA repository", err=True
    )
    place = prepare(workspace, CHANNEL)
    refresh(place)
    card = write_digits(workspace / "data")
    model = workspace / "data" / "digits_cnn.onnx"
    write_atomic(model, resources.files("qcore.demo").joinpath("digits_cnn.onnx").read_bytes())
    policy = workspace / "data" / "policy.yaml"
    write_atomic(policy, POLICY.encode())
    good = _release(place, _Inputs(model=model, card=card, policy=policy), GOOD)
    if good.outcome != "pass":
        raise GateRefused(f"the demo's int8 candidate came out {good.outcome}; see {good.folder}")
    typer.echo("device: refresh, download, verify, self-test, switch", err=True)
    installed = _installed(place)
    prediction, label = _serve(installed.slot, card)
    coarse = _release(place, _Inputs(model=model, card=card, policy=policy), COARSE)
    still = _installed(place)
    if coarse.outcome == "pass" or still.version != installed.version:
        raise GateRefused(f"the coarse candidate was not stopped: {coarse.outcome}; see {coarse.folder}")
    shown = _Shown(
        good=good,
        coarse=coarse,
        reports=(_report(good), _report(coarse)),
        installed=installed,
        prediction=prediction,
        label=label,
        float_download=_zstd_size(model),
        seconds=time.monotonic() - started,
    )
    if as_json:
        print_json(_facts(shown))
    else:
        _print(shown, place)


def _release(place: Workspace, inputs: _Inputs, recipe: str) -> "ReleaseRun":
    from qcore.cli.steptable import step_table
    from qcore.pipelines.local import ReleaseArguments, run_release
    from qcore.target import load_target

    hardware = load_target("host").name
    arguments = ReleaseArguments(
        model=inputs.model,
        data=inputs.card,
        policy=inputs.policy,
        family=FAMILY,
        version=f"1.0.{_runs(place)}",
        repository=place.repository,
        keys=place.keys,
        recipe=recipe,
        target=hardware,
        channel=CHANNEL,
    )
    with step_table(f"pipeline release: {FAMILY} {arguments.version}, recipe {recipe}, for {hardware}") as changed:
        return run_release(arguments, workspace=place.runs, tracking_uri=place.tracking_uri, progress=changed)


def _runs(place: Workspace) -> int:
    """Return how many runs the workspace holds, so that every candidate of a repeated demo has its own version."""
    return len(list(place.runs.glob("*/request.json")))


def _installed(place: Workspace) -> "Installed":
    from qcore.target import load_target

    return install_on_device(
        place.folder / "device",
        repository=place.repository,
        root=place.keys / "root.json",
        family=FAMILY,
        channel=CHANNEL,
        hardware=load_target("host").name,
    )


def _serve(slot: Path, card: Path) -> tuple[int, int]:
    """Return the installed model's answer to the first evaluation image, and the right one."""
    from qcore.data.dataset import batches, open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.runtime import ort

    loaded = ort.load(read_model_bytes(slot / "model.onnx"), name="installed model", threads=1)
    sample = next(batches(open_dataset(card, "evaluation"), 1))
    output = next(iter(loaded.predict(ort.feeds(loaded, sample)).values()))
    return int(output.argmax()), int(sample.y[0]) if sample.y is not None else -1


def _report(finished: "ReleaseRun") -> "EvaluationReport":
    from qcore.steps import load_report

    return load_report(finished.output("evaluate", "report"))


def _zstd_size(path: Path) -> int:
    import zstandard

    from qcore.release.package import COMPRESSION_LEVEL

    return len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(path.read_bytes()))


def _facts(shown: _Shown) -> dict[str, object]:
    return {
        "int8": {"outcome": shown.good.outcome, "decision": shown.good.decision.to_json()},
        "coarse": {"outcome": shown.coarse.outcome, "decision": shown.coarse.decision.to_json()},
        "device": shown.installed.to_json(),
        "prediction": shown.prediction,
        "label": shown.label,
        "seconds": shown.seconds,
    }


def _print(shown: _Shown, place: Workspace) -> None:
    good, coarse = shown.reports
    downloads = [size(run.package.stat().st_size) for run in (shown.good, shown.coarse)]
    check, stopped = shown.good.decision.checks[0], shown.coarse.decision.checks[0]
    rows = [
        (
            "top-1 accuracy",
            percent(good.metrics["baseline_top1"]),
            percent(good.metrics["top1"]),
            percent(coarse.metrics["top1"]),
        ),
        ("agreement with float", "", percent(good.metrics["agreement"]), percent(coarse.metrics["agreement"])),
        ("latency p50, 1 thread", *(f"{m.latency_ms.p50:.3f} ms" for m in (good.baseline, good.model, coarse.model))),
        ("file size", *(size(m.size_bytes) for m in (good.baseline, good.model, coarse.model))),
        ("download (zstd / package)", size(shown.float_download), *downloads),
        ("gate", "", shown.good.outcome, shown.coarse.outcome),
        ("top-1 drop, worst case at 95 %", "", percent(-(check.bound or 0)), percent(-(stopped.bound or 0))),
    ]
    print_table(f"digits, {good.n} evaluation images", ("", "float", GOOD, COARSE), rows)
    print(f"limit: {percent(-check.limit)} drop, so {GOOD} was released and {COARSE} was stopped before publishing")
    print(
        f"device: serves {shown.installed.version} after its self-test; "
        f"for the first image it says {shown.prediction} (label {shown.label})"
    )
    print(f"review: {shown.good.url}")
    print(f"all of it: {place.folder} ({shown.seconds:.0f} s)")
