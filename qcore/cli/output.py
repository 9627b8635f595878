"""What verbs print: tables for people, one JSON object for machines, and progress on stderr while they wait."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qcore.canonical import Json
from qcore.steps import Progress as Report

PLAIN_EVERY_S = 2.0
PIPED_WIDTH = 120
MIB = 1 << 20


def out() -> Console:
    """Return the console of stdout; wide where nobody has a window whose width would count."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def print_json(value: Json) -> None:
    """Print `value` as one JSON object."""
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print a title and a line per fact, unwrapped, so that paths can be copied."""
    width = max(map(len, facts), default=0)
    print("\n".join([title, *(f"  {k:<{width}}  {v}" for k, v in facts.items())]))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left aligned, the others right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out().print(table)


def size(n: float) -> str:
    """Return bytes in a unit that people read."""
    return f"{n / MIB:.2f} MiB" if n >= MIB else f"{n / 1024:.1f} KiB"


def plain(x: float) -> str:
    """Return a number for a table: whole ones as such, others with four decimals, or more where they are tiny."""
    if float(x).is_integer() and abs(x) < 1e15:
        return f"{int(x):,}"
    return f"{x:,.4f}" if abs(x) >= 0.001 else f"{x:.2g}"


def percent(x: float) -> str:
    """Return a fraction of 1 as per cent."""
    return f"{100 * x:.2f} %"


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Yield what steps report to: a bar on a terminal, else a plain line now and then; both on stderr."""
    with progress_and_lines() as (report, _):
        yield report


@contextlib.contextmanager
def progress_and_lines() -> Iterator[tuple[Report, Callable[[str], None]]]:
    """Yield what steps report to, as `progress`, and a function that prints a line which stays, above the bars."""
    if not sys.stderr.isatty():
        yield _plain(), lambda text: print(text, file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield report, console.print


def _plain() -> Report:
    last: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in last or done == total or now - last[what] >= PLAIN_EVERY_S:
            last[what] = now
            print(f"{what} {done}/{total}" if total else f"{what}: {done} done", file=sys.stderr, flush=True)

    return report
