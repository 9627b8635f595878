"""What a step calls to be seen: `with Tracker("quantize") as t: ... t.metrics({...})`.

It only writes the journal; on leaving, the journal is sent to the server once, if there is one over http; while a model
is trained, now and then before that. Nothing that goes wrong here reaches the step. The environment decides where to,
because Kubeflow Pipelines hands it over that way (and keeps it out of the cache key):

* `MLFLOW_TRACKING_URI`: the server. A database URI is left to the process that runs the pipeline (`replay.py`).
* `MLFLOW_RUN_ID`: the run that Kubeflow Pipelines made for this task; else `QCORE_RUN_KEY` names the parent run in the
  experiment `QCORE_EXPERIMENT`.
* `QCORE_JOURNAL_DIR`: where the journal is kept.
"""

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import qcore
from qcore.errors import QcoreError
from qcore.files import sha256_file
from qcore.tracking.journal import (
    Attachment,
    End,
    Journal,
    Metrics,
    Params,
    Progress,
    Scope,
    Start,
    Status,
    Tags,
    TrackingError,
    now_ms,
)
from qcore.tracking.replay import is_http, replay_journal
from qcore.tracking.rest import BUDGET_S, RestSink
from qcore.tracking.sink import NOTE_TAG

if TYPE_CHECKING:
    from qcore.methods.finetune import Epoch

logger = logging.getLogger(__name__)

MAX_PARAM = 6000
MAX_TAG = 8000
"""Characters that MLflow keeps of a parameter and of a tag; a longer value would be cut without a word."""

PROGRESS_EVERY_S = 0.25
LIVE_EVERY_S = 5.0
LIVE_BUDGET_S = 2.0
"""What one sending before the end may take; after the first that fails there is none until the end."""

_ILLEGAL = re.compile(r"[^\w\-./ :]")

DEFAULT_EXPERIMENT = "qcore"


class MetricsPort(Protocol):
    """The part of `kfp.dsl.Metrics` that is used here; the library does not import kfp."""

    def log_metric(self, metric: str, value: float) -> None:
        """Add one number to the artifact."""


