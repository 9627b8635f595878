"""The threat table is true: every test that it names is there, and no row is there twice."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if re.match(r"\| (\d|-)", line)
]


def test_every_test_that_a_row_names_exists() -> None:
    named = {tuple(link.split("::")) for link in re.findall(r"`(tests/[^`]+::[^`]+)`", TEXT)}
    assert len(named) > 20
    missing = []
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text())
        missing += (
            [f"{path}::{name}"]
            if name not in {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
            else []
        )
    assert missing == []


def test_every_row_has_a_test_or_says_why_not() -> None:
    assert all(len(row) == 4 for row in ROWS)
    numbers = [row[0] for row in ROWS if row[0] != "-"]
    assert len(set(numbers)) == len(numbers)
    assert [row for row in ROWS if "::" not in row[3] and not row[2].startswith("no ")] == []
