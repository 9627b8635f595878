"""`qcore pipeline`: run the release pipeline on this machine, or compile it for a cluster."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.evaluation import print_report
from qcore.cli.model import REFUSED, print_decision
from qcore.cli.output import print_facts, print_json, size
from qcore.cli.workspace import install_on_device, prepare, refresh
from qcore.errors import ConfigError

if TYPE_CHECKING:
    from qcore.device.updater import Installed
    from qcore.pipelines.local import ReleaseRun

app = typer.Typer(help="The Kubeflow pipeline `release`.", no_args_is_help=True, rich_markup_mode=None)


@app.command("run")
def run(
    model: opt.Model,
    data: opt.Data,
    recipe: opt.Recipe = "int8",
    target: opt.Target = "host",
    policy: opt.Policy = None,
    champion: Annotated[Path | None, typer.Option(help="The released model, ONNX or .qpkg, to compare with.")] = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of weights to zero before quantization.")] = 0.0,
    family: Annotated[str | None, typer.Option(help="Name on devices; default: the model file's name.")] = None,
    version: Annotated[str | None, typer.Option(help="Release version; default: the time.")] = None,
    channel: opt.Channel = "stable",
    workspace: Annotated[Path, typer.Option(help="Folder for everything the run writes.")] = Path("qcore-work"),
    repository: Annotated[
        str | None, typer.Option(help="Signed repository, folder or s3://bucket/prefix; default: in the workspace.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="Signing keys; default: development keys in the workspace.")] = None,
    tracking: Annotated[
        str | None, typer.Option(help="MLflow URI, or none; default: $MLFLOW_TRACKING_URI, else the workspace.")
    ] = None,
    device: Annotated[bool, typer.Option(help="Install a passed release on a device in the workspace.")] = True,
    as_json: opt.AsJson = False,
) -> None:
    """Run prune, calibrate, quantize, evaluate, package, parity, gate, publish; then a local device installs it.

    Exit code 3 unless the gate passes. Devices read a repository in S3 over http(s), so none installs from it here.
    """
    from qcore.cli.steptable import step_table
    from qcore.pipelines.local import ReleaseArguments, run_release
    from qcore.release.location import is_url
    from qcore.target import load_target

    if (repository is None) != (keys is None):
        raise ConfigError("--repository and --keys belong together; pass both, or neither for development defaults")
    family = family or family_name(model)
    hardware = load_target(target).name
    place = prepare(workspace, channel) if repository is None else None
    arguments = ReleaseArguments(
        model=model,
        data=data,
        family=family,
        version=version or f"{datetime.now(UTC):%Y.%m.%d-%H%M%S}",
        repository=repository or workspace / "repository",
        keys=keys or workspace / "keys",
        recipe=recipe,
        target=hardware if target == "host" else target,
        policy=policy,
        champion=champion,
        channel=channel,
        sparsity=sparsity,
    )
    if place is not None:
        refresh(place)
    with step_table(f"release {family} {arguments.version} for {hardware}") as changed:
        finished = run_release(
            arguments, workspace=workspace / "runs", tracking_uri=_tracking(tracking, workspace), progress=changed
        )
    installed = None
    if device and finished.outcome == "pass" and not is_url(arguments.repository):
        installed = install_on_device(
            workspace / "device" / f"{family}-{hardware}",
            repository=Path(arguments.repository),
            root=arguments.keys / "root.json",
            family=family,
            channel=channel,
            hardware=hardware,
        )
    if as_json:
        print_json(_facts(finished, installed))
    else:
        _print_run(finished, installed)
    if finished.outcome != "pass":
        raise typer.Exit(REFUSED)


@app.command("compile")
def compile_pipelines(
    out: Annotated[Path, typer.Option("--out", help="Folder; files keep their place below it.")],
    as_json: opt.AsJson = False,
) -> None:
    """Write every component and pipeline as KFP IR YAML."""
    from qcore.pipelines.compile import compile_all

    files = [str(p) for p in compile_all(out)]
    if as_json:
        print_json({"files": files})
    else:
        print("\n".join(files))


def family_name(model: Path) -> str:
    """Return a family name made of the model file's name: lower case, other characters become dashes."""
    name = re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).strip("-._")[:64]
    return re.sub(r"\.\.+", ".", name) or "model"


def _tracking(option: str | None, workspace: Path) -> str | None:
    uri = option or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(workspace / 'mlflow.db').absolute()}"
    return None if uri == "none" else uri


def _facts(finished: "ReleaseRun", installed: "Installed | None") -> dict[str, object]:
    return {
        "outcome": finished.outcome,
        "decision": finished.decision.to_json(),
        "tasks": [{"name": r.name, "state": r.state, "seconds": r.seconds} for r in finished.tasks],
        "breaches": _breaches(finished),
        "seconds": finished.seconds,
        "folder": str(finished.folder),
        "package": str(finished.package),
        "release": dict(finished.release) if finished.release else None,
        "tracking": {"run_id": finished.run_id, "url": finished.url, "problem": finished.tracking_problem},
        "device": installed.to_json() if installed else None,
    }


def _breaches(finished: "ReleaseRun") -> list[object]:
    """Return where the quantized model is not what its target wants."""
    found: list[object] = json.loads(finished.output("quantize", "summary").read_bytes())["breaches"]
    return found


def _print_run(finished: "ReleaseRun", installed: "Installed | None") -> None:
    from qcore.steps import load_report

    print_report(load_report(finished.output("evaluate", "report")))
    print_decision(finished.decision)
    facts = {"run": str(finished.folder), "time": f"{finished.seconds:.1f} s"}
    if breaches := _breaches(finished):
        facts["target"] = f"the model breaks its profile in {len(breaches)} places; `qcore lint` names them"
    stopped = "" if finished.release else ", not published"
    facts["package"] = f"{finished.package} ({size(finished.package.stat().st_size)} to download{stopped})"
    if installed is not None:
        facts["device"] = f"serves {installed.version} from {installed.slot}"
    if finished.url:
        facts["review"] = finished.url
    if finished.tracking_problem:
        facts["tracking"] = finished.tracking_problem
    print_facts("Run", facts)
