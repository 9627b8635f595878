"""Versions, aliases, data sets, trials and attempts: whatever the order and however often journals are replayed."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run

from qcore.tracking.journal import Alias, End, Line, Metrics, Start, TrackingError, journals, read_journal
from qcore.tracking.registry import send_registry_line
from qcore.tracking.replay import replay
from qcore.tracking.sink import ModelVersion, NewVersion, RunFacts
from qcore.tracking.tracker import Tracker
from qcore.tracking.verdict import track_outcome, track_publication

unique = map(str, itertools.count())


@pytest.fixture
def family() -> str:
    return f"family-{next(unique)}"


def env_of(folder: Path, key: str, **more: str) -> dict[str, str]:
    return {"QCORE_JOURNAL_DIR": str(folder), "QCORE_RUN_KEY": key, "QCORE_EXPERIMENT": f"exp {key}", **more}


def record(folder: Path, family: str, *, outcome: str, published: bool) -> None:
    """Do what package, gate and publish do about the registry."""
    env = env_of(folder, folder.name)
    file = folder.with_suffix(".qpkg")
    file.write_bytes(b"package")
    with Tracker("package", env=env) as t:
        t.artifact(file, "release", name="digits.qpkg", on="parent")
        t.version(family, "release", f"{family} 1.0.0 for x86-vnni", {"model.sha256": "a" * 64, "n": 3})
    with Tracker("gate", env=env) as t:
        track_outcome(t, outcome)
    if published:
        with Tracker("publish", env=env) as t:
            track_publication(t, "stable", 7)


def aliases(uri: str, family: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in MlflowClient(uri).get_registered_model(family).aliases.items()}


def test_a_version_is_registered_once_with_what_was_decided(uri: str, tmp_path: Path, family: str) -> None:
    folder = tmp_path / f"a-{family}"
    record(folder, family, outcome="pass", published=True)
    for _ in range(2):
        parent = replay(folder, uri).parents[0]
        (version,) = MlflowClient(uri).search_model_versions(f"name = '{family}'")
        assert version.run_id == parent
        assert version.source.endswith(f"{parent}/artifacts/release")
        assert version.description == f"{family} 1.0.0 for x86-vnni"
        tags = {k: v for k, v in version.tags.items() if not k.startswith("qcore.since")}
        assert tags == {
            "model.sha256": "a" * 64,
            "n": "3",
            "qcore.gate": "pass",
            "qcore.ota.channel": "stable",
            "qcore.ota.counter": "7",
        }
        assert aliases(uri, family) == {"candidate": "1", "champion": "1"}
    local = MlflowClient(uri).download_artifacts(parent, "release/digits.qpkg", str(tmp_path))
    assert Path(local).read_bytes() == b"package"


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_what_does_not_pass_moves_no_alias(uri: str, tmp_path: Path, family: str, outcome: str) -> None:
    good, bad = tmp_path / f"good-{family}", tmp_path / f"bad-{family}"
    record(good, family, outcome="pass", published=True)
    replay(good, uri)
    record(bad, family, outcome=outcome, published=False)
    replay(bad, uri)
    assert aliases(uri, family) == {"candidate": "1", "champion": "1"}
    versions = MlflowClient(uri).search_model_versions(f"name = '{family}'")
    assert {str(v.version): v.tags["qcore.gate"] for v in versions} == {"1": "pass", "2": outcome}


def test_an_old_run_brought_over_late_does_not_become_the_champion_again(
    database: str, tmp_path: Path, family: str
) -> None:
    runs = [tmp_path / f"{k}-{family}" for k in range(3)]
    for run in runs:
        record(run, family, outcome="pass", published=True)
    gated = tmp_path / f"gated-{family}"
    record(gated, family, outcome="pass", published=False)
    number: dict[Path, str] = {}
    for run in (runs[2], gated, runs[0], runs[1], runs[0], runs[2]):
        parent = replay(run, database).parents[0]
        (version,) = MlflowClient(database).search_model_versions(f"run_id = '{parent}'")
        number[run] = str(version.version)
    expected = {"candidate": gated, "champion": runs[2], "previous_champion": runs[1]}
    assert aliases(database, family) == {alias: number[run] for alias, run in expected.items()}


class Registry:
    """The registry calls of a sink, in memory; the version of run "r3" is "3"."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {}
        self.carried: dict[str, str] = {}

    def versions_of(self, run_id: str) -> Sequence[ModelVersion]:
        return [self.version("f", run_id.removeprefix("r"))]

    def version(self, family: str, version: str) -> ModelVersion:
        return ModelVersion(family=family, version=version, tags=dict(self.tags.get(version, {})))

    def tag_version(self, family: str, version: str, tags: dict[str, str]) -> None:
        self.tags.setdefault(version, {}).update(tags)

    def aliases(self, family: str) -> dict[str, str]:
        return dict(self.carried)

    def set_alias(self, family: str, alias: str, version: str) -> None:
        self.carried[alias] = version

    def create_version(self, new: NewVersion) -> str:
        raise AssertionError(new)

    def run_facts(self, run_id: str) -> RunFacts:
        raise AssertionError(run_id)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(5)), st.lists(st.integers(0, 4), max_size=6))
