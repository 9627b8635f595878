"""What this machine is, as far as it bears on how fast a model runs. Standard library only."""

import os
import platform
from pathlib import Path

TELLING = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""Instruction sets that kernels are chosen by; `asimddp` is what ARM calls the dot product."""

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def cores() -> int:
    """Return on how many cores this process may run."""
    affinity = getattr(os, "sched_getaffinity", None)  # not there on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags; empty where the system does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def machine_description() -> dict[str, str]:
    """Return the machine in words: CPU, cores, instruction sets, system, and what disturbs timing where it is readable.

    `load` is the number of processes that wanted to run in the last minute, this one included; `governor` says how
    the frequency is chosen.
    """
    flags = cpu_flags()
    described = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": str(cores()),
        "instructions": " ".join(f for f in TELLING if f in flags) or "unknown",
        "system": platform.platform(),
    }
    if hasattr(os, "getloadavg"):
        described["load"] = f"{os.getloadavg()[0]:.2f}"
    if governor := _read(_GOVERNOR).strip():
        described["governor"] = governor
    return described


def _cpuinfo(name: str) -> str:
    """Return the first value of `name` in /proc/cpuinfo, "" where there is none."""
    lines = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or not readable in this container
        return ""
