"""A journal copied to a tracking server: what is there already stays as it is, so replaying twice changes nothing.

The parent run is found by its run key and a task's run by its task name before either is made; every metric carries its
own time and step. Two modes: *adopted* (Kubeflow Pipelines made the run: its status, its parameters and the numbers of
`Output[Metrics]` are KFP's to log) and *self-managed* (everything is ours).
"""

import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcore.tracking.client import ClientSink
from qcore.tracking.journal import (
    Alias,
    Attachment,
    Dataset,
    End,
    Journal,
    Line,
    Metrics,
    Params,
    Scope,
    Start,
    Tags,
    TrackingError,
    Version,
    VersionTags,
    journals,
    read_journal,
)
from qcore.tracking.registry import send_registry_line
from qcore.tracking.rest import RestSink
from qcore.tracking.sink import (
    ATTEMPT_TAG,
    NAME_TAG,
    PARENT_TAG,
    RUN_KEY_TAG,
    TASK_TAG,
    TRIAL_TAG,
    Batch,
    MetricPoint,
    RefusedError,
    Sink,
)

logger = logging.getLogger(__name__)

MAX_HOPS = 6
"""From a task's run up to the pipeline's: task, loop iteration, loop, and nested pipelines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The runs that one journal goes to; `task` is None for the runner's own journal."""

    experiment_id: str
    parent: str
    task: str | None
    adopted: bool

    def run_of(self, scope: Scope) -> str:
        """Return the id of the run that lines of this scope belong to."""
        return self.parent if scope == "parent" or self.task is None else self.task


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a replay did: the parent runs by id, the address of the last one, and the number of journals and lines."""

    parents: tuple[str, ...]
    url: str
    journals: int
    lines: int


def is_http(uri: str) -> bool:
    """Return whether the tracking URI is a server that REST reaches (else mlflow's own client opens it)."""
    return uri.startswith(("http://", "https://"))


def open_sink(uri: str, env: Mapping[str, str], *, budget_s: float) -> Sink:
    """Return the sink for a tracking URI.

    Args:
        uri: MLflow tracking URI.
        env: where the credentials of an http server are looked up.
        budget_s: seconds that all calls together may take (http only).

    Raises:
        TrackingError: the URI cannot be opened.
    """
    if is_http(uri):
        return RestSink(uri, env, budget_s=budget_s)
    return ClientSink(uri)


def find_target(start: Start, sink: Sink) -> Target:
    """Return the runs of a journal, making those that are not there yet."""
    if start.adopted_run is not None:
        above = Target(experiment_id="", parent=_root(start.adopted_run, sink), task=start.adopted_run, adopted=True)
    else:
        above = _own_runs(start, sink)
    if start.trial is None:
        return above
    base = above.run_of("task")
    experiment_id = above.experiment_id or sink.run_facts(base).experiment_id
    tags = {PARENT_TAG: base, TRIAL_TAG: start.trial}
    trial = _run_with(tags, start.trial, start.time_ms, experiment_id, sink)
    return Target(experiment_id=experiment_id, parent=above.parent, task=trial, adopted=False)


def _own_runs(start: Start, sink: Sink) -> Target:
    experiment_id = sink.experiment(start.experiment)
    parent = _run_with({RUN_KEY_TAG: start.run_key}, start.run_name, start.time_ms, experiment_id, sink)
    if start.task is None:
        return Target(experiment_id=experiment_id, parent=parent, task=None, adopted=False)
    tags = {PARENT_TAG: parent, TASK_TAG: start.task}
    if start.attempt is not None:
        tags[ATTEMPT_TAG] = str(start.attempt)
    name = f"{start.task} (attempt {start.attempt + 1})" if start.attempt else start.task
    task = _run_with(tags, name, start.time_ms, experiment_id, sink)
    return Target(experiment_id=experiment_id, parent=parent, task=task, adopted=False)


def _run_with(tags: Mapping[str, str], name: str, start_ms: int, experiment_id: str, sink: Sink) -> str:
    found = sink.find_run(experiment_id, tags)
    return found or sink.create_run(experiment_id, name=name, tags=tags, start_ms=start_ms)


def replay_lines(lines: Sequence[Line], sink: Sink, folder: Path) -> Target:
    """Send the lines of one journal and return the runs they went to.

    Args:
        lines: a start line and what followed.
        sink: where to.
        folder: what the paths of attachments are relative to.

    Raises:
        TrackingError: the server failed; what arrived stays, and the journal can be replayed again.
    """
    start = lines[0]
    if not isinstance(start, Start):
        raise TrackingError(f"journal begins with {type(start).__name__}, not with Start; it is damaged")
    target = find_target(start, sink)
    named = (
        {NAME_TAG: start.run_name} if start.task is start.trial is None else {}
    )  # a task may have made the run before
    batches: dict[str, Batch] = {target.run_of("task"): Batch(tags=named)}
    for line in lines[1:]:
        if isinstance(line, Params | Metrics | Tags):
            _collect(line, target, batches.setdefault(target.run_of(line.on), Batch()))
    for run_id, batch in batches.items():
        for chunk in batch.chunks():
            _log(run_id, chunk, sink)
    for line in lines[1:]:
        _send_line(line, target, sink, folder)
    return target


def _send_line(line: Line, target: Target, sink: Sink, folder: Path) -> None:
    """Send a line that has a call of its own."""
    match line:
        case Dataset():
            sink.log_dataset(target.run_of(line.on), line)
        case Attachment():
            _upload(line, target, sink, folder)
        case Version() | VersionTags() | Alias():
            send_registry_line(line, target.parent, sink)
        case End() if not target.adopted:
            sink.finish(target.run_of("task"), line.status, line.time_ms)
        case _:
            pass


def _log(run_id: str, batch: Batch, sink: Sink) -> None:
    """Log a batch; parameters that a run has with other values stay as they are, and do not cost the rest."""
    try:
        sink.log(run_id, batch)
    except RefusedError as e:
        if e.code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") or not batch.params:
            raise
        known = sink.run_facts(run_id).params
        changed = [k for k, v in batch.params.items() if known.get(k, v) != v]
        if not changed:
            raise
        for key in changed:
            logger.warning("parameter %s of run %s stays %r, not %r", key, run_id, known[key], batch.params[key])
        kept = {k: v for k, v in batch.params.items() if k not in changed}
        sink.log(run_id, Batch(params=kept, tags=batch.tags, metrics=batch.metrics))


def replay(folder: Path, uri: str, *, env: Mapping[str, str] | None = None, budget_s: float = 600.0) -> Replayed:
    """Send every journal in `folder` to the tracking URI and return what was sent.

    Args:
        folder: the journal folder of a run.
        uri: MLflow tracking URI, http(s) or a database.
        env: where the credentials of an http server are looked up; default: none.
        budget_s: seconds that all calls together may take (http only).

    Raises:
        TrackingError: no journal is there, one is damaged, or the server failed; replaying again is safe.
    """
    found = [read_journal(path) for path in journals(folder)]
    sink = open_sink(uri, env or {}, budget_s=budget_s)
    targets = [replay_lines(lines, sink, folder) for lines in found]
    last = targets[-1]
    return Replayed(
        parents=tuple(dict.fromkeys(t.parent for t in targets)),
        url=run_url(uri, last),
        journals=len(found),
        lines=sum(map(len, found)),
    )


def run_url(uri: str, target: Target) -> str:
    """Return where a person finds the parent run: an address for a server, the command line for a database."""
    if is_http(uri):
        return f"{uri.rstrip('/')}/#/experiments/{target.experiment_id or 0}/runs/{target.parent}"
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return f"{shlex.quote(program)} ui --backend-store-uri {shlex.quote(uri)}"


def _collect(line: Params | Metrics | Tags, target: Target, batch: Batch) -> None:
    match line:
        case Params():
            if not target.adopted:
                batch.params.update(line.values)
        case Metrics():
            if not (target.adopted and line.in_kfp and line.on == "task"):
                points = (
                    MetricPoint(key=k, value=v, step=line.step, time_ms=line.time_ms) for k, v in line.values.items()
                )
                batch.metrics.extend(points)
        case Tags():
            batch.tags.update(line.values)


def _upload(line: Attachment, target: Target, sink: Sink, folder: Path) -> None:
    path = folder / line.path
    if not path.is_file():
        logger.warning("%s: file is gone, not sent to %s; run the step again to have it tracked", path, sink.uri)
        return
    sink.upload(target.run_of(line.on), path, f"{line.folder}/{line.name}" if line.folder else line.name)


def _root(run_id: str, sink: Sink) -> str:
    climbed = [run_id]
    for _ in range(MAX_HOPS):
        parent = sink.run_facts(climbed[-1]).tags.get(PARENT_TAG)
        if parent in climbed:
            logger.warning("run %s is its own ancestor; what is for the parent run goes to the task's", parent)
            return run_id
        if not parent:
            break
        climbed.append(parent)
    return climbed[-1]


def replay_journal(journal: Journal, sink: Sink) -> Target:
    """Send a journal that is still in memory; `replay_lines` with its folder."""
    return replay_lines(journal.lines, sink, journal.path.parent if journal.path else Path("/"))
