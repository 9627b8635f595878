"""Every test that docs/threat-model.md names exists, and no row is there twice."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "threat-model.md").read_text()


def rows() -> list[list[str]]:
    table = [[c.strip() for c in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
    return [row for row in table if row[0] != "#"]


def test_every_row_has_a_test_that_exists() -> None:
    for number, _, _, named in rows():
        tests = re.findall(r"`(tests/\S+?)::(\w+)`", named)
        assert tests, f"row {number} names no test"
        for path, name in tests:
            nodes = ast.walk(ast.parse((ROOT / path).read_text()))
            functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
            assert name in functions, f"row {number}: {path} has no {name}"


def test_rows_are_in_order_and_there_once() -> None:
    numbers = [int(n) for row in rows() for n in row[0].split(",")]
    assert numbers == sorted(set(numbers))
