from pathlib import Path

from qcore.pipelines.watch import Row, Watch
from qcore.tracking.journal import End, Journal, Progress, Start


def start(task: str | None, time_ms: int = 1000) -> Start:
    return Start(task=task, run_key="k", experiment="e", run_name="r", time_ms=time_ms)


def test_rows_follow_the_journals(tmp_path: Path) -> None:
    seen: list[Row] = []
    watch = Watch(tmp_path / "journal", ("prune", "gate"), seen.append)
    assert [(r.name, r.state) for r in seen] == [("prune", "waiting"), ("gate", "waiting")]
    assert watch.poll() == []

    journal = Journal(tmp_path / "journal" / "1-prune.jsonl")
    Journal(tmp_path / "journal" / "0-run.jsonl").append(start(None))
    journal.append(start("prune"))
    assert watch.poll() == []
    assert watch.unfinished() == [journal.path]
    journal.append(Progress(what="pruning", done=1, total=4))
    watch.poll()
    assert watch.rows["prune"] == Row(name="prune", state="running", started_ms=1000, what="pruning", done=1, total=4)
    journal.append(End(status="FAILED", time_ms=3500, error=("ModelError", "no weights")))
    assert watch.poll() == [journal.path]
    assert watch.unfinished() == []
    row = watch.rows["prune"]
    assert (row.state, row.seconds, row.error) == ("failed", 2.5, ("ModelError", "no weights"))
    assert watch.rows["gate"].state == "waiting"


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "1-gate.jsonl"
    Journal(path).append(start("gate"))
    whole = path.read_bytes()
    watch = Watch(tmp_path, ("gate",), lambda row: None)
    path.write_bytes(whole[:10])
    watch.poll()
    assert watch.rows["gate"].state == "waiting"
    path.write_bytes(whole)
    watch.poll()
    assert watch.rows["gate"].state == "running"


def test_a_task_tried_again_starts_again(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "1-gate.jsonl"), Journal(tmp_path / "2-gate.jsonl")
    watch = Watch(tmp_path, ("gate",), lambda row: None)
    first.append(start("gate"))
    first.append(End(status="FAILED", time_ms=2000, error=("DataError", "x")))
    second.append(start("gate", 3000))
    watch.poll()
    assert watch.rows["gate"] == Row(name="gate", state="running", started_ms=3000)
