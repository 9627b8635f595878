"""The fuzzing job for some seconds per reader; opt-in, since atheris is no dependency (`make fuzz`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = int(os.environ.get("QCORE_FUZZ_SECONDS", "20"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["package", "manifest", "admission", "golden", "evidence"])
def test_nothing_but_refusals_comes_of_mutated_bytes(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed, it has no wheel for every Python; `make fuzz`")
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), target, "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=SECONDS + 300)
    assert done.returncode == 0, done.stderr[-3000:]
