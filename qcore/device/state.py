"""What the device must never forget: the high-water mark, quarantined digests, and the last attempt.

One file, replaced atomically and durably. It is separate from the cache of tuf, so a wiped or damaged cache does not
let an old repository pass. The mark of the timestamp belongs to its keys: when root rotates them, versions may start
again (recovery from a fast-forward); epochs and floor never fall.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from qcore.canonical import Json
from qcore.device.refusals import refusal
from qcore.files import write_json

STATE_SCHEMA = "qcore.device-state/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """The content of `state.json`.

    Args:
        root_version: highest root seen.
        timestamp_keys: digest of the timestamp role's key ids that `timestamp_version` belongs to.
        timestamp_version: highest timestamp seen under these keys.
        epochs: highest epoch seen, by pointer path.
        floor: highest security floor that gate and publisher signed.
        quarantine: reason by package digest; never installed again unless asked to.
        last: verb, code (None: success), message and time of the last attempt.
    """

    root_version: int = 0
    timestamp_keys: str = ""
    timestamp_version: int = 0
    epochs: Mapping[str, int] = field(default_factory=dict)
    floor: int = 0
    quarantine: Mapping[str, str] = field(default_factory=dict)
    last: Mapping[str, Json] = field(default_factory=dict)


def load_state(state_dir: Path) -> DeviceState:
    """Return the state, the first one if there is no file yet.

    Raises:
        UpdateError: E_STATE: the file is damaged; nothing is guessed, because guessing lowers the mark.
    """
    path = state_dir / "state.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return DeviceState()
    except ValueError as e:
        raise _damaged(path) from e
    known = {f.name: f for f in fields(DeviceState)}
    if not isinstance(value, dict) or value.pop("schema", None) != STATE_SCHEMA or set(value) != set(known):
        raise _damaged(path)
    if any(not isinstance(value[n], type(getattr(DeviceState(), n))) for n in known):
        raise _damaged(path)
    return DeviceState(**value)


def save_state(state_dir: Path, state: DeviceState) -> None:
    """Make `state` durable."""
    write_json(state_dir / "state.json", {"schema": STATE_SCHEMA, **asdict(state)})


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Hold the device's lock: one agent at a time.

    Raises:
        UpdateError: E_BUSY: another one holds it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise refusal("E_BUSY", f"another qcore-device works in {state_dir}; one at a time, try again later") from e
        yield


def _damaged(path: Path) -> Exception:
    return refusal(
        "E_STATE",
        f"{path} is damaged; the active model keeps serving; restore the file, or remove it once if you trust the "
        "repository now (removing it forgets what was seen)",
    )
