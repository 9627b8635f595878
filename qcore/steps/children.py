"""Parts of a step in processes of their own: `python -m qcore.steps.children` reads one call from stdin and does it.

A child says on stdout, a JSON object per line, how far it is and what came of it. A child that fails, or dies, ends
the others, and the caller gets one error in the child's own words.
"""

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from qcore import errors
from qcore.canonical import Json
from qcore.errors import QcoreError
from qcore.steps.guard import Progress, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a child does: `what` it is called, its JSON arguments, and the `name` that messages give it."""

    what: str
    arguments: dict[str, Json]
    name: str


def run_children(calls: Sequence[Call], progress: Progress = silent) -> list[Json]:
    """Return the results of all calls, done at the same time; `progress` gets the sums over all children.

    Raises:
        QcoreError: a call failed (its own class and words), or its process was killed; the others are then ended.
    """
    said: queue.Queue[tuple[int, Json]] = queue.Queue()
    children: list[subprocess.Popen[bytes]] = []
    results: list[Json] = [None] * len(calls)
    reports: dict[int, tuple[int, int]] = {}
    with tempfile.TemporaryFile() as log:
        try:
            for k, call in enumerate(calls):
                children.append(_start(call, log))
                threading.Thread(target=_listen, args=(k, children[k], said), daemon=True).start()
            left = len(calls)
            while left:
                k, message = said.get()
                if message is None:
                    raise _death(calls[k], children[k], log)
                if "error" in message:
                    raise _error(*message["error"])
                if "progress" in message:
                    what, *reports[k] = message["progress"]
                    done, total = (sum(column) for column in zip(*reports.values(), strict=True))
                    progress(what, done, total)
                else:
                    results[k] = message["result"]
                    left -= 1
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
    return results


def _start(call: Call, log: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "qcore.steps.children"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    assert child.stdin is not None  # noqa: S101 - it is a pipe
    child.stdin.write(json.dumps({"what": call.what, "arguments": call.arguments}).encode())
    child.stdin.close()
    return child


def _listen(k: int, child: subprocess.Popen[bytes], said: "queue.Queue[tuple[int, Json]]") -> None:
    """Pass on what a child says until its result or its error; None if it ends without."""
    assert child.stdout is not None  # noqa: S101 - it is a pipe
    for line in child.stdout:
        message = json.loads(line)
        said.put((k, message))
        if "progress" not in message:
            return
    said.put((k, None))


def _death(call: Call, child: subprocess.Popen[bytes], log: IO[bytes]) -> QcoreError:
    code = child.wait()
    if code < 0:
        why = f"was killed by {signal.Signals(-code).name}, out of memory?; run fewer jobs at a time"
    else:
        log.seek(0)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        why = f"ended with status {code}: {(lines or ['it said nothing'])[-1][:300]}"
    return QcoreError(f"the process {call.name} {why}; nothing was written")


def _error(name: str, message: str) -> QcoreError:
    kind = getattr(errors, name, QcoreError)
    return kind(message) if isinstance(kind, type) and issubclass(kind, QcoreError) else QcoreError(message)


def _say(message: Json) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do the call on stdin and say what came of it."""
    from qcore.steps import calibration

    call = json.loads(sys.stdin.buffer.read())

    def progress(what: str, done: int, total: int) -> None:
        _say({"progress": [what, done, total]})

    try:
        match call["what"]:
            case "plan":
                result = calibration.plan_file(**call["arguments"])
            case "cut":
                result = calibration.cut_file(**call["arguments"])
            case "count":
                calibration.count_part(**call["arguments"], progress=progress)
                result = None
            case other:
                raise QcoreError(f"no call is named {other!r}")
    except QcoreError as e:
        _say({"error": [type(e).__name__, " ".join(str(e).split())]})
    else:
        _say({"result": result})


if __name__ == "__main__":
    main()
