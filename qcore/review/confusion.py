"""The confusion matrix of a candidate in a size that people can read."""

from collections.abc import Mapping
from typing import Protocol

from qcore.report import EvaluationReport

FEW, WORST = 50, 20
"""Up to so many classes are all shown; of more, so many that the candidate gets wrong most often."""
OTHERS = "all others"


class ConfusionPort(Protocol):
    """The part of `kfp.dsl.ClassificationMetrics` that is used here; the library does not import kfp."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Keep the matrix; rows are what is right."""


def log_confusion(port: ConfusionPort, report: EvaluationReport, classes: Mapping[int, str]) -> None:
    """Put the candidate's confusion matrix into `port`; nothing where the samples have no classes."""
    names, matrix = confusion_matrix(report, classes)
    if names:
        port.log_confusion_matrix(list(names), [list(row) for row in matrix])


def confusion_matrix(
    report: EvaluationReport, classes: Mapping[int, str]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return names and the candidate's counts: a row for each true class, a column for each answer.

    Of more than `FEW` classes the `WORST` are shown and the others together as one, so the counts always add up to n.
    Empty where the samples have no classes.
    """
    if report.details is None:
        return (), ()
    cells = report.details.candidate.confusion
    wrong: dict[int, int] = {k: 0 for cell in cells for k in cell[:2]}
    for label, named, n in cells:
        wrong[label] += n if label != named else 0
    shown = sorted(wrong)
    if len(shown) > FEW:
        shown = sorted(sorted(wrong, key=lambda k: (-wrong[k], k))[:WORST])
    place = {k: i for i, k in enumerate(shown)}
    rest = len(shown)
    matrix = [[0] * (rest + 1) for _ in range(rest + 1)]
    for label, named, n in cells:
        matrix[place.get(label, rest)][place.get(named, rest)] += n
    names = [f"{k} {classes[k]}" if k in classes else str(k) for k in shown]
    if len(wrong) == rest:
        return tuple(names), tuple(tuple(row[:-1]) for row in matrix[:-1])
    return (*names, OTHERS), tuple(map(tuple, matrix))
