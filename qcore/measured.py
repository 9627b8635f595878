"""What was measured of one model file: its digest and sizes, its times, its memory, and how two files compare.

Plain values that refuse what no measurement gives. Standard library only, as `report.py`, which they are part of.
"""

import math
from dataclasses import dataclass

from qcore.canonical import Digest
from qcore.errors import GateRefused


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Wall time in milliseconds: median and 95th percentile over `runs` timed calls or starts."""

    p50: float
    p95: float
    runs: int

    def __post_init__(self) -> None:
        """Refuse what no measurement gives."""
        if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in (self.p50, self.p95, self.runs)):
            raise GateRefused(f"latency {self.p50}, {self.p95} over {self.runs} runs; allowed: finite and above 0")


TIMED = ("latency", "latency_all_cores", "cold_start")
"""What is timed in rounds: one inference at batch 1 on one thread, the same on all cores, and a start.

A start is what a fresh process takes from the file to the first answer: read, prepare, run once; the runtime is
imported, and the file in the page cache.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Milliseconds of baseline and candidate, timed next to each other in every round: what drifts hits both."""

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what no measurement gives."""
        columns = (self.baseline, self.candidate)
        if len(columns[0]) != len(columns[1]) or not columns[0]:
            raise GateRefused(f"rounds hold {[len(c) for c in columns]} times; allowed: one of each model, 1 or more")
        if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for column in columns for v in column):
            raise GateRefused("rounds hold a time that is no number of milliseconds; allowed: finite and above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Candidate / baseline: the median over rounds, with one-sided bounds at 95 % on both sides.

    Together they are an interval at 90 %. None: too few rounds to have bounds.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """What a device downloads that has the released model: bytes of the smallest delta that makes the candidate."""

    released_sha256: Digest
    delta_bytes: int

    def __post_init__(self) -> None:
        """Refuse what is no download."""
        check_bytes("delta_bytes", self.delta_bytes)
        check_digest(self.released_sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredModel:
    """One model file as it was measured: SHA-256, and what it costs; None is what was not measured.

    `latency_ms` is that of one inference at batch 1 on one thread. `package_bytes` is what the file takes in a
    package; `cold_start_ms` that of a start (`TIMED`), and `peak_memory_bytes` what such a process holds at most above
    one that has imported the runtime: file, weights, activations of one sample.
    """

    sha256: Digest
    size_bytes: int
    latency_ms: Latency
    package_bytes: int | None = None
    latency_all_cores_ms: Latency | None = None
    cold_start_ms: Latency | None = None
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no file."""
        for name in ("size_bytes", "package_bytes", "peak_memory_bytes"):
            if name == "size_bytes" or getattr(self, name) is not None:
                check_bytes(name, getattr(self, name))
        check_digest(self.sha256)


def check_bytes(name: str, value: object) -> None:
    """Refuse a size that no file has.

    Raises:
        GateRefused: it is not a whole number above 0.
    """
    if type(value) is not int or value <= 0:
        raise GateRefused(f"{name} is {value!r}; allowed: a whole number above 0")


def check_digest(value: object) -> None:
    """Refuse what is no SHA-256.

    Raises:
        GateRefused: not 64 lower-case hex digits.
    """
    if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise GateRefused(f"digest {str(value)[:70]!r} is not a SHA-256 of 64 lower-case hex digits")
