"""The state of a run's tasks, read from their journals while they write them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qcore.canonical import Json
from qcore.tracking.journal import End, Line, Progress, Start, parse_line

State = Literal["waiting", "running", "done", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One task as a table shows it.

    `seconds` is the time inside the task once it has ended, `started_ms` the wall clock at its start; `what`, `done`
    and `total` are its own progress; `error` is class name and message of the error that ended it; `outputs` are paths
    of files and values of parameters, known at the end of the run.
    """

    name: str
    state: State = "waiting"
    started_ms: int | None = None
    seconds: float | None = None
    what: str = ""
    done: int = 0
    total: int = 0
    error: tuple[str, str] | None = None
    outputs: Mapping[str, Json] = field(default_factory=dict)


class Watch:
    """The rows of all tasks, kept up to date by `poll`."""

    def __init__(self, folder: Path, tasks: Sequence[str], changed: Callable[[Row], None]) -> None:
        """Announce every task as waiting.

        Args:
            folder: the journal folder; need not be there yet.
            tasks: names in the order in which they run.
            changed: called with a row whenever it changes.
        """
        self._folder, self._changed = folder, changed
        self._read: dict[Path, int] = {}
        self._task: dict[Path, str | None] = {}
        self.rows: dict[str, Row] = {}
        for name in tasks:
            self.put(Row(name=name))

    def poll(self) -> list[Path]:
        """Read what was written since the last call; return the journals that have ended since."""
        ended = []
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in self._new_lines(path):
                self._apply(path, line)
                if isinstance(line, End) and self._task.get(path):
                    ended.append(path)
        return ended

    def unfinished(self) -> list[Path]:
        """Return the journals of tasks that began and have not ended."""
        return [p for p, task in self._task.items() if task is not None and self.rows[task].state == "running"]

    def put(self, row: Row) -> None:
        """Set a row and announce it, if it differs."""
        if self.rows.get(row.name) != row:
            self.rows[row.name] = row
            self._changed(row)

    def _new_lines(self, path: Path) -> list[Line]:
        with path.open("rb") as f:
            f.seek(self._read.get(path, 0))
            data = f.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(whole)
        return [parse_line(text) for text in whole.decode().splitlines()]

    def _apply(self, path: Path, line: Line) -> None:
        if isinstance(line, Start):
            self._task[path] = line.task
        name = self._task.get(path)
        if name is None:
            return
        row = self.rows.get(name, Row(name=name))
        match line:
            case Start():
                self.put(Row(name=name, state="running", started_ms=line.time_ms))
            case Progress():
                self.put(replace(row, what=line.what, done=line.done, total=line.total))
            case End():
                seconds = (line.time_ms - (row.started_ms or line.time_ms)) / 1000
                state: State = "done" if line.status == "FINISHED" else "failed"
                self.put(replace(row, state=state, seconds=seconds, error=line.error))
            case _:
                pass
