"""The review in Markdown, verdict first: the description of a run in MLflow, and KFP's Markdown.

MLflow keeps 8,000 characters of a description. What does not fit is left out section by section, and named.
"""

import re
from collections.abc import Sequence

from qcore.review.facts import Review
from qcore.review.sections import sections
from qcore.review.tables import Section, Table
from qcore.review.wording import count, cut

DESCRIPTION = 8000
"""Characters that MLflow keeps of a tag."""

FIRST = ("models", "gate", "changed", "cost", "lineage", "override")
"""What a description must say if it says anything; the others follow while there is room."""

_ROWS, _CELL = 16, 120


def to_markdown(review: Review, *, limit: int = DESCRIPTION, rest: str = "review.html") -> str:
    """Return the review in at most `limit` characters, at least 1000; what is left out is in the file `rest`."""
    found = sections(review)
    blocks = {s.key: _section(s, rest) for s in found}
    order = [key for key in FIRST if key in blocks] + [s.key for s in found if s.key not in FIRST]
    head = f"**{_escaped(cut(review.verdict, 500))}**\n\n{_escaped(cut(review.sure, 400))}\n"
    titles = {s.key: s.title for s in found}
    kept: set[str] = set()
    for key in order:
        if len(_document(head, blocks, kept | {key}, titles, rest)) <= limit:
            kept.add(key)
    return _document(head, blocks, kept, titles, rest)


def _document(head: str, blocks: dict[str, str], kept: set[str], titles: dict[str, str], rest: str) -> str:
    text = "\n".join([head, *(block for key, block in blocks.items() if key in kept)])
    left = [titles[key] for key in blocks if key not in kept]
    if not left:
        return f"{text}\nPlots and everything else: `{rest}`.\n"
    return f"{text}\nLeft out here, see `{rest}`: {'; '.join(left)}.\n"


def _section(section: Section, rest: str) -> str:
    parts = [f"### {section.title}"]
    if section.text:
        parts.append(_escaped(cut(section.text, 500)))
    parts += [_table(t, rest) for t in section.tables if not t.aside]
    if aside := sum(t.aside for t in section.tables):
        parts.append(f"{count(aside, 'table')} of other candidates in `{rest}`.")
    return "\n\n".join(parts) + "\n"


def _table(table: Table, rest: str) -> str:
    head = [f"**{_escaped(table.title)}**", ""] if table.title else []
    rule = ["---:" if k in table.right else "---" for k in range(len(table.header))]
    lines = [*head, _row(table.header), "| " + " | ".join(rule) + " |", *map(_row, table.rows[:_ROWS])]
    if len(table.rows) > _ROWS:
        lines += ["", f"{len(table.rows) - _ROWS} rows more in `{rest}`."]
    return "\n".join([*lines, *(["", _escaped(table.more)] if table.more else [])])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cut(c, _CELL)) for c in cells) + " |"


def _escaped(text: str) -> str:
    """Return `text` so that nothing in it is read as Markdown or HTML; names like `top1_drop` stay as they are."""
    text = re.sub(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda m: "\\" + m[0], text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
