"""What a peer's runner and `quantizers.py` say to each other, in files. Standard library and numpy only.

`python run_<peer>.py JOB.json` runs in the environment of the peer and nothing of qcore is there. JOB.json holds

* `model`: the float ONNX file, `samples`: an .npz with `x` (n, ...) float32, preprocessed, in calibration order,
* `output`: where the quantized ONNX file goes, `result`: where the JSON of the figures goes,
* `options`: `weights` (per-tensor | per-channel), `weight_bits`, `activations` (uint8 | int8), `symmetric` (of
  activations; weights always are), `ranges` (min-max | percentile | entropy | mse | default), `recovery` (names of the
  peer's own methods, in order).

The result holds `version`, `seconds` of the quantization alone (imports not counted), `peak_mib` of the whole process
(VmHWM) and `import_mib`, the same before the work began. A runner that cannot do what the options ask raises
`NotOffered`; the last line of stderr is then the reason.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NOT_OFFERED = 4


class NotOffered(Exception):  # noqa: N818
    """The peer has no such option."""


@dataclass(frozen=True)
class Job:
    """One quantization: files and options as in the module's docstring."""

    model: Path
    samples: Path
    output: Path
    result: Path
    options: dict[str, Any]

    def feeds(self, input_name: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield the calibration samples one by one, batch dimension kept."""
        with np.load(self.samples) as stored:
            x = stored["x"]
        for row in x:
            yield {input_name: row[None]}

    def only(self, key: str, *allowed: object) -> Any:
        """Return option `key`.

        Raises:
            NotOffered: it is not among `allowed`.
        """
        value = self.options[key]
        if value not in allowed:
            raise NotOffered(f"{key} {value} is not offered, only {', '.join(map(str, allowed))}")
        return value

    def recovery(self, *allowed: str) -> tuple[str, ...]:
        """Return the recovery methods.

        Raises:
            NotOffered: one of them is not among `allowed`.
        """
        for name in self.options["recovery"]:
            if name not in allowed:
                raise NotOffered(f"recovery {name} is not offered, only {', '.join(allowed) or 'none'}")
        return tuple(self.options["recovery"])


def serve(quantize: Callable[[Job], None], version: str) -> None:
    """Run the job named on the command line with `quantize` and write its result; exit 4 where it is not offered."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    job = Job(*(Path(raw[k]) for k in ("model", "samples", "output", "result")), options=raw["options"])
    before, start = peak_mib(), time.perf_counter()
    try:
        quantize(job)
    except NotOffered as e:
        print(e, file=sys.stderr)
        sys.exit(NOT_OFFERED)
    except Exception as e:  # noqa: BLE001 - a peer may fail in any way; the reason is what the table shows
        traceback.print_exc()
        print(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", file=sys.stderr)
        sys.exit(1)
    figures = {
        "version": version,
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(),
        "import_mib": before,
    }
    job.result.write_text(json.dumps(figures))


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def input_name(model: Path) -> str:
    """Return the name of the only input of `model`."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return str(graph.input[0].name)
