"""The pipeline `release` on this machine: same components, no cluster, no container, every step a process.

Progress comes from the tasks' journals, so it is live and does not depend on kfp's log lines. Tracking happens in a
thread beside the run: tasks only write journals, and a sick server costs a few seconds at the end and nothing else.
kfp.local runs in a process of its own (`child.py`), so this process's output, environment and settings stay as they
are, and several runs may go on at once.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qcore import errors
from qcore.canonical import Json
from qcore.errors import ConfigError, DataError, ModelError, QcoreError, ReleaseError
from qcore.files import sha256_file, write_json
from qcore.pipelines.watch import Row, Watch
from qcore.report import GateDecision, Outcome
from qcore.tracking.journal import End, Journal, now_ms
from qcore.tracking.tracker import Tracker
from qcore.tracking.uploader import Uploaded, Uploader

TASKS = ("prune", "calibrate", "quantize", "evaluate", "package", "parity", "gate", "review", "cosign", "publish")
"""The tasks of `release` in an order in which they may run."""

POLL_S = 0.1
GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseArguments:
    """What is to be released, and where to.

    `model` is a float ONNX file, `data` a card or a folder with exactly one, `policy` a gate policy file (None: the
    default budget), `champion` the released model or package that the candidate would replace (None: none),
    `repository` an initialised repository (a folder, or s3://bucket/prefix as text), `keys` a key folder; `recipe` and
    `target` are shipped names or files.
    """

    model: Path
    data: Path
    family: str
    version: str
    repository: str | Path
    keys: Path
    recipe: str = "int8"
    target: str = "x86-avx2"
    policy: Path | None = None
    channel: str = "stable"
    sparsity: float = 0.0
    calibration_split: str = "calibration"
    evaluation_split: str = "evaluation"
    champion: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseRun:
    """A run that went through: what was decided and what came of it.

    `package` is what the decision is about; `release` (the JSON form of what was published) is None unless the outcome
    is `pass`. `run_id`
    and `url` say where the tracked run is, `tracking_problem` why it is not (fully) there. `folder` holds everything
    the run wrote: `log.txt`, `journal/`, and `kfp/` with the tasks' outputs.
    """

    outcome: Outcome
    decision: GateDecision
    tasks: tuple[Row, ...]
    seconds: float
    folder: Path
    package: Path
    release: Mapping[str, Json] | None
    run_id: str | None
    url: str | None
    tracking_problem: str | None

    @property
    def log(self) -> Path:
        """Everything that the tasks and kfp printed."""
        return self.folder / "log.txt"

    def output(self, task: str, name: str) -> Path:
        """Return the path of a task's output file, such as `output("gate", "decision_html")`."""
        return Path(str(next(row for row in self.tasks if row.name == task).outputs[name]))


def run_release(
    arguments: ReleaseArguments,
    *,
    workspace: Path,
    tracking_uri: str | None = None,
    progress: Callable[[Row], None] | None = None,
) -> ReleaseRun:
    """Run the pipeline `release` and return what came of it; a gate that says no is a result, not an error.

    Args:
        arguments: what is to be released.
        workspace: folder for the run's own folder; everything the run writes is in there.
        tracking_uri: MLflow tracking URI (server or `sqlite:///file`); None: nothing is tracked.
        progress: called with a row each time a task starts, gets on, or ends; first with every task waiting.

    Raises:
        QcoreError: an argument cannot be used, or a task failed: the task's own error, with the log named.
    """
    request = pipeline_request(arguments)
    started = time.monotonic()
    run_key = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    folder = workspace.absolute() / run_key
    folder.mkdir(parents=True)
    write_json(folder / "request.json", request)
    env = _environment(run_key, folder / "journal")
    uploader = Uploader(folder / "journal", tracking_uri, os.environ) if tracking_uri else None
    watch = Watch(folder / "journal", TASKS, progress or (lambda row: None))
    tracker = Tracker(None, run_name=f"{arguments.family} {arguments.version}", env=env)
    uploaded = Uploaded(run_id=None, url=None, problem=None)
    try:
        with tracker:
            tracker.params({k: request[k] for k in ("family", "version", "channel", "recipe", "target", "sparsity")})
            tracker.params({"model": arguments.model.name})
            if uploader and tracker.journal.path:
                uploader.offer(tracker.journal.path)
            _run_child(folder, env, watch, uploader)
    finally:
        closed = _close_journals(watch)
        if uploader:
            for path in (*closed, *filter(None, [tracker.journal.path])):
                uploader.offer(path)
            uploaded = uploader.close()
    return _result(folder, watch, uploaded, time.monotonic() - started)


def pipeline_request(arguments: ReleaseArguments) -> dict[str, Json]:
    """Return the pipeline's parameters after checking what would otherwise fail only at the end of a long run."""
    from qcore.config import load_config
    from qcore.graph.io import check_model
    from qcore.policy import GatePolicy
    from qcore.recipe import load_recipe
    from qcore.release.location import absolute_location, is_url
    from qcore.release.manifest import check_name
    from qcore.release.signers import SERVICE_SUFFIX
    from qcore.steps.compression import refuse_beyond_table
    from qcore.steps.judgement import read_released
    from qcore.target import load_target

    a = arguments
    files, card = [a.keys / f"gate{suffix}" for suffix in (".pem", SERVICE_SUFFIX)], a.data
    for path, what, kind, exists in (
        (a.model, "model", ModelError, a.model.is_file()),
        (card, "data", DataError, card.exists()),
        (files[0], "gate key", ConfigError, any(f.is_file() for f in files)),
        (a.repository, "repository", ConfigError, is_url(a.repository) or Path(a.repository).is_dir()),
        (a.policy or a.keys, "policy", ConfigError, a.policy is None or a.policy.is_file()),
        (a.champion or a.keys, "champion", ModelError, a.champion is None or a.champion.is_file()),
    ):
        if not exists:
            raise kind(f"{what} {path}: no such file or folder; pass one that exists (`qcore repo init` makes keys)")
    refuse_beyond_table(load_recipe(a.recipe))
    load_target(a.target)
    if a.champion is not None:
        check_model(read_released(a.champion), str(a.champion))
    for what, name in (("family", a.family), ("version", a.version), ("channel", a.channel)):
        check_name(what, name, ConfigError)
    _check_splits(a)
    _check_channel(a)
    if a.policy:
        load_config(a.policy, GatePolicy, "gate policy")
    return {
        "model_uri": str(a.model.absolute()),
        "model_sha256": sha256_file(a.model),
        "data_uri": str(card.absolute()),
        "data_sha256": sha256_file(card) if card.is_file() else "",
        "family": a.family,
        "version": a.version,
        "recipe": _name_or_path(a.recipe),
        "target": _name_or_path(a.target),
        "sparsity": a.sparsity,
        "policy": a.policy.read_text(encoding="utf-8") if a.policy else "",
        "channel": a.channel,
        "repository": absolute_location(a.repository),
        "keys": str(a.keys.absolute()),
        "calibration_split": a.calibration_split,
        "evaluation_split": a.evaluation_split,
        "champion": str(a.champion.absolute()) if a.champion else "",
    }


def _check_splits(a: ReleaseArguments) -> None:
    """Refuse a run whose candidate would be judged on samples that its ranges were taken from."""
    from qcore.data.dataset import open_dataset, shared_samples

    calibration, evaluation = open_dataset(a.data, a.calibration_split), open_dataset(a.data, a.evaluation_split)
    if shared := shared_samples(calibration, evaluation):
        raise DataError(
            f"splits {a.calibration_split!r} and {a.evaluation_split!r} share {shared} samples; allowed: none, or the "
            "candidate is judged on what it was fitted to; separate them in the data card"
        )


def _check_channel(a: ReleaseArguments) -> None:
    """Refuse a channel that the repository does not have."""
    from qcore.release.location import open_store
    from qcore.release.repository import status

    roles = [row.role for row in status(open_store(a.repository), now=datetime.now(UTC))]
    if f"channel-{a.channel}" not in roles:
        known = ", ".join(r.removeprefix("channel-") for r in roles if r.startswith("channel-"))
        raise ReleaseError(f"repository {a.repository} has no channel {a.channel!r}; allowed: {known or 'none'}")


def _name_or_path(value: str) -> str:
    return str(Path(value).absolute()) if Path(value).is_file() else value


def _environment(run_key: str, journal: Path) -> dict[str, str]:
    """Return the environment of the tasks: they journal, and this process does the tracking."""
    env = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")}
    own = {"QCORE_RUN_KEY": run_key, "QCORE_JOURNAL_DIR": str(journal), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**env, **own}


def _run_child(folder: Path, env: Mapping[str, str], watch: Watch, uploader: Uploader | None) -> None:
    command = [sys.executable, "-m", "qcore.pipelines.child", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while child.poll() is None:
                _poll(watch, uploader)
                time.sleep(POLL_S)
        finally:
            _stop(child)
            _poll(watch, uploader)
    if child.returncode != 0:
        raise _failure(folder, watch)


def _poll(watch: Watch, uploader: Uploader | None) -> None:
    for path in watch.poll():
        if uploader:
            uploader.offer(path)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the run's processes if they are still there: asked first, so that their journals are closed, then killed."""
    for what, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, what)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(wait_s)


def _close_journals(watch: Watch) -> list[Path]:
    """Write the last line for tasks that were killed before they could; return their journals."""
    open_journals = watch.unfinished()
    for path in open_journals:
        Journal(path).append(End(status="KILLED", time_ms=now_ms()))
    watch.poll()
    return open_journals


def _failure(folder: Path, watch: Watch) -> QcoreError:
    """Return the error of the task that failed, in its own class and words, with the log named."""
    log = folder / "log.txt"
    for row in watch.rows.values():
        if row.error is not None:
            name, message = row.error
            kind = getattr(errors, name, QcoreError)
            own = isinstance(kind, type) and issubclass(kind, QcoreError) and kind is not QcoreError
            text = message if own else f"task {row.name} stopped with {name}: {message}"
            return (kind if own else QcoreError)(f"{text} (task {row.name}; log: {log})")
        if row.state == "running":
            return QcoreError(f"task {row.name} was killed before it ended, out of memory? (log: {log})")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = [m for line in lines if (m := re.match(r"qcore\.errors\.(\w+Error|GateRefused): (.*)", line))]
    return QcoreError(f"{found[-1][2] if found else (lines or ['no output'])[-1][:300]} (log: {log})")


def _result(folder: Path, watch: Watch, uploaded: Uploaded, seconds: float) -> ReleaseRun:
    from qcore.release.evidence import verify_evidence
    from qcore.release.keys import load_signer

    outputs: dict[str, dict[str, Json]] = json.loads((folder / "result.json").read_bytes())
    for row in list(watch.rows.values()):
        state = "skipped" if row.state == "waiting" else row.state
        watch.put(replace(row, state=state, outputs=outputs.get(row.name, {})))
    key = load_signer(Path(json.loads((folder / "request.json").read_bytes())["keys"])).public_key
    decision = verify_evidence(Path(outputs["gate"]["evidence"]).read_bytes(), [key])
    published = outputs.get("publish")
    return ReleaseRun(
        outcome=decision.outcome,
        decision=decision,
        tasks=tuple(watch.rows.values()),
        seconds=seconds,
        folder=folder,
        package=Path(str(outputs["package"]["package"])),
        release=json.loads(Path(published["release"]).read_bytes()) if published else None,
        run_id=uploaded.run_id,
        url=uploaded.url,
        tracking_problem=uploaded.problem,
    )
