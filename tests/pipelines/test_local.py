"""The real pipeline on kfp.local: what passes is published, what does not is not, and nothing leaks either way."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from s3_server import BUCKET, Server

from qcore import demo
from qcore.demo.make_data import write_digits
from qcore.errors import ConfigError, DataError, ModelError, QcoreError, ReleaseError
from qcore.files import sha256_file
from qcore.pipelines.local import TASKS, ReleaseArguments, ReleaseRun, run_release
from qcore.pipelines.watch import Row
from qcore.release.keys import create_keys
from qcore.release.location import open_store
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore
from qcore.tracking.journal import End, Start, read_journal
from qcore.tracking.replay import replay

MODEL = Path(demo.__file__).parent / "digits_cnn.onnx"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run, the rows it reported, and the whole wall time in seconds."""

    run: ReleaseRun
    seen: list[Row]
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Both:
    """A run that passes and one that does not, done at the same time in one process."""

    passed: Finished
    failed: Finished
    database: str


POLICY = """\
name: 'it''s python3'
top1: {max_drop: 0.05, max_drop_champion: 0.05}
parity: {agreement: 0.5, sqnr_db: 0}
max_age_days: 1
"""


def release(arguments: ReleaseArguments, workspace: Path, uri: str | None) -> Finished:
    seen: list[Row] = []
    started = time.monotonic()
    run = run_release(arguments, workspace=workspace, tracking_uri=uri, progress=seen.append)
    return Finished(run=run, seen=seen, wall_s=time.monotonic() - started)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> ReleaseArguments:
    """Everything a release needs, in folders whose names kfp.local would break: a blank and the word python3."""
    folder = tmp_path_factory.mktemp("my python3 project")
    keys = create_keys(folder / "keys", ["stable"])
    init_repository(DirectoryStore(folder=folder / "repository"), keys, ["stable"], now=datetime.now(UTC))
    (folder / "policy.yaml").write_text(POLICY)
    return ReleaseArguments(
        model=MODEL,
        data=write_digits(folder / "data"),
        family="digits",
        version="1.0.0",
        repository=folder / "repository",
        keys=folder / "keys",
        policy=folder / "policy.yaml",
        champion=MODEL,
    )


