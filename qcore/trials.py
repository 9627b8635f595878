"""Results of expensive trials, kept in a file as they come: a search that was killed goes on where it was.

One line of canonical JSON per finished trial, with its own digest, fsynced before the next one starts. A line that a
kill cut short is dropped: that trial did not finish. One that says something else than was written is refused, since
a search would choose by it. Standard library only.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qcore.canonical import Digest, Json, canonical_json, sha256_json
from qcore.errors import ConfigError
from qcore.files import fsync_dir, sha256_file

Run = Callable[[Json], Json]
PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFacts:
    """One trial of a search as a list of runs shows it: all trials of a search have the same keys."""

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def remembered(path: Path, key: Digest, run: Run) -> Run:
    """Return `run`, except that a trial which the file `path` knows under `key` is not run again.

    Args:
        path: the journal; made when the first trial finishes. Trials of other keys in it are left alone.
        key: digest of everything that the results depend on besides the trial itself.
        run: from what is tried to the result, both JSON values.

    Raises:
        ConfigError: the file is not a journal, or a line in its middle is damaged or was changed.
    """
    known = {canonical_json(e["trial"]): e["result"] for e in _entries(path) if e["key"] == key}

    def trial(what: Json) -> Json:
        name = canonical_json(what)
        if name not in known:
            result = run(what)
            entry = {"key": key, "trial": what, "result": result}
            _append(path, canonical_json({**entry, "sha256": sha256_json(entry)}) + b"\n")
            known[name] = result
        return known[name]

    return trial


@cache
def source_sha256(package: Path = PACKAGE) -> Digest:
    """Return the digest of the code, recipes and profiles in `package`: what edited code gives is another trial.

    Read once per process, as the code itself.
    """
    files = sorted(p for kind in ("*.py", "*.yaml") for p in package.rglob(kind))
    return sha256_json([[p.relative_to(package).as_posix(), sha256_file(p)] for p in files])


def _entries(path: Path) -> list[Json]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
    except FileNotFoundError:
        return []
    except OSError as e:
        raise ConfigError(f"journal {path} cannot be read: {e.strerror}; pass another output path") from e
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not entry.keys() >= {"key", "trial", "result"}:
            raise ConfigError(f"journal {path}: line {number} is not a trial; delete the file to start over")
        if (digest := entry.pop("sha256", None)) is None:
            continue  # of a version that wrote none, whose trials are others
        if not _says(entry, digest):
            raise ConfigError(f"journal {path}: line {number} was changed; delete the file to start over")
        entries.append(entry)
    return entries


def _says(entry: Json, digest: object) -> bool:
    try:
        return bool(sha256_json(entry) == digest)
    except ValueError:  # NaN, which no trial wrote
        return False


def _append(path: Path, line: bytes) -> None:
    """Add `line` durably, behind the last whole line."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        whole = f.read().rfind(b"\n") + 1
        f.truncate(whole)
        f.write(line)
        f.flush()
        os.fsync(f.fileno())
    if is_new:
        fsync_dir(path.parent)
