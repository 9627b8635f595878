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
    Attachment,
    End,
    Journal,
    Line,
    Metrics,
    Params,
    Scope,
    Start,
    Tags,
    TrackingError,
    journals,
    read_journal,
)
from qcore.tracking.rest import RestSink
from qcore.tracking.sink import NAME_TAG, PARENT_TAG, RUN_KEY_TAG, TASK_TAG, Batch, MetricPoint, Sink

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
        return Target(experiment_id="", parent=_root(start.adopted_run, sink), task=start.adopted_run, adopted=True)
    experiment_id = sink.experiment(start.experiment)
    key = {RUN_KEY_TAG: start.run_key}
    parent = sink.find_run(experiment_id, key) or sink.create_run(
        experiment_id, name=start.run_name, tags=key, start_ms=start.time_ms
    )
    if start.task is None:
        return Target(experiment_id=experiment_id, parent=parent, task=None, adopted=False)
    tags = {PARENT_TAG: parent, TASK_TAG: start.task}
    task = sink.find_run(experiment_id, tags) or sink.create_run(
        experiment_id, name=start.task, tags=tags, start_ms=start.time_ms
    )
    return Target(experiment_id=experiment_id, parent=parent, task=task, adopted=False)


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
    named = {NAME_TAG: start.run_name} if start.task is None else {}  # a task may have made the run before
    batches: dict[str, Batch] = {target.run_of("task"): Batch(tags=named)}
    for line in lines[1:]:
        if isinstance(line, Params | Metrics | Tags):
            _collect(line, target, batches.setdefault(target.run_of(line.on), Batch()))
    for run_id, batch in batches.items():
        for chunk in batch.chunks():
            sink.log(run_id, chunk)
    for line in lines[1:]:
        if isinstance(line, Attachment):
            _upload(line, target, sink, folder)
        elif isinstance(line, End) and not target.adopted:
            sink.finish(target.run_of("task"), line.status, line.time_ms)
    return target


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
    for _ in range(MAX_HOPS):
        parent = sink.run_tags(run_id).get(PARENT_TAG)
        if not parent:
            return run_id
        run_id = parent
    return run_id


def replay_journal(journal: Journal, sink: Sink) -> Target:
    """Send a journal that is still in memory; `replay_lines` with its folder."""
    return replay_lines(journal.lines, sink, journal.path.parent if journal.path else Path("/"))
