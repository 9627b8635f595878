"""What a tracking server must be able to do for us: seven calls, so that a journal can be replayed into any of them.

Two implementations: `RestSink` (urllib, no import cost, for tasks) and `ClientSink` (mlflow's client, for a local
database). Every failure is a `TrackingError`. The fluent mlflow interface is never used: with `MLFLOW_RUN_ID` set it
returns, ends and renames a run that Kubeflow Pipelines owns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcore.tracking.journal import Status

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
NOTE_TAG = "mlflow.note.content"
RUN_KEY_TAG = "qcore.run_key"
TASK_TAG = "qcore.task"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE_TAG: "One run per release candidate. Open a run: its description says what was decided and why; "
    "its children hold the detail of each step.",
}

MAX_PARAMS = 100
MAX_TAGS = 100
MAX_METRICS = 500
"""Limits of one log-batch call (MLflow 3: 100, 100, 1000)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricPoint:
    """One metric value at a step and a time in milliseconds since 1970."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass(kw_only=True, slots=True)
class Batch:
    """What is to be logged on one run; grows while a journal is read."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[MetricPoint] = field(default_factory=list)

    def chunks(self) -> Sequence["Batch"]:
        """Return the batch in pieces that one call accepts; none where it is empty."""
        params, tags = list(self.params.items()), list(self.tags.items())
        pieces = [
            Batch(
                params=dict(params[i * MAX_PARAMS : (i + 1) * MAX_PARAMS]),
                tags=dict(tags[i * MAX_TAGS : (i + 1) * MAX_TAGS]),
                metrics=self.metrics[i * MAX_METRICS : (i + 1) * MAX_METRICS],
            )
            for i in range(max(-(-len(params) // MAX_PARAMS), -(-len(tags) // MAX_TAGS), self._metric_chunks()))
        ]
        return pieces

    def _metric_chunks(self) -> int:
        return -(-len(self.metrics) // MAX_METRICS)


class Sink(Protocol):
    """A tracking server or database."""

    uri: str

    def experiment(self, name: str) -> str:
        """Return the id of the experiment `name`; it is created with `EXPERIMENT_TAGS` where it is absent."""

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        """Return the id of the oldest run that carries all `tags`, or None."""

    def create_run(self, experiment_id: str, *, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """Return the id of a new run."""

    def run_tags(self, run_id: str) -> Mapping[str, str]:
        """Return the tags of a run."""

    def log(self, run_id: str, batch: Batch) -> None:
        """Log one chunk of a batch."""

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Store the file `path` as `name` (with forward slashes) among the run's artifacts."""

    def finish(self, run_id: str, status: Status, end_ms: int) -> None:
        """Set the status and the end time of a run."""
