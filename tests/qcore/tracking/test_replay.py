"""The same journals against a local database and a real MLflow server: what a reviewer finds there."""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from qcore.errors import DataError
from qcore.methods.finetune import Epoch
from qcore.tracking.journal import TrackingError
from qcore.tracking.replay import replay
from qcore.tracking.rest import RestSink
from qcore.tracking.sink import Batch, MetricPoint
from qcore.tracking.tracker import Tracker
from qcore.tracking.uploader import Uploader


def env_of(folder: Path, key: str, **more: str) -> dict[str, str]:
    return {"QCORE_JOURNAL_DIR": str(folder), "QCORE_RUN_KEY": key, "QCORE_EXPERIMENT": f"exp {key}", **more}


def record(folder: Path, env: Mapping[str, str]) -> None:
    """Do what a run does: the runner's journal around a task that works and one that fails."""
    report = folder.with_suffix(".report")
    report.write_text('{"top1": 0.5}')
    with Tracker(None, run_name="digits 1.0.0", env=env) as run:
        run.params({"family": "digits"})
        with Tracker("quantize", env=env) as t:
            t.params({"recipe": "int8"})
            t.params({"recipe": "int8", "target": "x86-vnni"}, on="parent")
            for step in range(3):
                t.metrics({"sqnr_db": 30.0 + step}, step=step)
            t.metrics({"top1": 0.5}, on="parent")
            t.note("**PASS** it is good")
            t.artifact(report, "report", name="report.json", on="parent")
        report.unlink()
        with pytest.raises(DataError), Tracker("evaluate", env=env):
            raise DataError("x.npz: 3 NaN; clean it")


def runs_of(uri: str, key: str) -> tuple[Run, dict[str, Run]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"exp {key}")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    runs = client.search_runs([experiment.experiment_id])
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    (parent,) = [r for r in runs if r not in children]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    by_task = {r.data.tags["qcore.task"]: r for r in children}
    assert len(by_task) == len(children)
    return parent, by_task


