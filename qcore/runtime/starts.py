"""Starts of models in fresh processes: time to the first answer, and peak memory."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from qcore.errors import ModelError
from qcore.runtime import first_answer

Tensors = Mapping[str, NDArray[np.generic]]
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """Starts of one model: milliseconds of each, and the median of the peak of memory, None where nobody tells."""

    ms: tuple[float, ...]
    peak_memory_bytes: int | None


def measure_starts(models: Sequence[bytes], feds: Sequence[Tensors], runs: int) -> list[Starts]:
    """Return what `runs` starts of each model take, in turns, so that all see the same machine.

    What a start is says `first_answer`; files have just been written, so they come from the page cache.

    Args:
        models: the bytes of ONNX files.
        feds: of each model one batch, in its dtypes.
        runs: at least 1.

    Raises:
        ModelError: a process did not end as it should.
    """
    seen: list[list[dict[str, float]]] = [[] for _ in models]
    with tempfile.TemporaryDirectory(prefix="qcore-starts.") as folder:
        files = []
        for k, (raw, fed) in enumerate(zip(models, feds, strict=True)):
            model, inputs = Path(folder) / f"{k}.onnx", Path(folder) / f"{k}.npz"
            model.write_bytes(raw)
            np.savez(inputs, allow_pickle=False, **fed)
            files.append((model, inputs))
        for turn in range(runs):
            order = range(len(models)) if turn % 2 else reversed(range(len(models)))
            for k in order:
                seen[k].append(_start(*files[k]))
    return [Starts(ms=tuple(s["ms"] for s in one), peak_memory_bytes=_peak(one)) for one in seen]


def _peak(starts: Sequence[Mapping[str, float]]) -> int | None:
    held = [s["bytes"] for s in starts]
    return None if None in held else int(median(held))


def _start(model: Path, inputs: Path) -> dict[str, float]:
    command = [sys.executable, "-P", first_answer.__file__, str(model), str(inputs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except subprocess.TimeoutExpired as e:
        raise ModelError(f"the model gave no answer within {TIMEOUT_S} s of a fresh process; run it by itself") from e
    except subprocess.CalledProcessError as e:
        said = " ".join(e.stderr.split())[-200:]
        raise ModelError(f"the model cannot be started in a fresh process ({said}); is there enough memory?") from e
    found: dict[str, float] = json.loads(done.stdout)
    return found
