"""Titled tables of text, which Markdown and page show alike, and what sections about several candidates share.

A table holds at most what people read; `more` says what else there is, and the JSON form has all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qcore.review.facts import Judged, Review
from qcore.review.wording import count

ALL_OF_IT = "review.json has all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A titled table of text; every row has as many cells as the header, and columns in `right` hold numbers.

    `more` says how much is not in it. `aside`: it is about another candidate than the one that the verdict is about.
    `minor`: it holds nothing that decides, and only the page shows it. `over` are titles over several columns, each
    with their number; then `header` repeats them in front of `: `.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    more: str = ""
    aside: bool = False
    minor: bool = False
    over: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One question of a reviewer and the answer: a sentence or two, then tables. `key` names it for plots and links."""

    key: str
    title: str
    text: str
    tables: tuple[Table, ...] = ()


def subject_first(review: Review) -> list[Judged]:
    """Return all candidates, the one that the verdict is about first."""
    rest = [c for k, c in enumerate(review.candidates) if k != review.subject]
    return [review.judged, *rest]


def number_columns(header: Sequence[str], text: Sequence[str]) -> frozenset[int]:
    """Return the columns of `header` that hold numbers: all but those in `text`."""
    return frozenset(k for k, name in enumerate(header) if name not in text)


def rest_of(found: int, shown: int, one: str, many: str = "") -> str:
    """Return how many are not in a table that shows `shown` of `found`; nothing where all are."""
    left = count(found - shown, f"further {one}", f"further {many or one + 's'}")
    return f"{left}; {ALL_OF_IT}." if found > shown else ""
