"""The release pipeline as on a cluster, where every task sends for itself, with a tracking server that is ill."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import mlflow_server
from sick_servers import sick_server

from qcore import demo
from qcore.demo.make_data import write_digits
from qcore.files import write_json
from qcore.pipelines.local import TASKS, ReleaseArguments, pipeline_request
from qcore.release.evidence import claimed_decision
from qcore.release.keys import create_keys
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore
from qcore.report import GateDecision
from qcore.tracking.patience import read_loss
from qcore.tracking.replay import replay

pytestmark = pytest.mark.slow
PROMISED_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run decided and published, and where its journals are."""

    decision: GateDecision
    published: str
    journal: Path


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> ReleaseArguments:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "policy.yaml").write_text("name: digits\ntop1: {max_drop: 0.05}\n")
    return ReleaseArguments(
        model=Path(demo.__file__).parent / "digits_cnn.onnx",
        data=write_digits(folder / "data"),
        family="digits",
        version="1.0.0",
        repository=folder,
        keys=folder,
        policy=folder / "policy.yaml",
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running.uri


def run(arguments: ReleaseArguments, folder: Path, uri: str) -> Ran:
    """Run the pipeline with kfp.local into a fresh repository; the tasks get the address of the tracking server."""
    keys = create_keys(folder / "keys", ["stable"])
    init_repository(DirectoryStore(folder=folder / "repository"), keys, ["stable"], now=datetime.now(UTC))
    placed = replace(arguments, repository=folder / "repository", keys=folder / "keys")
    write_json(folder / "request.json", pipeline_request(placed))
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    env |= {"QCORE_RUN_KEY": folder.name, "QCORE_JOURNAL_DIR": str(folder / "journal"), "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "qcore.pipelines.child", str(folder)]
    subprocess.run(command, env={**env, "PYTHONSAFEPATH": "1"}, cwd=folder, check=True, capture_output=True)
    outputs = json.loads((folder / "result.json").read_bytes())
    return Ran(
        decision=claimed_decision(Path(outputs["gate"]["evidence"]).read_bytes()),
        published=json.loads(Path(outputs["publish"]["release"]).read_bytes())["version"],
        journal=folder / "journal",
    )


@pytest.mark.parametrize("illness", ["dead", "silent", "slow", "dies"])
def test_the_decision_stands_and_everything_arrives_later(
    arguments: ReleaseArguments, server: str, tmp_path: Path, illness: str
) -> None:
    folder = tmp_path / f"run-{illness}"
    folder.mkdir()
    with sick_server(illness, server, healthy_calls=30) as address:
        ran = run(arguments, folder, address)
    assert ran.decision.outcome == "pass"
    assert ran.published == "1.0.0"
    assert 0 < read_loss(ran.journal).lost_s < PROMISED_S

    parent = replay(ran.journal, server).parents[0]
    client = MlflowClient(server)
    tracked = client.get_run(parent)
    assert tracked.data.tags["qcore.gate"] == "pass"
    assert tracked.data.tags["model.sha256"] == ran.decision.model_sha256
    children = client.search_runs([tracked.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(r.info.run_name for r in children) == sorted(TASKS)
    assert {r.info.status for r in children} == {"FINISHED"}
    (version,) = client.search_model_versions(f"run_id = '{parent}'")
    assert str(client.get_registered_model("digits").aliases["champion"]) == str(version.version)
