"""The journal: what one task wants tracked, one JSON object per line, appended as it happens.

The journal is the truth and a tracking server is a copy of it (`replay.py`), so a server that is slow, dead or absent
changes nothing in a run. Standard library only: every task writes one.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from qcore.canonical import Digest, Json, canonical_json
from qcore.errors import QcoreError
from qcore.files import write_atomic

Scope = Literal["task", "parent"]
"""Where a line belongs: on the run of the task, or on the parent run that a reviewer opens."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

SCHEMA = "qcore.journal/1"


class TrackingError(QcoreError):
    """The tracking server or a journal cannot be used; the work that was tracked is unaffected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The first line: which run this journal is about.

    `task` is None in the journal of the runner itself, whose lines are all about the parent run. `adopted_run` is the
    run that Kubeflow Pipelines made for this task; then `run_key` and `experiment` are not used. `attempt` counts the
    tries of a task from 0, each of which is a run of its own (None: written before attempts were told apart). `trial`
    names one trial of a search; its run is below that of the task. Times are milliseconds since 1970.
    """

    task: str | None
    run_key: str
    experiment: str
    run_name: str
    time_ms: int
    adopted_run: str | None = None
    attempt: int | None = None
    trial: str | None = None
    schema: str = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """Parameters, already as text."""

    values: Mapping[str, str]
    on: Scope = "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Finite numbers at one step and time; `in_kfp` when the same numbers are in an `Output[Metrics]` of the task."""

    values: Mapping[str, float]
    step: int
    time_ms: int
    on: Scope = "task"
    in_kfp: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """Tags, already as text."""

    values: Mapping[str, str]
    on: Scope = "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A file for the run's `folder`; `path` is relative to the journal's folder where it was copied, else absolute."""

    path: str
    name: str
    folder: str
    sha256: str
    on: Scope = "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Samples that a run used: a name, their digest, what for (`calibration`, `evaluation` ...), where they came from.

    MLflow keeps 36 characters of a digest; the whole one goes along in `source`.
    """

    name: str
    digest: str
    context: str
    source: str
    on: Scope = "task"


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of the registered model `family`, made of the files in `folder` of the parent run; one per parent."""

    family: str
    folder: str
    description: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionTags:
    """Tags for the version that came out of the parent run, where there is one."""

    values: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """A name that the version of the parent run has earned at `time_ms`; the latest to earn it carries it.

    `previous` is the name that the one before it carries from then on; None: that one just loses the name.
    """

    alias: str
    time_ms: int
    previous: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the task is; for whoever watches, not for the server."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The last line; `error` is the class name and the one-line message of the error that ended the task."""

    status: Status
    time_ms: int
    error: tuple[str, str] | None = None


Line = Start | Params | Metrics | Tags | Attachment | Dataset | Version | VersionTags | Alias | Progress | End

LINE_BY_OP: dict[str, type[Line]] = {kind.__name__.lower(): kind for kind in get_args(Line)}


def now_ms() -> int:
    """Return the wall clock in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Journal:
    """An open journal; without a `path` its lines stay in memory only."""

    path: Path | None
    lines: list[Line] = field(default_factory=list)

    def append(self, line: Line) -> None:
        """Append `line`, and to the file with one write, so that a reader never sees half of an earlier line."""
        if not isinstance(line, Progress):
            self.lines.append(line)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as f:
            f.write(canonical_json({"op": type(line).__name__.lower(), **asdict(line)}) + b"\n")
            if isinstance(line, End):
                os.fsync(f.fileno())

    def keep(self, path: Path, digest: Digest) -> str:
        """Return where the file `path` lies for a later replay: in a copy beside the journal, or where it is."""
        if self.path is None:
            return str(path.absolute())
        copy = self.path.parent / "files" / digest
        if not copy.exists():
            write_atomic(copy, path.read_bytes())
        return str(copy.relative_to(self.path.parent))


def parse_line(text: str) -> Line:
    """Return the line that `text` holds.

    Raises:
        TrackingError: it is not JSON, or its op or fields are not known.
    """
    try:
        value = json.loads(text)
        kind = LINE_BY_OP[value.pop("op")]
        return kind(**_tuples(value))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise TrackingError(
            f"journal line {text[:60]!r} is not one that this version writes ({type(e).__name__}: {e}); skip that file"
        ) from e


def read_journal(path: Path) -> list[Line]:
    """Return the lines of the journal `path` without its progress; an unfinished last line is left out.

    Raises:
        TrackingError: the file does not begin with a start line of a known schema, or a line is damaged.
    """
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = [parse_line(t) for t in whole.splitlines()]
    if not lines or not isinstance(lines[0], Start) or lines[0].schema != SCHEMA:
        raise TrackingError(f"{path}: not a journal of schema {SCHEMA}; pass the folder that a run wrote")
    return [x for x in lines if not isinstance(x, Progress)]


def journals(folder: Path) -> Sequence[Path]:
    """Return the journals in `folder`, oldest first (their names begin with the time).

    Raises:
        TrackingError: there is none.
    """
    found = sorted(folder.glob("*.jsonl"))
    if not found:
        raise TrackingError(f"{folder}: holds no *.jsonl journal; pass the `journal` folder of a run")
    return found


def _tuples(value: dict[str, Json]) -> dict[str, Json]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
