import json
from pathlib import Path

import pytest

from qcore.tracking.journal import (
    Attachment,
    End,
    Journal,
    Line,
    Metrics,
    Params,
    Progress,
    Start,
    Tags,
    TrackingError,
    journals,
    read_journal,
)

START = Start(task="quantize", run_key="k", experiment="e", run_name="r", time_ms=1)
LINES: list[Line] = [
    START,
    Params(values={"recipe": "int8"}, on="parent"),
    Metrics(values={"top1": 0.1 + 0.2}, step=3, time_ms=2, in_kfp=True),
    Tags(values={"a.b": "c"}),
    Attachment(path="files/x", name="report.json", folder="report", sha256="0" * 64, on="parent"),
    End(status="FAILED", time_ms=9, error=("DataError", "x is NaN")),
]


def write(path: Path, lines: list[Line]) -> None:
    journal = Journal(path)
    for line in lines:
        journal.append(line)


def test_what_was_written_is_read_back_without_progress(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write(path, [*LINES[:3], Progress(what="samples", done=1, total=2), *LINES[3:]])
    assert read_journal(path) == LINES


def test_lines_without_a_file_stay_in_memory(tmp_path: Path) -> None:
    journal = Journal(None)
    journal.append(START)
    assert journal.lines == [START]
    assert journal.keep(tmp_path / "x", "0" * 64) == str(tmp_path / "x")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_killed_writer_costs_its_last_line_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    write(path, LINES)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_journal(path) == LINES[:-1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json\n",
        "[]\n",
        '{"op":"start"}\n',
        '{"op":"future"}\n',
        '{"op":"tags","values":{},"on":"task"}\n',
        json.dumps({"op": "start", "task": None, "run_key": "", "experiment": "", "run_name": "", "time_ms": 1})[:-1]
        + ', "schema": "qcore.journal/99"}\n',
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(TrackingError) as e:
        read_journal(path)
    assert "\n" not in str(e.value)


def test_an_attachment_outlives_its_original(tmp_path: Path) -> None:
    original = tmp_path / "report.json"
    original.write_text("{}")
    journal = Journal(tmp_path / "journal" / "a.jsonl")
    journal.append(START)
    kept = journal.keep(original, "ab" * 32)
    original.unlink()
    assert (tmp_path / "journal" / kept).read_text() == "{}"


def test_a_folder_without_journals_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="holds no"):
        journals(tmp_path)