def expect_everything_once(uri: str, key: str) -> None:
    client = MlflowClient(uri)
    parent, children = runs_of(uri, key)
    assert set(children) == {"quantize", "evaluate"}
    assert parent.info.run_name == "digits 1.0.0"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"family": "digits", "recipe": "int8", "target": "x86-vnni"}
    assert parent.data.tags["mlflow.note.content"] == "**PASS** it is good"
    assert [(m.value, m.step) for m in client.get_metric_history(parent.info.run_id, "top1")] == [(0.5, 0)]
    assert [a.path for a in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.json"]
    quantize, evaluate = children["quantize"], children["evaluate"]
    assert (quantize.info.status, evaluate.info.status) == ("FINISHED", "FAILED")
    assert evaluate.data.tags["qcore.error"] == "DataError: x.npz: 3 NaN; clean it"
    history = client.get_metric_history(quantize.info.run_id, "sqnr_db")
    assert sorted((m.step, m.value) for m in history) == [(0, 30.0), (1, 31.0), (2, 32.0)]
    assert quantize.info.start_time <= quantize.info.end_time


def test_replaying_twice_leaves_everything_once(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    record(folder, env_of(folder, "twice"))
    first = replay(folder, uri)
    expect_everything_once(uri, "twice")
    assert replay(folder, uri) == first
    expect_everything_once(uri, "twice")
    assert first.journals == 3
    path = MlflowClient(uri).download_artifacts(first.parents[0], "report/report.json", str(tmp_path))
    assert Path(path).read_text() == '{"top1": 0.5}'


def test_tasks_send_to_a_server_by_themselves(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    record(folder, env_of(folder, "live", MLFLOW_TRACKING_URI=server))
    expect_everything_once(server, "live")


def test_curves_of_training_are_on_the_server_while_it_goes_on(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcore.tracking.tracker.LIVE_EVERY_S", 0.0)
    client, epochs = MlflowClient(server), [(None, 0.9, 0.5), (0.8, 0.6, 0.7), (0.7, 0.5, 0.75)]

    def history(name: str) -> list[tuple[int, float]]:
        run = runs_of(server, "curves")[1]["finetune"]
        assert run.info.status == "RUNNING"
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    with Tracker("finetune", env=env_of(tmp_path / "journal", "curves", MLFLOW_TRACKING_URI=server)) as t:
        for k, (loss, validation, accuracy) in enumerate(epochs):
            t.epoch(Epoch(number=k, loss=loss, validation=validation, accuracy=accuracy, seconds=1.0))
            assert sorted(history("validation_loss")) == [(i, e[1]) for i, e in enumerate(epochs[: k + 1])]
        assert sorted(history("loss")) == [(1, 0.8), (2, 0.7)]
        assert sorted(history("validation_accuracy")) == [(0, 0.5), (1, 0.7), (2, 0.75)]
    assert runs_of(server, "curves")[1]["finetune"].info.status == "FINISHED"


def test_the_uploader_sends_journals_while_they_grow(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    uploader = Uploader(folder, uri, {})
    env = env_of(folder, "upload")
    with Tracker(None, run_name="digits 1.0.0", env=env) as run:
        assert run.journal.path is not None
        uploader.offer(run.journal.path)
        with Tracker("quantize", env=env) as t:
            assert t.journal.path is not None
        uploader.offer(t.journal.path)
    uploader.offer(run.journal.path)
    result = uploader.close()
    parent, children = runs_of(uri, "upload")
    assert result.problem is None
    assert result.run_id == parent.info.run_id
    assert parent.info.status == "FINISHED"
    assert set(children) == {"quantize"}


def test_a_long_series_is_sent_in_pieces(server: str) -> None:
    sink = RestSink(server, {}, budget_s=60)
    run = sink.create_run(sink.experiment("long"), name="r", tags={}, start_ms=1)
    batch = Batch(
        params={f"p{i}": "v" for i in range(250)},
        metrics=[MetricPoint(key="m", value=float(i), step=i, time_ms=i) for i in range(1200)],
    )
    for chunk in batch.chunks():
        sink.log(run, chunk)
    client = MlflowClient(server)
    assert len(client.get_metric_history(run, "m")) == 1200
    assert len(client.get_run(run).data.params) == 250


@contextmanager
def dying(server: str, calls: int) -> Iterator[str]:
    """Pass `calls` requests on to the server, then answer 500 to everything."""
    host = server.removeprefix("http://")
    left = [calls]

    class Proxy(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            left[0] -= 1
            if left[0] < 0:
                self.send_error(500)
                return
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.request(self.command, self.path, body, {"Content-Type": self.headers["Content-Type"]})
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.pass_on()

        def do_POST(self) -> None:
            self.pass_on()

        def do_PUT(self) -> None:
            self.pass_on()

        def log_message(self, format: str, *args: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()


@pytest.mark.parametrize("calls", [1, 4, 6, 9])
def test_a_server_that_dies_midway_gets_the_rest_later_and_once(server: str, tmp_path: Path, calls: int) -> None:
    folder, key = tmp_path / "journal", f"dying-{calls}"
    with dying(server, calls) as address:
        started = time.monotonic()
        record(folder, env_of(folder, key, MLFLOW_TRACKING_URI=address))
        assert time.monotonic() - started < 10
    replay(folder, server)
    expect_everything_once(server, key)


@pytest.mark.parametrize("injected", [True, False], ids=["adopted", "self-managed"])
def test_what_kubeflows_launcher_logs_and_ours_do_not_meet(server: str, tmp_path: Path, injected: bool) -> None:
    """With `injectUserEnvVars` the task gets the launcher's run, without it only the key of its own parent run."""
    client, key = MlflowClient(server), f"launcher-{injected}"
    experiment = client.create_experiment(f"KFP-Default {injected}")
    root = client.create_run(experiment, run_name="release run").info.run_id
    loop = client.create_run(experiment, tags={"mlflow.parentRunId": root}).info.run_id
    task = client.create_run(experiment, tags={"mlflow.parentRunId": loop}).info.run_id
    adopted = {"MLFLOW_RUN_ID": task} if injected else {}
    env = env_of(tmp_path / "journal", key, MLFLOW_TRACKING_URI=server, **adopted)
    inputs = {"split": "evaluation", "data_sha256": "", "scheme": "dynamic-int8", "n": 697}
    output = dsl.Metrics(name="metrics", uri=str(tmp_path / "m"))

    with Tracker("evaluate", env=env) as t:
        t.params(inputs)
        t.metrics({"top1": 0.5, "n": 697}, kfp=output)
        for step in (1, 2):
            t.metrics({"series": 1.0 / step}, step=step)
        t.dataset("digits/evaluation", "e" * 64, "evaluation")
        t.metrics({"top1": 0.5}, on="parent")
        t.tags({"qcore.gate": "pass"}, on="parent")
        t.note("verdict")
    assert client.get_run(task).info.status == "RUNNING"
    launcher_ends(client, task, inputs, output.metadata)
    for _ in range(2):  # also late, on a run that the launcher has ended
        replay(tmp_path / "journal", server)
        theirs = client.get_run(task)
        assert theirs.info.status == "FINISHED"
        assert theirs.data.params == {k: json.dumps(v) for k, v in inputs.items()}
        ours, parent = (theirs, client.get_run(root)) if injected else own_runs(server, key)
        assert points(client, theirs) == {"top1": 1, "n": 1, **({"series": 2} if injected else {})}
        assert points(client, ours) == {"top1": 1, "n": 1, "series": 2}
        assert [i.dataset.name for i in ours.inputs.dataset_inputs] == ["digits/evaluation"]
        assert parent.info.status == "RUNNING"
        assert parent.data.metrics == {"top1": 0.5}
        assert parent.data.tags["qcore.gate"] == "pass"
        assert parent.data.tags["mlflow.note.content"] == "verdict"
    if not injected:
        assert ours.data.params == {k: str(v) for k, v in inputs.items()}
    assert len(client.search_runs([experiment])) == 3


def own_runs(server: str, key: str) -> tuple[Run, Run]:
    parent, children = runs_of(server, key)
    return children["evaluate"], parent


def points(client: MlflowClient, run: Run) -> dict[str, int]:
    return {k: len(client.get_metric_history(run.info.run_id, k)) for k in run.data.metrics}


def launcher_ends(client: MlflowClient, run_id: str, inputs: dict[str, Any], scalars: dict[str, Any]) -> None:
    """Do what KFP's launcher does after a task: one batch, refused whole if a parameter changes, and the status."""
    points = [Metric(k, v, int(time.time() * 1000), 0) for k, v in scalars.items()]
    client.log_batch(run_id, metrics=points, params=[Param(k, json.dumps(v)) for k, v in inputs.items()])
    client.set_terminated(run_id, "FINISHED")


def test_a_key_that_no_filter_can_hold_is_refused(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with Tracker(None, env=env_of(folder, "it's")):
        pass
    with pytest.raises(TrackingError, match="holds a quote"):
        replay(folder, database)


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with Tracker(None, env=env_of(folder, "k")):
        pass
    (tmp_path / "db").write_text("this is not a database, but long enough to be looked at" * 100)
    with pytest.raises(TrackingError) as e:
        replay(folder, f"sqlite:///{tmp_path / 'db'}")
    assert "\n" not in str(e.value)
