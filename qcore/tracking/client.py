"""A local tracking database (or any other URI that mlflow knows) through mlflow's client.

Importing mlflow costs two to three seconds and creating a database as much again, so only the runner uses this, once
per run and never in a task. Two processes that create the same database at once would both fail: a lock file beside it
makes them take turns.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qcore.tracking.journal import Dataset, Status, TrackingError
from qcore.tracking.rest import tag_filter
from qcore.tracking.sink import (
    CONTEXT_TAG,
    EXPERIMENT_TAGS,
    FAMILY_NOTE,
    MAX_DIGEST,
    Batch,
    ModelVersion,
    NewVersion,
    RefusedError,
    RunFacts,
)

SQLITE = "sqlite:///"


class ClientSink:
    """A tracking store behind `mlflow.MlflowClient`."""

    def __init__(self, uri: str) -> None:
        """Open `uri`; a database that is not there yet is created.

        Args:
            uri: a tracking URI of MLflow, such as `sqlite:////home/me/mlflow.db`.

        Raises:
            TrackingError: mlflow is not installed, or the store cannot be opened.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
        except ImportError as e:
            raise TrackingError(f"tracking to {uri} needs mlflow; pip install 'kfp-qcore[track]'") from e
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.uri = uri
        self._db = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
        if self._db is not None:
            self._db.absolute().parent.mkdir(parents=True, exist_ok=True)
        with self._errors(), _lock(self._db):
            self._client = MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)

    def experiment(self, name: str) -> str:
        """Return the id of the experiment `name`; a local database keeps its artifacts in `mlartifacts` beside it."""
        with self._errors(), _lock(self._db):
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            root = (self._db.absolute().parent / "mlartifacts" / name).as_uri() if self._db is not None else None
            return str(self._client.create_experiment(name, artifact_location=root, tags=EXPERIMENT_TAGS))

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        """Return the oldest run that carries all `tags`, or None."""
        with self._errors():
            runs = self._client.search_runs(
                [experiment_id], tag_filter(tags), max_results=1, order_by=["attributes.start_time ASC"]
            )
        return str(runs[0].info.run_id) if runs else None

    def create_run(self, experiment_id: str, *, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """Return the id of a new run."""
        with self._errors():
            run = self._client.create_run(experiment_id, start_time=start_ms, tags=dict(tags), run_name=name)
        return str(run.info.run_id)

    def run_facts(self, run_id: str) -> RunFacts:
        """Return what a run already has."""
        with self._errors():
            run = self._client.get_run(run_id)
        return RunFacts(
            experiment_id=str(run.info.experiment_id),
            tags=dict(run.data.tags),
            params=dict(run.data.params),
            artifact_uri=str(run.info.artifact_uri),
        )

    def log(self, run_id: str, batch: Batch) -> None:
        """Log one chunk of a batch."""
        from mlflow.entities import Metric, Param, RunTag

        with self._errors():
            self._client.log_batch(
                run_id,
                metrics=[Metric(m.key, m.value, m.time_ms, m.step) for m in batch.metrics],
                params=[Param(k, v) for k, v in batch.params.items()],
                tags=[RunTag(k, v) for k, v in batch.tags.items()],
            )

    def log_dataset(self, run_id: str, dataset: Dataset) -> None:
        """Say that a run used these samples."""
        from mlflow.entities import Dataset as Samples
        from mlflow.entities import DatasetInput, InputTag

        samples = Samples(
            name=dataset.name,
            digest=dataset.digest[:MAX_DIGEST],
            source_type="qcore",
            source=json.dumps({"uri": dataset.source, "sha256": dataset.digest}),
        )
        with self._errors():
            used = DatasetInput(samples, [InputTag(CONTEXT_TAG, dataset.context)])
            self._client.log_inputs(run_id, datasets=[used])

    def versions_of(self, run_id: str) -> Sequence[ModelVersion]:
        """Return the versions of registered models that came out of a run."""
        with self._errors():
            found = self._client.search_model_versions(f"run_id = '{run_id}'", max_results=100)
        return [ModelVersion(family=v.name, version=str(v.version), tags=dict(v.tags)) for v in found]

    def create_version(self, new: NewVersion) -> str:
        """Return the number of a new version; the registered model is created where it is absent."""
        try:
            with self._errors():
                self._client.create_registered_model(new.family, description=FAMILY_NOTE)
        except RefusedError as e:
            if e.code != "RESOURCE_ALREADY_EXISTS":
                raise
        with self._errors():
            made = self._client.create_model_version(
                new.family, new.source, new.run_id, tags=dict(new.tags), description=new.description
            )
        return str(made.version)

    def version(self, family: str, version: str) -> ModelVersion:
        """Return a version with its tags."""
        with self._errors():
            found = self._client.get_model_version(family, version)
        return ModelVersion(family=family, version=version, tags=dict(found.tags))

    def tag_version(self, family: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self._errors():
            for key, value in tags.items():
                self._client.set_model_version_tag(family, version, key, value)

    def aliases(self, family: str) -> Mapping[str, str]:
        """Return the versions that aliases of a registered model point at, by alias."""
        with self._errors():
            found = self._client.get_registered_model(family)
        return {alias: str(version) for alias, version in found.aliases.items()}

    def set_alias(self, family: str, alias: str, version: str) -> None:
        """Point an alias at a version."""
        with self._errors():
            self._client.set_registered_model_alias(family, alias, version)

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Store the file `path` as `name` among the run's artifacts."""
        folder, _, base = name.rpartition("/")
        with self._errors(), tempfile.TemporaryDirectory(prefix="qcore-upload-") as tmp:
            renamed = Path(tmp) / base  # the client stores a file under its own name
            shutil.copyfile(path, renamed)
            self._client.log_artifact(run_id, str(renamed), folder or None)

    def finish(self, run_id: str, status: Status, end_ms: int) -> None:
        """Set the status and the end time of a run."""
        with self._errors():
            self._client.set_terminated(run_id, status=status, end_time=end_ms)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except MlflowException as e:
            raise RefusedError(f"{self.uri}: {_first_line(e)}", str(e.error_code)) from e
        except (SQLAlchemyError, OSError) as e:
            raise TrackingError(f"{self.uri}: {_first_line(e)}; check the tracking URI") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _lock(db: Path | None) -> Iterator[None]:
    """Hold the lock file beside `db` for the length of the block."""
    if db is None:
        yield
        return
    with db.with_name(f"{db.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
