"""How long a run waits for its tracking server, all tasks together.

What sending costs a task is added to the run. So all tasks of a run share a ledger, a file beside their journals: what
a sick server has cost is not spent again by the next task, and after a failure it is left alone for a while. Tasks
without a common folder find out for themselves, and give a server less than one second to answer for the first time.
"""

import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from qcore.tracking.journal import TrackingError

RUN_LOSS_S = 6.0
"""What one run may lose to a sick server; with the last task's `FAIR_S`, a fraction of the ten seconds promised."""
FAIR_S = 1.0
"""What sending may cost a task without counting as loss: a healthy server takes a quarter of a second."""
AGAIN_AFTER_S = 60.0
"""How long a server that failed is left alone."""
ALONE_S = 8.0
ALONE_FIRST_ANSWER_S = 0.75
"""Without a ledger: all calls of a task together, and the first of them."""

LEDGER = "server.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What a run has lost so far, in seconds; when (seconds since 1970) its server last failed (0: never), and how."""

    lost_s: float = 0.0
    failed_at: float = 0.0
    problem: str = ""

    def allowance(self, now: float) -> float:
        """Return how long the next sending may take, in seconds; 0 while the server is to be left alone."""
        if self.failed_at and now - self.failed_at < AGAIN_AFTER_S:
            return 0.0
        left = RUN_LOSS_S - self.lost_s
        return left + FAIR_S if left > 0 else 0.0

    def after(self, took_s: float, problem: str, now: float) -> "Loss":
        """Return the loss after a sending that took so long; `problem` is empty where it went well."""
        cost = took_s if problem else max(0.0, took_s - FAIR_S)
        if problem:
            return Loss(lost_s=self.lost_s + cost, failed_at=now, problem=problem)
        return Loss(lost_s=self.lost_s + cost, failed_at=self.failed_at, problem=self.problem)


def read_loss(folder: Path) -> Loss:
    """Return what the run that journals in `folder` has lost so far; nothing where no ledger can be read."""
    try:
        return _parse((folder / LEDGER).read_text(encoding="utf-8"))
    except OSError:
        return Loss()


def add_loss(folder: Path, took_s: float, problem: str) -> None:
    """Write a sending that took so long into the ledger in `folder`.

    Raises:
        OSError: the folder cannot be written to.
    """
    with _locked(folder / LEDGER) as f:
        loss = _parse(f.read()).after(took_s, problem, time.time())
        f.seek(0)
        f.truncate()
        json.dump(asdict(loss), f)


def within(seconds: float, work: Callable[[], object]) -> None:
    """Do `work` in a thread and stop waiting for it after so many seconds: a socket's time limit restarts at each byte.

    Raises:
        TrackingError: it takes longer (the thread goes on as long as the process), or `work` says so.
        OSError: `work` says so.
    """
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            work()
            ended.append(None)
        except (TrackingError, OSError) as e:
            ended.append(e)

    thread = threading.Thread(target=run, name="qcore-tracking", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TrackingError(f"the tracking server took more than {seconds:.0f} s; check MLFLOW_TRACKING_URI")
    if not ended:
        raise TrackingError("sending stopped with a defect of qcore; the traceback is above, please report it")
    if ended[0] is not None:
        raise ended[0]


def _parse(text: str) -> Loss:
    try:
        value = json.loads(text)
        return Loss(lost_s=float(value["lost_s"]), failed_at=float(value["failed_at"]), problem=str(value["problem"]))
    except (ValueError, KeyError, TypeError):
        return Loss()


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        yield f
