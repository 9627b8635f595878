"""Is this release for this device? Held against what the device is, from the signed metadata, before a download.

What the configuration does not state is read from the system: flags and memory from /proc, the version of onnxruntime
from the installed distribution. What the release asks for and nobody can tell is a refusal, not a guess; only runtime
and providers may stay open here, because the self-test asks the runtime itself.
"""

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qcore.device.config import DeviceConfig
from qcore.errors import PackageError
from qcore.release.manifest import Compatibility, parsed_version

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)  # x86, ARM
_MEMORY = re.compile(r"^MemTotal:\s*(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What a device is and offers; None: nobody can tell.

    Args:
        hardware: its class.
        cpu_features: flags of the CPU, as in /proc/cpuinfo.
        memory_bytes: physical memory.
        onnxruntime: version of the runtime.
        providers: execution providers of the runtime.
        control_flow: whether the device runs models whose time nobody can tell from the file.
    """

    hardware: str
    cpu_features: frozenset[str] | None
    memory_bytes: int | None
    onnxruntime: str | None
    providers: tuple[str, ...] | None
    control_flow: bool


def device_facts(config: DeviceConfig) -> DeviceFacts:
    """Return what the configuration states of this device and, where it is silent, what the system tells."""
    flags, memory = _found(_FLAGS, CPUINFO), _found(_MEMORY, MEMINFO)
    return DeviceFacts(
        hardware=config.hardware,
        cpu_features=frozenset(config.cpu_features or (flags or "").split()) or None,
        memory_bytes=config.memory_mb << 20 or (int(memory) << 10 if memory else None),
        onnxruntime=config.onnxruntime or _installed("onnxruntime"),
        providers=config.providers or None,
        control_flow=config.control_flow,
    )


def unmet(needs: Compatibility, facts: DeviceFacts) -> str | None:
    """Return what keeps a device of these `facts` from running a release, with the next step; None: nothing does."""
    checks = (_hardware, _cpu, _runtime, _providers, _memory, _control_flow)
    return next((reason for check in checks if (reason := check(needs, facts)) is not None), None)


def _hardware(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if facts.hardware in needs.hardware:
        return None
    return f"is for hardware {', '.join(needs.hardware)}, this device is {facts.hardware}; publish one for it"


def _cpu(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if needs.cpu_features and facts.cpu_features is None:
        return "needs CPU features, and this system does not tell which it has; state cpu_features in the configuration"
    lacking = [g for g in needs.cpu_features if not set(g) & (facts.cpu_features or frozenset())]
    if not lacking:
        return None
    wanted = ", ".join(" or ".join(g) for g in lacking)
    return f"needs a CPU with {wanted}, which this one lacks; publish one for another target profile"


def _runtime(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if facts.onnxruntime is None:
        return None
    r = needs.onnxruntime
    try:
        fits = parsed_version(r.minimum) <= parsed_version(facts.onnxruntime) < parsed_version(r.below)
    except PackageError as e:
        return f"cannot be held against the runtime here: {e}; correct onnxruntime in the configuration"
    if fits:
        return None
    return (
        f"needs onnxruntime {r.minimum} or newer, below {r.below} (opset {needs.opset}, tested with {r.tested}), here "
        f"is {facts.onnxruntime}; install one of these"
    )


def _providers(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if facts.providers is None or set(facts.providers) & set(needs.providers):
        return None
    return f"runs on {' or '.join(needs.providers)}, here are {', '.join(facts.providers)}; publish one for these"


def _memory(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if needs.memory_bytes is None:
        return None
    if facts.memory_bytes is None:
        return f"needs {needs.memory_bytes} bytes of memory, and this system does not tell its own; state memory_mb"
    if facts.memory_bytes >= needs.memory_bytes:
        return None
    return f"needs {needs.memory_bytes} bytes of memory, this device has {facts.memory_bytes}; publish a smaller model"


def _control_flow(needs: Compatibility, facts: DeviceFacts) -> str | None:
    if facts.control_flow or not needs.control_flow:
        return None
    return "holds control flow, which may not end; publish one without, or set control_flow = true here"


def _found(pattern: re.Pattern[str], path: Path) -> str | None:
    try:
        found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