@pytest.fixture(scope="module")
def hanging() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(16)
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def both(arguments: ReleaseArguments, hanging: str, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("python3 runs")
    strict = folder / "strict.yaml"
    strict.write_text("top1: {min: 0.9999}\n")
    database = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        passing = pool.submit(release, arguments, folder / "a", database)
        failing = pool.submit(release, replace(arguments, policy=strict, version="0.0.1"), folder / "b", hanging)
        return Both(passed=passing.result(), failed=failing.result(), database=database)


def test_a_pass_is_published(both: Both, arguments: ReleaseArguments) -> None:
    run = both.passed.run
    assert run.outcome == run.decision.outcome == "pass"
    assert run.release is not None
    assert run.release["sha256"] == sha256_file(run.package)
    assert run.release["version"] == "1.0.0"
    assert (arguments.repository / "metadata" / "timestamp.json").exists()
    assert [(r.name, r.state) for r in run.tasks] == [(name, "done") for name in TASKS]
    assert run.output("gate", "decision_markdown").read_text().startswith("**PASS")
    judged = {c.name for c in run.decision.checks}
    assert judged >= {"top1_drop", "top1_champion_drop", "parity_agreement", "parity_sqnr_db", "age_days"}
    assert run.decision.champion_sha256 == run.decision.baseline_sha256 == sha256_file(MODEL)


@pytest.mark.slow
def test_the_same_pipeline_publishes_to_s3(arguments: ReleaseArguments, s3_environment: Server, tmp_path: Path) -> None:
    location = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    keys = create_keys(tmp_path / "keys", ["stable"])
    init_repository(open_store(location), keys, ["stable"], now=datetime.now(UTC))
    run = release(replace(arguments, repository=location, keys=tmp_path / "keys"), tmp_path / "runs", None).run
    assert run.release is not None
    assert run.package is not None
    found = open_store(location).get(f"targets/models/digits/{run.release['sha256']}.1.0.0.qpkg")
    assert found is not None
    assert found.data == run.package.read_bytes()
    with pytest.raises(ReleaseError, match="has no channel 'beta'"):
        run_release(replace(arguments, repository=location, channel="beta"), workspace=tmp_path / "runs")


def test_anything_else_is_a_result_and_not_published(both: Both) -> None:
    run = both.failed.run
    assert run.outcome == "fail"
    assert run.release is None
    assert run.decision.package is not None
    assert run.decision.package.sha256 == sha256_file(run.package)  # judged, and kept for whoever looks into it
    states = {r.name: r.state for r in run.tasks}
    assert (states["gate"], states["package"], states["publish"]) == ("done", "done", "skipped")


def test_progress_is_seen_while_it_happens(both: Both) -> None:
    seen = both.passed.seen
    assert [r.name for r in seen[: len(TASKS)]] == list(TASKS)
    began = [r.name for r in seen if r.state == "running" and r.total == 0]
    order = list(dict.fromkeys(began))
    assert sorted(order) == sorted(TASKS)  # kfp.local runs tasks that do not wait for each other in any order
    before = {"quantize": "evaluate package", "evaluate": "parity gate", "package": "gate", "gate": "review cosign"}
    before["cosign"] = "publish"
    assert all(order.index(a) < order.index(b) for a, after in before.items() for b in after.split())
    assert any(r.name == "calibrate" and r.state == "running" and r.done > 0 for r in seen)


def test_the_tracked_run_tells_the_story(both: Both) -> None:
    client = MlflowClient(both.database)
    run_id = both.passed.run.run_id
    assert run_id is not None
    assert both.passed.run.tracking_problem is None
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "digits 1.0.0"
    assert parent.data.tags["qcore.gate"] == "pass"
    assert parent.data.tags["qcore.release"] == "digits 1.0.0"
    assert parent.data.tags["mlflow.note.content"].startswith("**PASS")
    assert parent.data.metrics["package_bytes"] == both.passed.run.package.stat().st_size
    assert parent.data.params["recipe"] == "int8"
    assert {a.path for a in client.list_artifacts(run_id, "report")} == {
        f"report/{name}"
        for name in (
            "report.json",
            "report.html",
            "gate.md",
            "evidence.json",
            "review.html",
            "review.md",
            "review.json",
        )
    }
    released = {a.path for a in client.list_artifacts(run_id, "release")}
    assert released == {"release/digits-1.0.0.qpkg", "release/release.json"}
    assert parent.data.params["limit.top1_drop"] == "-0.05"
    assert {"split_seed", "weight_bits", "activation_bits", "weights", "activations"} <= parent.data.params.keys()
    used = {i.dataset.name: i.tags[0].value for i in parent.inputs.dataset_inputs}
    assert used == {"digits/calibration": "calibration", "digits/evaluation": "evaluation"}
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {c.info.run_name for c in children} == set(TASKS)
    assert {c.info.status for c in children} == {"FINISHED"}


def test_the_registry_says_what_was_shipped(both: Both) -> None:
    client = MlflowClient(both.database)
    versions = {v.run_id: v for v in client.search_model_versions("name = 'digits'")}  # the failed one is there, too
    version = versions[both.passed.run.run_id]
    release = both.passed.run.release
    assert release is not None
    assert version.tags["qcore.gate"] == "pass"
    assert version.tags["model.sha256"] == both.passed.run.decision.model_sha256
    assert version.tags["package.sha256"] == release["sha256"]
    assert (version.tags["qcore.ota.channel"], version.tags["qcore.ota.counter"]) == ("stable", str(release["counter"]))
    aliases = client.get_registered_model("digits").aliases
    assert {alias: str(n) for alias, n in aliases.items()} == dict.fromkeys(
        ("candidate", "champion"), str(version.version)
    )


def test_a_server_that_hangs_changes_nothing_and_gets_it_all_later(both: Both) -> None:
    run = both.failed.run
    assert run.tracking_problem is not None
    assert "\n" not in run.tracking_problem
    inside = sum(r.seconds or 0 for r in run.tasks)
    assert run.seconds - inside < 3 * len(TASKS) + 8
    replayed = replay(run.folder / "journal", both.database)
    parent = MlflowClient(both.database).get_run(replayed.parents[0])
    assert parent.data.tags["qcore.gate"] == "fail"
    assert parent.info.status == "FINISHED"


def test_the_pipeline_costs_little_more_than_its_steps(both: Both) -> None:
    """At most 3 s a task above the work; measured here with two runs on the machine at once."""
    inside = sum(r.seconds or 0 for r in both.passed.run.tasks)
    assert both.passed.wall_s - inside < 3 * len(TASKS) + 8  # 8: creating the database


def test_a_failing_task_speaks_for_itself_and_nothing_is_printed(
    arguments: ReleaseArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = write_digits(tmp_path / "data")
    images = dict(np.load(card.with_name("digits.npz")))
    x = images["x"].astype(np.float32)
    x[1050, 0, 0, 0] = np.nan
    np.savez(card.with_name("digits.npz"), **{**images, "x": x})
    before = (sys.stdout, dict(os.environ), threading.active_count())
    seen: list[Row] = []
    with pytest.raises(DataError) as e:
        run_release(replace(arguments, data=card), workspace=tmp_path / "ws", progress=seen.append)
    message = str(e.value)
    assert "\n" not in message
    assert "(task calibrate; log: " in message
    log = Path(message.rsplit("log: ", 1)[1].rstrip(")"))
    assert "Traceback" in log.read_text()
    last = {r.name: r for r in seen}
    assert last["calibrate"].state == "failed"
    assert last["quantize"].state == "waiting"
    assert (sys.stdout, dict(os.environ), threading.active_count()) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"model": Path("absent.onnx")}, ModelError, "absent.onnx"),
        ({"data": Path("absent.yaml")}, DataError, "absent.yaml"),
        ({"keys": Path("absent")}, ConfigError, "gate.pem"),
        ({"repository": Path("absent")}, ConfigError, "repository absent"),
        ({"policy": Path("absent.yaml")}, ConfigError, "policy absent.yaml"),
        ({"recipe": "int9"}, QcoreError, "int9"),
        ({"recipe": "int8-equalized"}, ConfigError, "runs samples, which a table does not hold"),
        ({"recipe": "sparse50-int8"}, ConfigError, "changes weights"),
        ({"recipe": "sparse24-tuned"}, ConfigError, "trains on samples"),
        ({"champion": Path(__file__)}, ModelError, "is not an ONNX file"),
        ({"target": "x87"}, QcoreError, "x87"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(
    arguments: ReleaseArguments, tmp_path: Path, change: dict[str, object], kind: type[QcoreError], says: str
) -> None:
    with pytest.raises(kind, match=says) as e:
        run_release(replace(arguments, **change), workspace=tmp_path / "ws")  # type: ignore[arg-type]
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ws").exists()


def test_a_killed_task_is_named_and_its_journal_closed(arguments: ReleaseArguments, tmp_path: Path) -> None:
    def kill(row: Row) -> None:
        if row.name == "calibrate" and row.state == "running":
            kill_task("calibrate", tmp_path)

    with pytest.raises(QcoreError, match="task calibrate was killed before it ended"):
        run_release(arguments, workspace=tmp_path, progress=kill)
    assert [(task, end) for task, end in ends(tmp_path) if task == "calibrate"] == [("calibrate", "KILLED")]


def test_an_interrupt_ends_everything_at_once(arguments: ReleaseArguments, tmp_path: Path) -> None:
    def interrupt(row: Row) -> None:
        if row.name == "calibrate" and row.state == "running" and not stopped:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    stopped: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        run_release(arguments, workspace=tmp_path, progress=interrupt)
    assert time.monotonic() - stopped[0] < 10
    assert ends(tmp_path)[-1] == ("calibrate", "KILLED")
    assert (None, "KILLED") in ends(tmp_path)
    assert processes(str(tmp_path)) == []


def processes(*words: str) -> list[int]:
    """Return the processes whose command line holds all words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            if all(w in line for w in words):
                found.append(int(path.parent.name))
    return found


def kill_task(name: str, workspace: Path) -> None:
    for pid in processes("executor_main", f"--function_to_execute\0{name}", str(workspace)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ends(workspace: Path) -> list[tuple[str | None, str]]:
    """Return task and status of every journal below the workspace, oldest first."""
    result = []
    for path in sorted(workspace.rglob("*.jsonl")):
        first, *_, last = read_journal(path)
        assert isinstance(first, Start)
        assert isinstance(last, End)
        result.append((first.task, last.status))
    return result
