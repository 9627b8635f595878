"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def bench() -> Path:
    """The folder of real models and images, which is not part of the repository: $QCORE_BENCH or ../shared/bench."""
    folder = Path(os.environ.get("QCORE_BENCH", ROOT.parent / "shared" / "bench"))
    if not (folder / "models").is_dir():
        pytest.skip(
            f"no folder {folder / 'models'}: real models are not in the repository; set QCORE_BENCH to their folder"
        )
    return folder
