"""What a step calls to be seen: `with Tracker("quantize") as t: ... t.metrics({...})`.

It only writes the journal; on leaving, the journal is sent to the server once, if there is one over http; while a model
is trained, now and then before that. Nothing that goes wrong here reaches the step, and what it may cost is bounded for
the whole run (`patience.py`). The environment decides where to, because Kubeflow Pipelines hands it over that way (and
keeps it out of the cache key):

* `MLFLOW_TRACKING_URI`: the server. A database URI is left to the process that runs the pipeline (`replay.py`).
* `MLFLOW_RUN_ID`: the run that Kubeflow Pipelines made for this task; else `QCORE_RUN_KEY` names the parent run in the
  experiment `QCORE_EXPERIMENT`.
* `QCORE_JOURNAL_DIR`: where the journal is kept; a folder that all tasks of a run share.
* `KFP_RETRY_INDEX`: which try of the task this is, from 0.
* `QCORE_GIT_SHA` or `GIT_COMMIT`, `QCORE_IMAGE`: what is run, for the tags `git.sha` and `qcore.image`.
"""

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import qcore
from qcore.errors import QcoreError
from qcore.files import sha256_file
from qcore.tracking.journal import (
    Alias,
    Attachment,
    Dataset,
    End,
    Journal,
    Line,
    Metrics,
    Params,
    Progress,
    Scope,
    Start,
    Status,
    Tags,
    TrackingError,
    Version,
    VersionTags,
    now_ms,
)
from qcore.tracking.patience import ALONE_FIRST_ANSWER_S, ALONE_S, add_loss, read_loss, within
from qcore.tracking.replay import is_http, replay_journal
from qcore.tracking.rest import CALL_TIMEOUT_S, RestSink
from qcore.tracking.sink import NOTE_TAG
from qcore.trials import TrialFacts

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

    def __init__(
        self,
        task: str | None,
        *,
        trial: str | None = None,
        run_name: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Read from the environment where to write and send.

        Args:
            task: name of the task; None for the runner, whose journal is about the parent run itself.
            trial: name of a trial of the task, which gets a run of its own below that of the task.
            run_name: name of the parent run, if this journal is the one to make it.
            env: the environment; default: that of the process.
        """
        self._env = dict(os.environ if env is None else env)
        self._folder = Path(self._env["QCORE_JOURNAL_DIR"]) if self._env.get("QCORE_JOURNAL_DIR") else None
        started = time.time_ns()
        path = self._folder / f"{started:020d}-{_file_name(task, trial)}.jsonl" if self._folder else None
        self.journal = Journal(path)
        attempt = self._env.get("KFP_RETRY_INDEX", "")
        key = self._env.get("QCORE_RUN_KEY", "")
        self._start = Start(
            task=task,
            run_key=key,
            experiment=self._env.get("QCORE_EXPERIMENT") or DEFAULT_EXPERIMENT,
            run_name=run_name or key or "release",
            time_ms=started // 1_000_000,
            adopted_run=self._env.get("MLFLOW_RUN_ID") or None,
            attempt=None if task is None else int(attempt) if attempt.isdecimal() else 0,
            trial=trial,
        )
        self._next_progress = 0.0
        self._next_live = 0.0
        self._trials = 0

    def __enter__(self) -> Self:
        """Write the first line."""
        self._write(self._start)
        git = self._env.get("QCORE_GIT_SHA") or self._env.get("GIT_COMMIT") or ""
        ran = {k: v for k, v in {"git.sha": git, "qcore.image": self._env.get("QCORE_IMAGE", "")}.items() if v}
        if ran:
            self.tags(ran, on="parent")
        attempt = {} if self._start.attempt is None else {"qcore.attempt": self._start.attempt}
        self.tags({**ran, "qcore.version": qcore.__version__, **attempt})
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
            self._send(ALONE_S)
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
        self._write(Tags(values=_texts(values), on=on))

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

    def dataset(self, name: str, digest: str, context: str, *, source: str = "") -> None:
        """Track which samples were used, on the run of the task and on the parent run.

        Args:
            name: of the data card and the split, such as `digits/evaluation`.
            digest: SHA-256 of the samples as the model gets them.
            context: what they were used for: `calibration`, `evaluation`.
            source: where they were read from.
        """
        scopes: tuple[Scope, ...] = ("task", "parent")
        for scope in scopes:
            self._write(Dataset(name=name, digest=digest, context=context, source=source, on=scope))

    def version(self, family: str, folder: str, description: str, tags: Mapping[str, object]) -> None:
        """Register the files in `folder` of the parent run as a version of the model `family`."""
        self._write(Version(family=family, folder=folder, description=description, tags=_texts(tags)))

    def version_tags(self, values: Mapping[str, object]) -> None:
        """Tag the version that came out of the parent run, where there is one."""
        self._write(VersionTags(values=_texts(values)))

    def alias(self, name: str, *, previous: str | None = None) -> None:
        """Say that the version of the parent run has earned an alias now, and what the one before is called then."""
        self._write(Alias(alias=name, previous=previous, time_ms=now_ms()))

    def trial(self, facts: TrialFacts) -> None:
        """Track a trial of a search as a run of its own, and its numbers as a series; fits `on_trial` of searches."""
        self._trials += 1
        with Tracker(self._start.task, trial=f"{self._trials:02d} {facts.name}", env=self._env) as t:
            t.params(facts.params)
            t.metrics(facts.metrics)
        self.metrics({f"trial/{name}": value for name, value in facts.metrics.items()}, step=self._trials)

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far the task is, at most four times a second; fits the `progress` argument of every step."""
        if time.monotonic() >= self._next_progress or done == total:
            self._next_progress = time.monotonic() + PROGRESS_EVERY_S
            self._write(Progress(what=what, done=done, total=total))

    def _write(self, line: Line) -> None:
        try:
            self.journal.append(line)
        except OSError as e:
            logger.warning("journal %s: %s; tracking goes on without it", self.journal.path, e)
            self.journal.path = None

    def _send(self, most_s: float) -> None:
        """Send what is journaled so far, in as many seconds as the run has left for it and no more than `most_s`."""
        uri = self._env.get("MLFLOW_TRACKING_URI", "")
        if not is_http(uri) or not (self._start.adopted_run or self._start.run_key):
            return
        allowed, first_s = most_s, ALONE_FIRST_ANSWER_S
        if self._folder is not None:
            loss = read_loss(self._folder)
            allowed, first_s = min(most_s, loss.allowance(time.time())), CALL_TIMEOUT_S
            if allowed <= 0:
                raise TrackingError(f"{loss.problem or f'{uri}: too slow'}; the run does not wait for it again")
        sink = RestSink(uri, self._env, budget_s=allowed, first_answer_s=first_s)
        so_far = Journal(self.journal.path, list(self.journal.lines))
        started, problem = time.monotonic(), ""
        try:
            within(allowed, partial(replay_journal, so_far, sink))
        except (TrackingError, OSError) as e:
            problem = one_line(e)
            raise
        finally:
            if self._folder is not None:
                add_loss(self._folder, time.monotonic() - started, problem)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message; the class name where it has none. Ours have one line already."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, QcoreError) else text[:300]


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {_name(k): str(v)[:MAX_TAG] for k, v in values.items()}


def _file_name(task: str | None, trial: str | None) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (task or "run", trial))))[:100]


def _name(key: str) -> str:
    return _ILLEGAL.sub("_", key)
