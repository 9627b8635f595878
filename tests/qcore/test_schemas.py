from pathlib import Path

from qcore.schemas import write_schemas

ROOT = Path(__file__).resolve().parents[2]


def test_the_published_schemas_are_fresh(tmp_path):
    new = {p.name: p.read_text() for p in write_schemas(tmp_path)}
    old = {p.name: p.read_text() for p in (ROOT / "docs" / "schemas").iterdir()}
    assert old == new, "docs/schemas differs from its sources; run `make compile` and commit the result"
