"""Journals sent to the tracking server from a thread of the process that runs a pipeline, as its tasks end.

Importing mlflow and creating a database happen beside the tasks instead of before or in them. A server that fails costs
the run nothing: what it did not take is tried again with the next journal and at the end. `close` waits a bounded time
and says what is left to do.
"""

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qcore.tracking.journal import TrackingError, read_journal
from qcore.tracking.replay import is_http, open_sink, replay_lines, run_url
from qcore.tracking.sink import Sink

logger = logging.getLogger(__name__)

PATIENCE_HTTP_S = 8.0
PATIENCE_DATABASE_S = 120.0
"""How long `close` waits: a server may be sick, a local database is only slow."""
BESIDE_S = 600.0
"""What sending may take over http while tasks run: nobody waits for it, but an end must be there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Uploaded:
    """The parent run's id, where to look at it, and what went wrong; None where not known, and for nothing wrong."""

    run_id: str | None
    url: str | None
    problem: str | None


class Uploader:
    """A thread that sends the journals it is offered, in order, to one tracking URI."""

    def __init__(self, folder: Path, uri: str, env: Mapping[str, str]) -> None:
        """Start the thread.

        Args:
            folder: the journal folder.
            uri: MLflow tracking URI.
            env: where the credentials of an http server are looked up.
        """
        self._folder, self._uri, self._env = folder, uri, env
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._enough = threading.Event()
        self._result = Uploaded(run_id=None, url=None, problem=None)
        self._sink: Sink | None = None
        self._thread = threading.Thread(target=self._work, name="qcore-uploader", daemon=True)
        self._thread.start()

    def offer(self, journal: Path) -> None:
        """Send `journal` when its turn comes; it may be offered again when it has grown."""
        self._queue.put(journal)

    def close(self) -> Uploaded:
        """Return the result after everything offered is sent, or the patience is over."""
        self._queue.put(None)
        self._thread.join(PATIENCE_HTTP_S if is_http(self._uri) else PATIENCE_DATABASE_S)
        result = self._result
        if self._thread.is_alive():
            self._enough.set()
            result = Uploaded(run_id=result.run_id, url=result.url, problem=f"{self._uri}: too slow, not all was sent")
        if result.problem is not None:
            logger.warning(
                "not tracked: %s (to have it later: `qcore mlflow replay --journal %s --uri URI`)",
                result.problem,
                self._folder,
            )
        return result

    def _work(self) -> None:
        waiting: dict[Path, None] = {}
        more = True
        while more and not self._enough.is_set():
            path = self._queue.get()
            more = path is not None
            if path is not None:
                waiting[path] = None
            if self._queue.empty() or not more:
                self._send(waiting)

    def _send(self, waiting: dict[Path, None]) -> None:
        """Send what waits, oldest first, and forget what arrived; stop at the first that fails."""
        try:
            for path in list(waiting):
                self._sink = self._sink or open_sink(self._uri, self._env, budget_s=BESIDE_S)
                target = replay_lines(read_journal(path), self._sink, self._folder)
                del waiting[path]
                self._result = Uploaded(run_id=target.parent, url=run_url(self._uri, target), problem=None)
        except (TrackingError, OSError) as e:
            self._result = Uploaded(run_id=self._result.run_id, url=self._result.url, problem=str(e))
