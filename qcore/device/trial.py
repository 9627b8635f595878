"""The self-test as another process: what the device's own process must not load, and a model that hangs or crashes it.

The command is configured; exit 0 means the model gives the golden answers here, 1 that it does not, anything else that
it could not be tried. Time, CPU and address space are bounded (`limits.py`): a model that asks for all memory fails its
test, and the service beside it goes on.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qcore.device import limits
from qcore.device.config import DeviceConfig
from qcore.device.refusals import refusal
from qcore.release.manifest import MODEL

MAX_OUTPUT_BYTES = 2000
BASE_BYTES = 2048 << 20
"""Address space of an interpreter with numpy and onnxruntime, most of it never touched, and of activations."""
COPIES = 3
"""The file, its parsed form, and weights in the order in which kernels read them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`good`: the model passed; otherwise `reason` says why not in one line."""

    good: bool
    reason: str


def try_slot(config: DeviceConfig, slot: Path) -> Verdict:
    """Return the self-test's verdict on the package unpacked in `slot`; a hang or a crash is a bad model.

    Raises:
        UpdateError: E_SELFTEST: the test itself cannot run here, so nothing is known of the model.
    """
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                [*_bounded(config, slot), *config.selftest, str(slot)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            raise refusal(
                "E_SELFTEST", f"{sys.executable} cannot be started: {e.strerror}; mend the installation of qcore"
            ) from e
        try:
            code = process.wait(timeout=config.selftest_timeout_s)
        except subprocess.TimeoutExpired:
            return Verdict(good=False, reason=f"no answer in {config.selftest_timeout_s} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its session is its own: whatever it started ends too
                process.wait()
        out.seek(max(0, out.seek(0, os.SEEK_END) - MAX_OUTPUT_BYTES))
        lines = out.read().decode("utf-8", "replace").strip().splitlines() or ["no output"]
    if code == 0:
        return Verdict(good=True, reason=lines[-1])
    if code == 1 or code < 0:
        return Verdict(good=False, reason=f"exit {code}: {lines[-1]}")
    raise refusal(
        "E_SELFTEST", f"the self-test could not run (exit {code}): {lines[-1]}; mend `selftest`, then install again"
    )


def _bounded(config: DeviceConfig, slot: Path) -> list[str]:
    """Return the command that sets the limits and becomes what follows it."""
    model = slot / MODEL
    memory = config.selftest_memory_mb << 20 or BASE_BYTES + COPIES * model.stat().st_size
    return [sys.executable, "-I", "-S", limits.__file__, str(memory), str(math.ceil(config.selftest_timeout_s))]
