"""The device's configuration: one TOML file, one dataclass, every unknown key an error.

Nothing is read from the environment. `root` has no default: what the device trusts is given to it, never fetched.
"""

import difflib
import sys
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from qcore.errors import ConfigError
from qcore.release.manifest import check_name

BUNDLE_PREFIX = "file:"
SELFTEST = (sys.executable, "-m", "qcore.runtime.selftest")
EXAMPLES = {
    "selftest": '["python3", "check.py"]',
    "cpu_features": '["avx2"]',
    "providers": '["CPUExecutionProvider"]',
}
NUMBERS = {
    "selftest_timeout_s": ((int, float), "seconds"),
    "selftest_memory_mb": ((int,), "MiB"),
    "memory_mb": ((int,), "MiB"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceConfig:
    """What this device is, what it follows, and where it keeps it.

    Args:
        device_id: stable name of this device, `[a-z0-9._-]`.
        hardware: the hardware class that releases must name, e.g. `x86-vnni`.
        family: the model family that this device runs.
        repository: folder or `http(s)://` address that holds `metadata/` and `targets/`, or `file:` and the path of a
            bundle that `qcore repo export` wrote.
        root: file with the trusted root metadata.
        state_dir: folder of slots, metadata cache and high-water mark; on one file system.
        channel: the channel that this device follows.
        selftest: command; the slot's folder is appended; exit 0 good, 1 bad model, anything else: could not test.
        selftest_timeout_s: > 0, seconds of the clock, and of CPU for all threads of the self-test together.
        selftest_memory_mb: MiB of address space that the self-test may take; 0: 2048 and three times the model file.
        cpu_features: flags of the CPU, as in /proc/cpuinfo; empty: asked there.
        memory_mb: MiB of physical memory; 0: asked in /proc/meminfo.
        onnxruntime: version of the runtime that serves; empty: the one that is installed beside qcore, if any.
        providers: execution providers of that runtime; empty: left to the self-test.
        control_flow: take models with If, Loop or Scan, which may not end.
    """

    device_id: str
    hardware: str
    family: str
    repository: str
    root: Path
    state_dir: Path
    channel: str = "stable"
    selftest: tuple[str, ...] = SELFTEST
    selftest_timeout_s: float = 60.0
    selftest_memory_mb: int = 0
    cpu_features: tuple[str, ...] = ()
    memory_mb: int = 0
    onnxruntime: str = ""
    providers: tuple[str, ...] = ()
    control_flow: bool = False

    def __post_init__(self) -> None:
        """Refuse names that are not safe in paths, and limits that cannot be held."""
        for name in ("device_id", "hardware", "family", "channel"):
            check_name(name, getattr(self, name), ConfigError)
        if not 0 < self.selftest_timeout_s <= 3600:
            raise ConfigError(
                f"selftest_timeout_s is {self.selftest_timeout_s}; allowed: above 0, at most 3600 seconds"
            )
        for name in ("selftest_memory_mb", "memory_mb"):
            if not 0 <= (value := getattr(self, name)) <= 1 << 30:
                raise ConfigError(f"{name} is {value}; allowed: MiB, at least 0; 0 leaves it to qcore")
        if not self.selftest:
            raise ConfigError("selftest is empty; name a command, or leave it out for the one that comes with qcore")
        if not self.repository:
            raise ConfigError("repository is empty; give a folder or an http(s) address")


def bundle_address(path: Path) -> str:
    """Return the `repository` that stands for the bundle `path`."""
    return f"{BUNDLE_PREFIX}{path.absolute()}"


def load_config(path: Path) -> DeviceConfig:
    """Return the configuration in the TOML file `path`; relative paths in it are relative to its folder.

    Raises:
        ConfigError: missing or unreadable file, not TOML, a key unknown, missing or of the wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}; pass --config with the device's TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid TOML: {e}; correct it there") from e
    known = {f.name: f for f in fields(DeviceConfig)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"{path}: unknown key {key!r}; {hint}allowed: {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if missing:
        raise ConfigError(f"{path}: missing keys: {', '.join(missing)}; add them")
    return DeviceConfig(**{key: _value(path, key, value) for key, value in values.items()})


def _value(path: Path, key: str, value: object) -> Any:
    if key in EXAMPLES:
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{path}: {key} is {value!r}; expected a list of strings, e.g. {EXAMPLES[key]}")
    if key in NUMBERS:
        kinds, unit = NUMBERS[key]
        if type(value) in kinds:
            return value
        raise ConfigError(f"{path}: {key} is {value!r}; expected a number of {unit}")
    if key == "control_flow":
        if type(value) is bool:
            return value
        raise ConfigError(f"{path}: {key} is {value!r}; expected true or false")
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {key} is {value!r}; expected a string in quotes")
    return _text(path.parent.absolute(), key, value)


def _text(folder: Path, key: str, value: str) -> str | Path:
    """Return a text as its key means it; paths are relative to the file's `folder`."""
    if key in ("root", "state_dir"):
        return folder / value
    if key == "repository" and value.startswith(BUNDLE_PREFIX):
        return bundle_address(folder / value.removeprefix(BUNDLE_PREFIX))
    if key == "repository" and value and "://" not in value:
        return str(folder / value)
    return value
