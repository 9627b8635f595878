"""A local tracking database (or any other URI that mlflow knows) through mlflow's client.

Importing mlflow costs two to three seconds and creating a database as much again, so only the runner uses this, once
per run and never in a task. Two processes that create the same database at once would both fail: a lock file beside it
makes them take turns.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from qcore.tracking.journal import Status, TrackingError
from qcore.tracking.rest import tag_filter
from qcore.tracking.sink import EXPERIMENT_TAGS, Batch

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

    def run_tags(self, run_id: str) -> Mapping[str, str]:
        """Return the tags of a run."""
        with self._errors():
            return dict(self._client.get_run(run_id).data.tags)

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
        except (MlflowException, SQLAlchemyError, OSError) as e:
            said = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise TrackingError(f"{self.uri}: {said[:200]}; check the tracking URI") from e


@contextlib.contextmanager
def _lock(db: Path | None) -> Iterator[None]:
    """Hold the lock file beside `db` for the length of the block."""
    if db is None:
        yield
        return
    with db.with_name(f"{db.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
