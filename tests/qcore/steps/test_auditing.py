"""An audit and MLflow: the run is compared, and what it says proves nothing."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from simulators import BASELINE, DATA, FAMILY, World, make_world

from qcore.steps.auditing import Audit, audit
from qcore.tracking import replay
from qcore.tracking.journal import TrackingError
from qcore.tracking.sink import RunFacts


class Runs:
    """A tracking server that knows one run."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        self.tags = dict(tags)

    def experiment(self, name: str) -> str:
        assert name == "qcore"
        return "1"

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        return "run-1" if all(self.tags.get(k) == v for k, v in tags.items()) else None

    def run_facts(self, run_id: str) -> RunFacts:
        return RunFacts(experiment_id="1", tags=self.tags, params={}, artifact_uri="")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.delenv("QCORE_EXPERIMENT", raising=False)
    return make_world(tmp_path)


def told(world: World, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Audit:
    monkeypatch.setattr(replay, "open_sink", lambda *_, **__: runs)
    target = f"models/{FAMILY}/1.0.0.qpkg"
    return audit(repository=world.store.folder, root=world.keys.pinned_root, target=target, tracking="http://mlflow")


def test_a_run_that_was_edited_is_a_finding_and_no_proof(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    release = world.publish("1.0.0")
    runs = Runs(
        {
            "qcore.release": f"{FAMILY} 1.0.0",
            "model.sha256": release.model_sha256,
            "baseline.sha256": BASELINE,
            "data.sha256": DATA,
            "qcore.gate": "pass",
        }
    )
    assert told(world, runs, monkeypatch).findings[-1].state == "fits"
    runs.tags["data.sha256"] = "5" * 64
    found = told(world, runs, monkeypatch)
    assert (found.sound, found.findings[-1].state) == (False, "does not fit")
    assert [f.state for f in found.findings[:-1] if f.what != "provenance"] == ["fits"] * 7  # the evidence stands
    del runs.tags["qcore.release"]
    assert told(world, runs, monkeypatch).findings[-1].state == "not checked"


def test_a_dead_server_does_not_make_a_release_unsound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish("1.0.0")

    class Dead(Runs):
        def experiment(self, name: str) -> str:
            raise TrackingError("no answer")

    found = told(world, Dead({}), monkeypatch)
    assert (found.sound, found.findings[-1].state) == (True, "not checked")