class Tracker:
    """One task's journal, open; a context manager.

    `on="parent"` puts a value on the parent run, which is what a reviewer opens.
    """

    def __init__(self, task: str | None, *, run_name: str | None = None, env: Mapping[str, str] | None = None) -> None:
        """Read from the environment where to write and send.

        Args:
            task: name of the task; None for the runner, whose journal is about the parent run itself.
            run_name: name of the parent run, if this journal is the one to make it.
            env: the environment; default: that of the process.
        """
        self._env = dict(os.environ if env is None else env)
        folder = self._env.get("QCORE_JOURNAL_DIR")
        started = time.time_ns()
        path = Path(folder) / f"{started:020d}-{task or 'run'}.jsonl" if folder else None
        self.journal = Journal(path)
        key = self._env.get("QCORE_RUN_KEY", "")
        self._start = Start(
            task=task,
            run_key=key,
            experiment=self._env.get("QCORE_EXPERIMENT") or DEFAULT_EXPERIMENT,
            run_name=run_name or key or "release",
            time_ms=started // 1_000_000,
            adopted_run=self._env.get("MLFLOW_RUN_ID") or None,
        )
        self._next_progress = 0.0
        self._next_live = 0.0

    def __enter__(self) -> Self:
        """Write the first line."""
        self._write(self._start)
        self.tags({"qcore.version": qcore.__version__})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the last line and send the journal; the error, if any, goes on."""
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        said = (type(error).__name__, one_line(error)) if error is not None else None
        if said is not None:
            self.tags({"qcore.error": f"{said[0]}: {said[1]}"})
        self._write(End(status=status, time_ms=now_ms(), error=said))
        try:
            self._send(BUDGET_S)
        except (TrackingError, OSError) as e:
            kept = (
                f"`qcore mlflow replay --journal {self.journal.path.parent} --uri URI`"
                if self.journal.path
                else "QCORE_JOURNAL_DIR"
            )
            logger.warning("not tracked: %s (to have it later: %s)", one_line(e), kept)

    def params(self, values: Mapping[str, object], *, on: Scope = "task") -> None:
        """Track parameters; a value is cut at what MLflow keeps."""
        self._write(Params(values={_name(k): str(v)[:MAX_PARAM] for k, v in values.items()}, on=on))

    def metrics(
        self, values: Mapping[str, float], *, step: int = 0, on: Scope = "task", kfp: MetricsPort | None = None
    ) -> None:
        """Track numbers; those that are not finite are left out and named in the log.

        Args:
            values: numbers by name.
            step: position in a series.
            on: the run they belong to.
            kfp: an `Output[Metrics]` to put the same numbers into; KFP then logs them on the run that it made.
        """
        finite = {_name(k): float(v) for k, v in values.items() if math.isfinite(v)}
        for key in values.keys() - {k for k, v in values.items() if math.isfinite(v)}:
            logger.warning("metric %s is %s: not tracked, only finite numbers are", key, values[key])
        if kfp is not None:
            for key, value in finite.items():
                kfp.log_metric(key, value)
        self._write(Metrics(values=finite, step=step, time_ms=now_ms(), on=on, in_kfp=kfp is not None))

    def epoch(self, epoch: "Epoch") -> None:
        """Track how an epoch of training went, and send it soon; fits the `on_epoch` argument of steps that train."""
        values = {"loss": epoch.loss, "validation_loss": epoch.validation, "validation_accuracy": epoch.accuracy}
        self.metrics({name: value for name, value in values.items() if value is not None}, step=epoch.number)
        if time.monotonic() < self._next_live:
            return
        try:
            self._send(LIVE_BUDGET_S)
            self._next_live = time.monotonic() + LIVE_EVERY_S
        except (TrackingError, OSError) as e:
            logger.debug("not tracked yet: %s", one_line(e))
            self._next_live = math.inf

    def tags(self, values: Mapping[str, object], *, on: Scope = "task") -> None:
        """Track tags; a value is cut at what MLflow keeps."""
        self._write(Tags(values={_name(k): str(v)[:MAX_TAG] for k, v in values.items()}, on=on))

    def note(self, markdown: str) -> None:
        """Set the description of the parent run."""
        self.tags({NOTE_TAG: markdown}, on="parent")

    def artifact(self, path: Path, folder: str = "", *, name: str | None = None, on: Scope = "task") -> None:
        """Track a file.

        Args:
            path: the file; a copy is kept beside the journal.
            folder: where the run keeps it, with forward slashes.
            name: its name there; default: its own.
            on: the run it belongs to.
        """
        try:
            digest = sha256_file(path)
            kept = self.journal.keep(path, digest)
        except OSError as e:
            logger.warning("%s: not tracked (%s); check the disk of the journal", path, e)
            return
        self._write(Attachment(path=kept, name=name or path.name, folder=folder, sha256=digest, on=on))

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far the task is, at most four times a second; fits the `progress` argument of every step."""
        if time.monotonic() >= self._next_progress or done == total:
            self._next_progress = time.monotonic() + PROGRESS_EVERY_S
            self._write(Progress(what=what, done=done, total=total))

    def _write(self, line: Start | Params | Metrics | Tags | Attachment | Progress | End) -> None:
        try:
            self.journal.append(line)
        except OSError as e:
            logger.warning("journal %s: %s; tracking goes on without it", self.journal.path, e)
            self.journal.path = None

    def _send(self, budget_s: float) -> None:
        uri = self._env.get("MLFLOW_TRACKING_URI", "")
        if is_http(uri) and (self._start.adopted_run or self._start.run_key):
            replay_journal(self.journal, RestSink(uri, self._env, budget_s=budget_s))


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message; the class name where it has none. Ours have one line already."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, QcoreError) else text[:300]


def _name(key: str) -> str:
    return _ILLEGAL.sub("_", key)
