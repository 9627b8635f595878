import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile twice, as `make compile` does, and return the folder of one of the two equal results."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    env = {k: v for k, v in os.environ.items() if k != "QCORE_IMAGE"}
    for folder, seed in ((first, "1"), (second, "2")):
        command = [sys.executable, "-m", "qcore.pipelines.compile", str(folder)]
        subprocess.run(command, env={**env, "PYTHONHASHSEED": seed}, check=True, capture_output=True)
    assert contents(first) == contents(second)
    return first


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents(compiled: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline, platform = yaml.safe_load_all((compiled / "pipelines/release/pipeline.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    inner = pipeline["components"]["comp-condition-1"]["dag"]["tasks"]
    return {**pipeline["root"]["dag"]["tasks"], **inner}


def test_the_committed_files_are_fresh(compiled: Path) -> None:
    new = contents(compiled)
    old = {name: (ROOT / name).read_text() if (ROOT / name).exists() else "" for name in new}
    stale = [name for name in new if new[name] != old[name]]
    assert not stale, f"{', '.join(stale)} differ from their sources; run `make compile` and commit the result"
    on_disk = {str(p.relative_to(ROOT)) for d in ("components", "pipelines") for p in (ROOT / d).glob("*/*.yaml")}
    assert on_disk == set(new)


def test_every_file_loads_as_a_component(compiled: Path) -> None:
    for name in contents(compiled):
        loaded = components.load_component_from_file(str(compiled / name))
        assert loaded.description


def test_what_is_decided_is_never_taken_from_a_cache(compiled: Path) -> None:
    pipeline, _ = documents(compiled)
    cached = {n: bool(t.get("cachingOptions", {}).get("enableCache")) for n, t in tasks(pipeline).items()}
    assert {n for n, on in cached.items() if not on} >= {"evaluate", "gate", "package", "cosign", "publish"}
    assert {"prune", "calibrate", "quantize"} <= {n for n, on in cached.items() if on}


def test_what_is_cached_is_keyed_by_content(compiled: Path) -> None:
    pipeline, _ = documents(compiled)
    root = pipeline["root"]["dag"]["tasks"]
    for task, name in (("prune", "model_sha256"), ("calibrate", "data_sha256"), ("evaluate", "baseline_sha256")):
        assert "componentInputParameter" in root[task]["inputs"]["parameters"][name]


def test_publishing_hangs_on_the_gates_word(compiled: Path) -> None:
    pipeline, _ = documents(compiled)
    condition = pipeline["root"]["dag"]["tasks"]["condition-1"]["triggerPolicy"]["condition"]
    assert condition == "inputs.parameter_values['pipelinechannel--gate-Output'] == 'pass'"
    assert set(pipeline["components"]["comp-condition-1"]["dag"]["tasks"]) == {"cosign", "publish"}


def test_keys_are_volumes_of_the_tasks_that_sign_and_of_no_other(compiled: Path) -> None:
    _, executors = documents(compiled)
    volumes = {n: [v["secretName"] for v in e.get("secretAsVolume", [])] for n, e in executors.items()}
    assert {n: v for n, v in volumes.items() if v} == {
        "exec-gate": ["qcore-gate-key"],
        "exec-cosign": ["qcore-cosign-key"],
        "exec-publish": ["qcore-publisher-keys"],
    }
    for name, e in executors.items():
        in_env = {k["envVar"].partition("_")[0] for s in e.get("secretAsEnv", []) for k in s["keyToEnv"]}
        assert in_env <= ({"MLFLOW", "AWS"} if name in ("exec-cosign", "exec-publish") else {"MLFLOW"}), name
        assert all(s["optional"] for s in e.get("secretAsEnv", []))


def test_every_task_knows_its_run(compiled: Path) -> None:
    pipeline, executors = documents(compiled)
    containers = {n for n, e in pipeline["deploymentSpec"]["executors"].items() if "container" in e}
    assert {n for n, e in executors.items() if e["fieldPathAsEnv"][0]["name"] == "QCORE_RUN_KEY"} == containers
