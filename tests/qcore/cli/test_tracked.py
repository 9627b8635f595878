"""What `--tracking` leaves in MLflow: a search as runs that compare, layers as series."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from models import conv_net, save, write_data

from qcore import steps


def qcore(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qcore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    proto = conv_net()
    return save(proto, folder / "m.onnx"), write_data(folder, proto)


def runs(uri: str) -> tuple[Run, list[Run]]:
    """Return the one parent run and its children."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qcore")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    return parent, [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def test_the_trials_of_a_search_compare_without_set_up(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, card = files
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    where = ["--model", model, "--data", card, "--out", tmp_path / "q.onnx", "--target", "x86-vnni"]
    done = qcore("mixed", *where, "--max-error", "1e-5", "--tracking", uri, "--json")
    assert done.returncode in (0, 3), done.stderr
    attempts = json.loads(done.stdout)["attempts"]
    parent, trials = runs(uri)
    assert len(trials) == len(attempts) > 1
    assert {r.info.status for r in (parent, *trials)} == {"FINISHED"}
    for keys in ("params", "metrics"):
        (same,) = {frozenset(getattr(r.data, keys)) for r in trials}
        assert same
    assert len({r.info.run_name for r in trials}) == len(trials)
    history = MlflowClient(uri).get_metric_history(parent.info.run_id, "trial/size_bytes")
    by_trial = {int((r.info.run_name or "")[:2]): r.data.metrics["size_bytes"] for r in trials}
    assert {m.step: m.value for m in history} == by_trial
    ended = [m.timestamp for m in sorted(history, key=lambda m: m.step)]
    assert ended == sorted(ended)
    assert parent.data.tags["qcore.search"] in ("met", "not met")
    assert "review: " in done.stderr


def test_layers_are_series_with_the_layers_number_as_step(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, card = files
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni", recipe="int2-weights")
    where = ["--model", tmp_path / "q.onnx", "--baseline", model, "--data", card, "--out", tmp_path / "report"]
    done = qcore("layers", *where, "--tracking", uri, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["layers"]
    parent, _ = runs(uri)
    history = MlflowClient(uri).get_metric_history(parent.info.run_id, "layer/accumulated_sqnr_db")
    expected = {k: pytest.approx(e["accumulated"]["sqnr_db"]) for k, e in enumerate(told, 1)}
    assert {m.step: m.value for m in history} == expected


def test_a_dead_server_does_not_fail_a_verb(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, card = files
    where = ["--model", model, "--data", card, "--out", tmp_path / "q.onnx", "--target", "x86-vnni"]
    done = qcore("compress", *where, "--tracking", "http://127.0.0.1:9", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "q.onnx")
    assert "qcore mlflow replay" in done.stderr
    (journal,) = (tmp_path / "q.onnx.journal").iterdir()
    assert list(journal.glob("*.jsonl"))