def test_aliases_do_not_depend_on_the_order_of_replays(order: list[int], again: list[int]) -> None:
    registry = Registry()
    for k in [*order, *again]:
        line = Alias(alias="champion", previous="previous_champion", time_ms=1000 + k)
        send_registry_line(line, f"r{k}", registry)  # type: ignore[arg-type]
    assert registry.carried == {"champion": "4", "previous_champion": "3"}


def test_an_alias_that_a_person_moved_yields_to_the_next_release() -> None:
    registry = Registry()
    registry.carried = {"champion": "9"}
    send_registry_line(
        Alias(alias="champion", previous="previous_champion", time_ms=1),
        "r1",
        registry,  # type: ignore[arg-type]
    )
    assert registry.carried == {"champion": "1", "previous_champion": "9"}


def children(uri: str, run_id: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    found: list[Run] = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return found


def test_data_sets_are_on_both_runs_with_their_context(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / f"data-{next(unique)}"
    with Tracker("calibrate", env=env_of(folder, folder.name)) as t:
        t.dataset("digits/calibration", "c" * 64, "calibration", source="s3://bucket/data.yaml")
    with Tracker("evaluate", env=env_of(folder, folder.name)) as t:
        t.dataset("digits/evaluation", "e" * 64, "evaluation")
    for _ in range(2):
        parent = replay(folder, uri).parents[0]
        inputs = MlflowClient(uri).get_run(parent).inputs.dataset_inputs
        said = {(i.dataset.name, i.dataset.digest, i.tags[0].key, i.tags[0].value) for i in inputs}
        context = "mlflow.data.context"
        assert said == {
            ("digits/calibration", "c" * 36, context, "calibration"),
            ("digits/evaluation", "e" * 36, context, "evaluation"),
        }
        assert len(inputs) == 2
        assert '"sha256": "' + "c" * 64 in "".join(i.dataset.source for i in inputs)
        used = {r.info.run_name: [i.dataset.name for i in r.inputs.dataset_inputs] for r in children(uri, parent)}
        assert used == {"calibrate": ["digits/calibration"], "evaluate": ["digits/evaluation"]}


def test_trials_are_runs_below_their_task_with_equal_keys(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / f"sweep-{next(unique)}"
    env = env_of(folder, folder.name)
    with Tracker("mixed", env=env) as t:
        for k in range(3):
            with Tracker("mixed", trial=f"trial {k}", env=env) as trial:
                trial.params({"recipe": f"r{k}"})
                trial.metrics({"error": 0.1 * k})
            t.metrics({"error": 0.1 * k}, step=k)
    for _ in range(2):
        parent = replay(folder, uri).parents[0]
        (task,) = children(uri, parent)
        trials = children(uri, task.info.run_id)
        assert {r.info.run_name: r.data.params for r in trials} == {f"trial {k}": {"recipe": f"r{k}"} for k in range(3)}
        assert {r.info.status for r in trials} == {"FINISHED"}
        assert [r.data.metrics.keys() for r in trials] == [{"error"}] * 3
        history = MlflowClient(uri).get_metric_history(task.info.run_id, "error")
        assert sorted(m.step for m in history) == [0, 1, 2]
        assert all(m.timestamp > 1.7e12 for m in history)


def test_a_trial_of_an_adopted_task_is_ours_to_end(server: str, tmp_path: Path) -> None:
    client = MlflowClient(server)
    root = client.create_run(client.create_experiment(f"kfp {next(unique)}")).info
    task = client.create_run(root.experiment_id, tags={"mlflow.parentRunId": root.run_id}).info.run_id
    env = env_of(tmp_path / "journal", "unused", MLFLOW_TRACKING_URI=server, MLFLOW_RUN_ID=task)
    with Tracker("mixed", env=env), Tracker("mixed", trial="trial 1", env=env) as trial:
        trial.params({"recipe": "int8"})
    replay(tmp_path / "journal", server)
    (run,) = children(server, task)
    assert (run.info.status, run.data.params) == ("FINISHED", {"recipe": "int8"})
    assert client.get_run(task).info.status == "RUNNING"


def test_every_attempt_is_a_run_of_its_own(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / f"attempts-{next(unique)}"
    for attempt, outcome in ((0, RuntimeError("lost")), (1, None)):
        env = env_of(folder, folder.name, KFP_RETRY_INDEX=str(attempt))
        try:
            with Tracker("finetune", env=env) as t:
                t.metrics({"loss": 1.0 - attempt}, step=1)
                if outcome is not None:
                    raise outcome
        except RuntimeError:
            assert attempt == 0
    _, early = sorted(journals(folder), reverse=True)
    shutil.move(early, tmp_path / early.name)  # the first attempt's journal arrives after the second's
    replay(folder, uri)
    shutil.move(tmp_path / early.name, early)
    for _ in range(2):
        parent = replay(folder, uri).parents[0]
        runs = {r.data.tags["qcore.attempt"]: r for r in children(uri, parent)}
        assert {k: r.info.run_name for k, r in runs.items()} == {"0": "finetune", "1": "finetune (attempt 2)"}
        assert {k: r.info.status for k, r in runs.items()} == {"0": "FAILED", "1": "FINISHED"}
        assert {k: r.data.metrics["loss"] for k, r in runs.items()} == {"0": 1.0, "1": 0.0}


def test_a_parameter_that_differs_costs_itself_and_nothing_else(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / f"params-{next(unique)}"
    env = env_of(folder, folder.name)
    with Tracker("a", env=env) as t:
        t.params({"target": "npu.yaml"}, on="parent")
    with Tracker("b", env=env) as t:
        t.params({"target": "/abs/npu.yaml", "bits": 8}, on="parent")
        t.metrics({"top1": 0.5}, on="parent")
    run = MlflowClient(uri).get_run(replay(folder, uri).parents[0])
    assert run.data.params == {"target": "npu.yaml", "bits": "8"}
    assert run.data.metrics == {"top1": 0.5}
    assert "target" in caplog.text


def test_a_journal_of_the_first_version_still_replays(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / f"old-{next(unique)}"
    folder.mkdir()
    start = (
        '{"adopted_run":null,"experiment":"old","op":"start","run_key":"KEY","run_name":"r","schema":"qcore.journal/1"'
    )
    lines = [start.replace("KEY", folder.name) + ',"task":"gate","time_ms":1700000000000}']
    lines += ['{"in_kfp":false,"on":"parent","op":"metrics","step":0,"time_ms":1700000000001,"values":{"top1":0.5}}']
    lines += ['{"error":null,"op":"end","status":"FINISHED","time_ms":1700000000002}']
    (folder / "1-gate.jsonl").write_text("\n".join(lines) + "\n")
    assert [type(x) for x in read_journal(folder / "1-gate.jsonl")] == [Start, Metrics, End]
    for _ in range(2):
        parent = replay(folder, uri).parents[0]
        (task,) = children(uri, parent)
        assert (task.info.run_name, task.info.status) == ("gate", "FINISHED")
        assert MlflowClient(uri).get_run(parent).data.metrics == {"top1": 0.5}


@pytest.mark.parametrize(("depth", "reached"), [(1, 1), (6, 6), (8, 6)])
def test_the_climb_to_the_pipelines_run_ends_after_six_hops(
    server: str, tmp_path: Path, depth: int, reached: int
) -> None:
    client = MlflowClient(server)
    experiment = client.create_experiment(f"climb {next(unique)}")
    chain = [client.create_run(experiment).info.run_id]
    for _ in range(depth):
        chain.append(client.create_run(experiment, tags={"mlflow.parentRunId": chain[-1]}).info.run_id)
    env = env_of(tmp_path, "unused", MLFLOW_TRACKING_URI=server, MLFLOW_RUN_ID=chain[-1])
    with Tracker("gate", env=env) as t:
        t.tags({"qcore.gate": "pass"}, on="parent")
    tagged = [run for run in chain if "qcore.gate" in client.get_run(run).data.tags]
    assert tagged == [chain[-1 - reached]]


def test_runs_that_are_their_own_ancestors_do_not_hang(server: str, tmp_path: Path) -> None:
    client = MlflowClient(server)
    experiment = client.create_experiment(f"loop {next(unique)}")
    a, b = (client.create_run(experiment).info.run_id for _ in range(2))
    client.set_tag(a, "mlflow.parentRunId", b)
    client.set_tag(b, "mlflow.parentRunId", a)
    env = env_of(tmp_path, "unused", MLFLOW_TRACKING_URI=server, MLFLOW_RUN_ID=a)
    with Tracker("gate", env=env) as t:
        t.tags({"qcore.gate": "pass"}, on="parent")
    assert client.get_run(a).data.tags["qcore.gate"] == "pass"
    assert "qcore.gate" not in client.get_run(b).data.tags


def test_a_line_of_an_unknown_kind_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"op":"teleport"}\n')
    with pytest.raises(TrackingError, match="not one that this version writes"):
        read_journal(tmp_path / "1.jsonl")


def lines_of(folder: Path) -> list[Line]:
    return [x for path in journals(folder) for x in read_journal(path)]


def test_every_kind_of_line_survives_the_file(tmp_path: Path, family: str) -> None:
    env = env_of(tmp_path / "journal", "k", QCORE_GIT_SHA="1234abc", QCORE_IMAGE="registry/qcore:1")
    with Tracker("publish", env=env) as t:
        t.dataset("d/s", "e" * 64, "evaluation")
        t.version(family, "release", "words", {"a": 1})
        track_publication(t, "stable", 1)
    assert lines_of(tmp_path / "journal") == t.journal.lines
    tags = {k: v for x in t.journal.lines if type(x).__name__ == "Tags" for k, v in x.values.items()}
    assert (tags["git.sha"], tags["qcore.image"], tags["qcore.attempt"]) == ("1234abc", "registry/qcore:1", "0")
