"""The review in Markdown, verdict first: the description of a run in MLflow, and KFP's Markdown.

MLflow keeps 8,000 characters of a description. The six questions of a reviewer are shortened until they fit, row by
row; other sections follow while there is room, and those that do not fit are named.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcore.review.facts import Review
from qcore.review.sections import sections
from qcore.review.tables import Section, Table
from qcore.review.wording import count, cut

DESCRIPTION = 8000
"""Characters that MLflow keeps of a tag."""

FIRST = ("models", "gate", "changed", "cost", "lineage", "override")
"""What a description must say if it says anything; the others follow while there is room."""


@dataclass(frozen=True, slots=True)
class _Length:
    """How much of a section is shown: tables, rows of each, characters of a cell and of the text."""

    tables: int
    rows: int
    cell: int
    text: int


_LENGTHS = (
    _Length(99, 24, 120, 500),
    _Length(12, 16, 120, 500),
    _Length(3, 16, 100, 400),
    _Length(2, 16, 90, 300),
    _Length(1, 8, 80, 200),
    _Length(0, 0, 0, 80),
)
_STEPS = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 5), (5, 5))
"""How long the checks and the other questions are, longest first; what decides is shortened last."""


def to_markdown(review: Review, *, limit: int = DESCRIPTION, rest: str = "review.html") -> str:
    """Return the review in at most `limit` characters, at least 1000; what is left out is in the file `rest`.

    The sections of `FIRST` are in any description of `DESCRIPTION` characters.
    """
    found = sections(review)
    titles = {s.key: s.title for s in found}
    asked = {key for key in FIRST if key in titles}
    note = f"\n{_escaped(review.signature, code=True)}\n" if review.signature else ""
    head = f"**{_escaped(cut(review.verdict, 500))}**\n{note}\n{_escaped(cut(review.sure, 600))}\n"
    for gate, others in _STEPS:
        lengths = {s.key: gate if s.key == "gate" else others if s.key in asked else 1 for s in found}
        blocks = {s.key: _section(s, rest, _LENGTHS[lengths[s.key]]) for s in found}
        if len(_document(head, blocks, asked, titles, rest)) <= limit:
            break
    else:
        asked = set()
    order = [*(key for key in FIRST if key in titles), *(s.key for s in found if s.key not in FIRST)]
    for key in order:
        if len(_document(head, blocks, asked | {key}, titles, rest)) <= limit:
            asked.add(key)
    return _document(head, blocks, asked, titles, rest)


def _document(head: str, blocks: Mapping[str, str], kept: set[str], titles: Mapping[str, str], rest: str) -> str:
    text = "\n".join([head, *(block for key, block in blocks.items() if key in kept)])
    left = [titles[key] for key in blocks if key not in kept]
    if not left:
        return f"{text}\nPlots and everything else: `{rest}`.\n"
    return f"{text}\nLeft out here, see `{rest}`: {'; '.join(left)}.\n"


def _section(section: Section, rest: str, length: _Length) -> str:
    parts = [f"### {section.title}"]
    if section.text:
        parts.append(_escaped(cut(section.text, length.text)))
    shown = [t for t in section.tables if not t.aside and not t.minor]
    parts += [_table(t, rest, length) for t in shown[: length.tables]]
    if len(shown) > length.tables:
        parts.append(f"{count(len(shown) - length.tables, 'further table')} in `{rest}`.")
    if aside := sum(t.aside for t in section.tables):
        parts.append(f"{count(aside, 'table')} of other candidates in `{rest}`.")
    if minor := sum(t.minor and not t.aside for t in section.tables):
        parts.append(f"{count(minor, 'table')} of groups that pass in `{rest}`.")
    return "\n\n".join(parts) + "\n"


def _table(table: Table, rest: str, length: _Length) -> str:
    head = [f"**{_escaped(table.title)}**", ""] if table.title else []
    rule = ["---:" if k in table.right else "---" for k in range(len(table.header))]
    rows = [_row(row, length.cell) for row in table.rows[: length.rows]]
    lines = [*head, _row(table.header, 120), "| " + " | ".join(rule) + " |", *rows]
    if len(table.rows) > length.rows:
        lines += ["", f"{count(len(table.rows) - length.rows, 'row')} more in `{rest}`."]
    return "\n".join([*lines, *(["", _escaped(table.more)] if table.more else [])])


def _row(cells: Sequence[str], length: int) -> str:
    return "| " + " | ".join(_escaped(cut(c, length)) for c in cells) + " |"


def _escaped(text: str, *, code: bool = False) -> str:
    """Return `text` so that nothing in it is read as Markdown or HTML; names like `top1_drop` stay as they are.

    With `code` backquotes stay: for texts of our own.
    """
    marks = r"[\\*\[\]|~]" if code else r"[\\`*\[\]|~]"
    text = re.sub(rf"{marks}|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda m: "\\" + m[0], text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
