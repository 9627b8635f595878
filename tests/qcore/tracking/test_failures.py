"""Whatever is wrong with the tracking server costs a whole run seconds, and the journals bring everything later."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import mlflow_server
from sick_servers import ILLNESSES, sick_server

from qcore.tracking.patience import AGAIN_AFTER_S, RUN_LOSS_S, Loss, add_loss, read_loss, within
from qcore.tracking.replay import replay
from qcore.tracking.tracker import Tracker
from qcore.tracking.uploader import Uploader
from qcore.tracking.verdict import track_outcome, track_publication

TASKS = ("prune", "calibrate", "layers", "quantize", "finetune", "evaluate", "parity", "package", "gate", "publish")
PROMISED_S = 10.0


def env_of(folder: Path, key: str, uri: str) -> dict[str, str]:
    place = {"QCORE_JOURNAL_DIR": str(folder), "MLFLOW_TRACKING_URI": uri}
    return {**place, "QCORE_RUN_KEY": key, "QCORE_EXPERIMENT": f"exp {key}"}


def record(env: Mapping[str, str], folder: Path, family: str) -> None:
    """Do what the tasks of a release track: parameters, series, data sets, files, a version and its aliases."""
    report = folder / "report.json"
    report.write_text("{}")
    for number, task in enumerate(TASKS):
        with Tracker(task, env=env) as t:
            t.params({"position": number})
            t.params({f"{task}.position": number}, on="parent")
            t.metrics({f"{task}.seconds": 1.5}, on="parent")
            for step in range(3):
                t.metrics({"loss": 1.0 / (step + 1)}, step=step)
            t.artifact(report, "report", name=f"{task}.json", on="parent")
            t.dataset("digits/evaluation", "e" * 64, "evaluation")
            match task:
                case "package":
                    t.version(family, "report", "words", {"model.sha256": "a" * 64})
                case "gate":
                    t.note("**PASS**")
                    t.tags({"qcore.gate": "pass"}, on="parent")
                    track_outcome(t, "pass")
                case "publish":
                    track_publication(t, "stable", 1)


def everything(uri: str, key: str, family: str) -> dict[str, Any]:
    """Return all that MLflow holds about a run and its registered model, in a form that compares."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"exp {key}")
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id]):
        task = run.data.tags.get("qcore.task", "")
        assert task not in found
        found[task] = {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": {
                k: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, k))
                for k in run.data.metrics
            },
            "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            "files": sorted(a.path for a in client.list_artifacts(run.info.run_id, "report")),
        }
    versions = client.search_model_versions(f"name = '{family}'")
    found["registry"] = [(str(v.version), v.tags, v.source) for v in versions]
    found["aliases"] = client.get_registered_model(family).aliases if versions else {}
    return found


def expect_complete(found: dict[str, Any]) -> None:
    assert found.keys() == {"", *TASKS, "registry", "aliases"}
    parent = found[""]
    assert parent["params"] == {f"{t}.position": str(k) for k, t in enumerate(TASKS)}
    assert parent["metrics"].keys() == {f"{t}.seconds" for t in TASKS}
    assert parent["files"] == sorted(f"report/{t}.json" for t in TASKS)
    assert parent["tags"]["mlflow.note.content"] == "**PASS**"
    assert parent["inputs"] == [("digits/evaluation", "e" * 36)]
    for task in TASKS:
        assert found[task]["status"] == "FINISHED"
        assert [step for step, _, _ in found[task]["metrics"]["loss"]] == [0, 1, 2]
    ((_, tags, _),) = found["registry"]
    assert (tags["qcore.gate"], tags["model.sha256"]) == ("pass", "a" * 64)
    assert found["aliases"].keys() == {"candidate", "champion"}


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "no folder"])
@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_sick_server_costs_a_run_of_ten_tasks_less_than_ten_seconds(
    server: str, tmp_path: Path, illness: str, shared: bool
) -> None:
    key = f"{illness.replace(' ', '-')}-{'shared' if shared else 'alone'}"
    folder = tmp_path / "journal"
    record({"QCORE_JOURNAL_DIR": str(tmp_path / "calm"), "QCORE_RUN_KEY": "x"}, tmp_path, key)  # warm caches
    with sick_server(illness, server, healthy_calls=70) as address:
        env = env_of(folder, key, address)
        if not shared:
            del env["QCORE_JOURNAL_DIR"]
        started = time.monotonic()
        record(env, tmp_path, key)
        took = time.monotonic() - started
    assert took < PROMISED_S
    if shared:
        replay(folder, server)
        once = everything(server, key, key)
        expect_complete(once)
        replay(folder, server)
        assert everything(server, key, key) == once


