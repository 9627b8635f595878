"""How training is shown: a line per epoch while it goes on, a table at the end, and what it cost and gained."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcore.cli.output import percent, print_table, progress_and_lines
from qcore.steps import OnEpoch, Progress

if TYPE_CHECKING:
    from qcore.compression import AppliedStep
    from qcore.methods.finetune import Epoch


@contextlib.contextmanager
def training_progress() -> Iterator[tuple[Progress, OnEpoch]]:
    """Yield what steps that train report to: steps done, and epochs, a line each; both on stderr."""
    with progress_and_lines() as (report, line):
        yield report, lambda epoch: line(_line(epoch))


def _line(epoch: "Epoch") -> str:
    if epoch.loss is None:
        return f"before training: validation loss {epoch.validation:.4g}{_accuracy(epoch)}"
    losses = f"loss {epoch.loss:.4g}, validation loss {epoch.validation:.4g}{_accuracy(epoch)}"
    return f"epoch {epoch.number}: {losses}, {epoch.seconds:.1f} s"


def _accuracy(epoch: "Epoch") -> str:
    return "" if epoch.accuracy is None else f", accuracy {percent(epoch.accuracy)}"


def print_epochs(step: "AppliedStep") -> None:
    """Print a row per epoch of a step that trained, the one that is kept marked."""
    rows = [
        (
            str(e.number),
            "" if e.loss is None else f"{e.loss:.4g}",
            f"{e.validation:.4g}",
            "" if e.accuracy is None else percent(e.accuracy),
            f"{e.seconds:.1f} s",
            "<-" if e.number == step.best else "",
        )
        for e in step.epochs
    ]
    columns = ("epoch", "loss", "validation loss", "accuracy", "time", "kept")
    print_table(f"Epochs of {step.method}; 0 is before training", columns, rows)


def gained(step: "AppliedStep") -> str:
    """Return in words what a step that trained gained and what it cost."""
    first, best = step.epochs[0], step.epochs[step.best or 0]
    cost = f"{step.samples} samples x {len(step.epochs) - 1} in {sum(e.seconds for e in step.epochs):.0f} s"
    if not step.kept:
        return f"{first.validation:.3g} was never beaten, not kept; {cost}"
    accuracy = ""
    if first.accuracy is not None and best.accuracy is not None:
        accuracy = f", accuracy {percent(first.accuracy)} -> {percent(best.accuracy)}"
    return f"{first.validation:.3g} -> {best.validation:.3g}{accuracy}; {cost}"
