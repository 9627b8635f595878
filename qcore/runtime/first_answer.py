"""`python first_answer.py MODEL INPUTS.npz`: how long a fresh process takes to its first answer, and what it holds.

Run by `starts.py`, one process a measurement. Imports no qcore, so that nothing but the runtime is there before the
clock starts. One JSON object on stdout: `ms` from reading the file to the answer, and `bytes`, the peak of resident
memory above what the interpreter held after importing the runtime; null where the system does not tell (not Linux).
"""

import json
import sys
import time
from pathlib import Path


def main(model: Path, inputs: Path) -> None:
    """Measure one start and print it."""
    import numpy as np
    import onnxruntime as ort

    fed = dict(np.load(inputs, allow_pickle=False))
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    before = resident("VmRSS")
    forget_peak()
    start = time.perf_counter_ns()
    session = ort.InferenceSession(model.read_bytes(), options, providers=["CPUExecutionProvider"])
    session.run(None, fed)
    ms = (time.perf_counter_ns() - start) / 1e6
    peak = resident("VmHWM")
    held = None if before is None or peak is None or peak <= before else peak - before
    sys.stdout.write(json.dumps({"ms": ms, "bytes": held}))


def resident(name: str) -> int | None:
    """Return the bytes of VmRSS, or VmHWM, its peak; of this program only, unlike getrusage, which knows the parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def forget_peak() -> None:
    """Let VmHWM begin anew, or what imports needed for a moment would hide a small model."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # a kernel without it: the peak is then at least that of the imports
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
