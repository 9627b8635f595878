"""The self-test as another process: what the device's own process must not load, and a model that hangs or crashes it.

The command is configured; exit 0 means the model gives the golden answers here, 1 that it does not, anything else that
it could not be tried. Memory and CPU limits are not here yet.
"""

import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qcore.device.config import DeviceConfig
from qcore.device.refusals import refusal

MAX_OUTPUT_BYTES = 2000


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
                [*config.selftest, str(slot)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            raise refusal(
                "E_SELFTEST", f"command {config.selftest[0]!r} cannot be started: {e.strerror}; mend `selftest`"
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
    raise refusal("E_SELFTEST", f"the self-test could not run (exit {code}): {lines[-1]}; mend it, then install again")
