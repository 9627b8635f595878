"""What a tracking server must be able to do for us, so that a journal can be replayed into any of them.

Two implementations: `RestSink` (urllib, no import cost, for tasks) and `ClientSink` (mlflow's client, for a local
database). Every failure is a `TrackingError`. The fluent mlflow interface is never used: with `MLFLOW_RUN_ID` set it
returns, ends and renames a run that Kubeflow Pipelines owns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcore.tracking.journal import Dataset, Status, TrackingError

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
NOTE_TAG = "mlflow.note.content"
RUN_KEY_TAG = "qcore.run_key"
TASK_TAG = "qcore.task"
TRIAL_TAG = "qcore.trial"
ATTEMPT_TAG = "qcore.attempt"
CONTEXT_TAG = "mlflow.data.context"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE_TAG: "One run per release candidate. Open a run: its description says what was decided and why; "
    "its children hold the detail of each step.",
}

FAMILY_NOTE = (
    "Devices know this model by its name. `champion` was published last, `previous_champion` before it, `candidate` "
    "passed the gate last. The source run of a version says what was decided and why."
)
"""Description of a registered model."""

MAX_PARAMS = 100
MAX_TAGS = 100
MAX_METRICS = 500
"""Limits of one log-batch call (MLflow 3: 100, 100, 1000)."""


MAX_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""


class RefusedError(TrackingError):
    """The server answered, and said no; `code` is MLflow's name for why, empty where it gave none."""

    def __init__(self, message: str, code: str = "") -> None:
        """Keep the code beside the message."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run already has: its experiment, its tags and parameters, and where its artifacts are."""

    experiment_id: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    artifact_uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One version of a registered model, with its tags."""

    family: str
    version: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVersion:
    """A version to be made: of which registered model, from which run and files, with what to say about it."""

    family: str
    run_id: str
    source: str
    description: str
    tags: Mapping[str, str]


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

    def run_facts(self, run_id: str) -> RunFacts:
        """Return what a run already has."""

    def log(self, run_id: str, batch: Batch) -> None:
        """Log one chunk of a batch."""

    def log_dataset(self, run_id: str, dataset: Dataset) -> None:
        """Say that a run used these samples; saying it twice changes nothing."""

    def versions_of(self, run_id: str) -> Sequence[ModelVersion]:
        """Return the versions of registered models that came out of a run."""

    def create_version(self, new: NewVersion) -> str:
        """Return the number of a new version; the registered model is created where it is absent."""

    def version(self, family: str, version: str) -> ModelVersion:
        """Return a version with its tags."""

    def tag_version(self, family: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""

    def aliases(self, family: str) -> Mapping[str, str]:
        """Return the versions that aliases of a registered model point at, by alias."""

    def set_alias(self, family: str, alias: str, version: str) -> None:
        """Point an alias at a version."""

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Store the file `path` as `name` (with forward slashes) among the run's artifacts."""

    def finish(self, run_id: str, status: Status, end_ms: int) -> None:
        """Set the status and the end time of a run."""
