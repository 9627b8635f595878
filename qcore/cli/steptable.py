"""The tasks of a pipeline run as they go: a live table on a terminal, else a line whenever something changes."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qcore.pipelines.watch import Row

MARKS = {"waiting": "·", "running": "…", "done": "✓", "failed": "✗", "skipped": "-"}
PLAIN_EVERY_S = 2.0


@contextlib.contextmanager
def step_table(title: str) -> Iterator[Callable[[Row], None]]:
    """Yield the callback that a run reports its tasks to; the last state stays on the screen."""
    print(title, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        yield _plain()
        return
    rows: dict[str, Row] = {}
    with Live(get_renderable=lambda: _table(list(rows.values())), console=Console(stderr=True), refresh_per_second=8):

        def changed(row: Row) -> None:
            rows[row.name] = row

        yield changed


def _table(rows: list[Row]) -> Table:
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(MARKS[row.state], row.name, _seconds(row), _doing(row))
    return table


def _seconds(row: Row) -> str:
    if row.seconds is not None:
        return f"{row.seconds:.1f} s"
    return f"{time.time() - row.started_ms / 1000:.1f} s" if row.started_ms and row.state == "running" else ""


def _doing(row: Row) -> str:
    if row.error is not None:
        return row.error[1]
    if row.state == "running" and row.total:
        return f"{row.what} {row.done}/{row.total}"
    return "not run" if row.state == "skipped" else ""


def _plain() -> Callable[[Row], None]:
    last: dict[str, tuple[str, float]] = {}

    def changed(row: Row) -> None:
        state, then = last.get(row.name, ("waiting", 0.0))
        now = time.monotonic()
        if row.state != state or (row.state == "running" and row.total and now - then >= PLAIN_EVERY_S):
            last[row.name] = (row.state, now)
            print(
                f"  {MARKS[row.state]} {row.name} {_seconds(row)} {_doing(row)}".rstrip(), file=sys.stderr, flush=True
            )

    return changed
