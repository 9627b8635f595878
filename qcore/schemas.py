"""The JSON Schemas of what users write, for editors and validators: `python -m qcore.schemas FOLDER`."""

import json
import sys
from pathlib import Path

from qcore.config import Config
from qcore.data.card import DataCard
from qcore.files import write_atomic
from qcore.policy import GatePolicy
from qcore.recipe import Recipe
from qcore.target import TargetProfile

SCHEMAS: dict[str, type[Config]] = {
    "data-card": DataCard,
    "gate-policy": GatePolicy,
    "recipe": Recipe,
    "target-profile": TargetProfile,
}


def write_schemas(folder: Path) -> tuple[Path, ...]:
    """Return the files `<name>.schema.json` written into `folder`; the same sources give the same bytes."""
    written = []
    for name, kind in SCHEMAS.items():
        path = folder / f"{name}.schema.json"
        write_atomic(path, (json.dumps(kind.model_json_schema(), indent=2, sort_keys=True) + "\n").encode())
        written.append(path)
    return tuple(written)


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