@pytest.mark.slow
def test_a_server_that_is_killed_midway_has_everything_after_the_replay(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    folder = tmp_path / "journal"
    with mlflow_server(tmp_path / "server") as server:
        env = env_of(folder, "killed", server.uri)
        # Killed while a task sends: after the second task's journal has begun to arrive.
        threading.Thread(target=kill_when_seen, args=(server, folder, 2), daemon=True).start()
        started = time.monotonic()
        record(env, tmp_path, "killed")
        took = time.monotonic() - started
        assert server.process is None
        assert took < PROMISED_S
        server.start()
        before = everything(server.uri, "killed", "killed")
        assert 0 < len(before) < len(TASKS)
        replay(folder, server.uri)
        once = everything(server.uri, "killed", "killed")
        expect_complete(once)
        replay(folder, server.uri)
        assert everything(server.uri, "killed", "killed") == once


def kill_when_seen(server: Any, folder: Path, journals: int) -> None:
    while len(list(folder.glob("*.jsonl"))) < journals:
        time.sleep(0.01)
    time.sleep(0.2)
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("illness", ["slow", "silent", "drips"])
def test_the_runners_uploader_is_patient_for_a_bounded_time(server: str, tmp_path: Path, illness: str) -> None:
    folder, key = tmp_path / "journal", f"uploader-{illness}"
    with sick_server(illness, server) as address:
        uploader = Uploader(folder, address, {})
        record({**env_of(folder, key, ""), "MLFLOW_TRACKING_URI": ""}, tmp_path, key)
        for path in sorted(folder.glob("*.jsonl")):
            uploader.offer(path)
        started = time.monotonic()
        result = uploader.close()
        assert time.monotonic() - started < PROMISED_S
    assert result.problem is not None
    assert "\n" not in result.problem


def test_the_uploader_goes_on_when_a_server_comes_back(server: str, tmp_path: Path) -> None:
    folder, key = tmp_path / "journal", "comes-back"
    with sick_server("dies", server, healthy_calls=0) as address:
        uploader = Uploader(folder, address, {})
        record({**env_of(folder, key, ""), "MLFLOW_TRACKING_URI": ""}, tmp_path, key)
        for path in sorted(folder.glob("*.jsonl")):
            uploader.offer(path)
        time.sleep(1)
        uploader._uri, uploader._sink = server, None  # as if the same address were healthy again
        assert uploader.close().problem is None
    expect_complete(everything(server, key, key))


def test_a_ledger_stops_the_run_from_asking_and_lets_it_try_again_later() -> None:
    now = 1_000_000.0
    healthy = Loss()
    assert healthy.allowance(now) > RUN_LOSS_S
    assert healthy.after(0.9, "", now) == healthy
    failed = healthy.after(4.0, "no answer", now)
    assert failed.allowance(now + 1) == 0
    assert 0 < failed.allowance(now + AGAIN_AFTER_S) < RUN_LOSS_S
    assert failed.after(2.0, "no answer", now + AGAIN_AFTER_S).allowance(now + 1e6) == 0


def test_the_ledger_is_shared_and_survives_damage(tmp_path: Path) -> None:
    threads = [threading.Thread(target=add_loss, args=(tmp_path, 0.25, "x")) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert read_loss(tmp_path).lost_s == 2.0
    (tmp_path / "server.json").write_text('{"lost_s": ')
    assert read_loss(tmp_path) == Loss()


def test_work_that_takes_too_long_is_left_behind() -> None:
    released = threading.Event()
    started = time.monotonic()
    with pytest.raises(Exception, match="took more than"):
        within(0.2, lambda: released.wait(30))
    assert time.monotonic() - started < 5
    released.set()
