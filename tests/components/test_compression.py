"""The components that compress by one method, and `compress` by any recipe, as functions with real artifacts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kfp import dsl
from learning import write_blobs
from models import save
from quantizing import constants

from qcore.components import cluster, compress, decompose, prune, prune_channels
from qcore.errors import ConfigError, ModelError
from qcore.files import sha256_file
from qcore.tracking.journal import Attachment, End, Line, Metrics, Params, Tags, journals, read_journal

SPARSE = "name: own\nsteps:\n  - {method: prune, pattern: '2:4'}\n"
TRAINED = "name: school\nsteps:\n  - {method: cluster, clusters: 4}\n  - {method: finetune, epochs: 3, batch: 32}\n"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a component left behind: its artifacts by name, the new model, the summary, and the journal."""

    artifacts: dict[str, dsl.Artifact]
    model: onnx.ModelProto
    summary: dict[str, Any]
    lines: list[Line]

    def params(self) -> dict[str, str]:
        return {k: v for x in self.lines if isinstance(x, Params) and x.on == "task" for k, v in x.values.items()}

    def weights(self) -> list[np.ndarray]:
        return [w for w in constants(self.model).values() if w.ndim > 1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide_net: onnx.ModelProto) -> Path:
    """Return a folder with a model and its data card, to which tasks write their journals, too."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QCORE_JOURNAL_DIR", str(tmp_path / "journal"))
    save(wide_net, tmp_path / "m.onnx")
    write_blobs(tmp_path / "data")
    return tmp_path


@pytest.fixture
def task(folder: Path) -> Callable[..., Made]:
    """Return a function that runs a component, which gets data and writes metrics if it has such ports."""

    def run(component: Any, *, given: bool = True, **options: Any) -> Made:
        spec = component.component_spec
        kinds = {name: o.type for name, o in spec.outputs.items()}
        artifacts: dict[str, dsl.Artifact] = {"model": dsl.Model(name="model", uri=str(folder / "m.onnx"))}
        if given and "data" in spec.inputs:
            artifacts["data"] = dsl.Dataset(name="data", uri=str(folder / "data"))
        for name, kind in kinds.items():
            cls = {"Model": dsl.Model, "Metrics": dsl.Metrics}.get(kind.split("@")[0].split(".")[1], dsl.Artifact)
            artifacts[name] = cls(name=name, uri=str(folder / "out" / name))
        component.python_func(**artifacts, **options)
        (model,) = [a for name, a in artifacts.items() if name in kinds and isinstance(a, dsl.Model)]
        (journal,) = journals(folder / "journal")
        return Made(
            artifacts={"new": model, **artifacts},
            model=onnx.load(model.path),
            summary=json.loads(Path(artifacts["summary"].path).read_bytes()),
            lines=read_journal(journal),
        )

    return run


@pytest.mark.parametrize(
    ("component", "options", "params"),
    [
        (prune, {"pattern": "2:4"}, {"pattern": "2:4"}),
        (prune, {"sparsity": 0.4}, {"sparsity": "0.4"}),
        (prune_channels, {"macs": 0.6}, {"macs": "0.6", "split": "calibration"}),
        (prune_channels, {"latency": 0.9, "split": "train"}, {"latency": "0.9", "split": "train"}),
        (cluster, {"clusters": 4}, {"clusters": "4"}),
        (decompose, {"macs": 0.6}, {"macs": "0.6", "split": "calibration"}),
        (decompose, {"size": 0.6, "split": "train"}, {"size": "0.6", "split": "train"}),
        (compress, {}, {"recipe": "int8", "target": "x86-avx2", "split": "calibration"}),
    ],
    ids=lambda v: getattr(v, "name", None) or ",".join(f"{k}={x}" for k, x in v.items()) or "default",
)
def test_what_was_made_is_said_and_tracked(
    task: Callable[..., Made], component: Any, options: dict[str, Any], params: dict[str, str]
) -> None:
    made = task(component, **options)
    path = Path(made.artifacts["new"].path)
    digest, size = sha256_file(path), path.stat().st_size
    onnx.checker.check_model(made.model, full_check=True)
    assert made.artifacts["new"].metadata == {"format": "onnx", "sha256": digest, "size_bytes": size}
    assert made.summary["model"] == {"sha256": digest, "size_bytes": size}
    assert made.summary["steps"][-1]["changed"]
    assert made.params() == params
    tags = {k: v for x in made.lines if isinstance(x, Tags) for k, v in x.values.items()}
    assert tags["model.sha256"] == digest
    (metrics,) = [x.values for x in made.lines if isinstance(x, Metrics)]
    packed = made.summary["packed_bytes"]
    assert metrics == {"size_bytes": size, **({} if packed is None else {"packed_bytes": packed})}
    assert [x.name for x in made.lines if isinstance(x, Attachment)] == ["summary.json"]
    last = made.lines[-1]
    assert isinstance(last, End)
    assert last.status == "FINISHED"


def test_pruning_by_a_pattern_keeps_so_many_neighbours(task: Callable[..., Made]) -> None:
    made = task(prune, pattern="2:4", sparsity=0.9)
    (w,) = [w for w in made.weights() if w.shape == (48, 32, 3, 3)]
    assert np.all(np.count_nonzero(np.moveaxis(w, 1, -1).reshape(-1, 4), axis=1) == 2)
    assert made.summary["packed_bytes"] < 0.7 * made.summary["input_packed_bytes"]


def test_pruning_channels_leaves_fewer_within_the_budget(task: Callable[..., Made]) -> None:
    made = task(prune_channels, size=0.6)
    assert made.summary["size_bytes"] <= 0.6 * made.summary["input_size_bytes"]
    (wide,) = [w for w in made.weights() if w.ndim == 4 and w.shape[1] > 1]
    assert wide.shape[0] < 48 or wide.shape[1] < 32


def test_clustering_leaves_few_values(task: Callable[..., Made]) -> None:
    made = task(cluster, clusters=4)
    assert max(np.unique(w).size for w in made.weights()) == 4
    assert made.summary["packed_bytes"] < 0.3 * made.summary["input_packed_bytes"]


def test_decomposing_leaves_chains_within_the_budget(task: Callable[..., Made]) -> None:
    made = task(decompose, size=0.6)
    assert made.summary["size_bytes"] < 0.8 * made.summary["input_size_bytes"]
    assert sum(n.op_type == "Conv" for n in made.model.graph.node) > 2


def test_budgets_that_exclude_each_other_are_refused(task: Callable[..., Made], folder: Path) -> None:
    with pytest.raises(ConfigError, match="macs and size are both given"):
        task(decompose, macs=0.5, size=0.5)
    with pytest.raises(ModelError, match="latency"):
        task(prune_channels, latency=0.001)
    with pytest.raises(ConfigError, match="pattern"):
        task(prune, pattern="5:4")
    with pytest.raises(ConfigError, match="clusters"):
        task(cluster, clusters=1)
    assert not (folder / "out").exists()


def test_a_recipe_calibrates_on_the_data(task: Callable[..., Made]) -> None:
    made = task(compress, target="npu-int8-symmetric", split="train")
    assert any(w.dtype == np.int8 for w in made.weights())
    assert (made.summary["recipe"], made.summary["target"]) == ("int8", "npu-int8-symmetric")
    assert made.artifacts["metrics"].metadata == {"size_bytes": made.summary["size_bytes"]}


def test_a_recipe_without_calibration_needs_no_data(task: Callable[..., Made]) -> None:
    made = task(compress, given=False, recipe="cluster16")
    metrics = made.artifacts["metrics"].metadata
    assert max(np.unique(w).size for w in made.weights()) == 16
    assert metrics == {"size_bytes": made.summary["size_bytes"], "packed_bytes": made.summary["packed_bytes"]}


def test_a_recipe_as_text_wins_over_a_name(task: Callable[..., Made]) -> None:
    made = task(compress, given=False, recipe="nobody ships this", recipe_yaml=SPARSE)
    assert made.summary["recipe"] == "own"
    assert [s["method"] for s in made.summary["steps"]] == ["prune"]
    params = made.params()
    assert params.pop("recipe").startswith("own ")
    assert params == {"recipe_yaml": SPARSE, "target": "x86-avx2", "split": "calibration"}


def test_a_recipe_that_trains_has_curves(task: Callable[..., Made]) -> None:
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    made = task(compress, recipe_yaml=TRAINED)
    epochs = made.summary["steps"][-1]["epochs"]
    assert [e["number"] for e in epochs] == [0, 1, 2, 3]
    assert max(np.unique(w).size for w in made.weights()) == 4
    numbers = [x for x in made.lines if isinstance(x, Metrics)]
    assert [x.step for x in numbers[:-1]] == [0, 1, 2, 3]  # one line when each epoch ends, before the last one of all
    assert numbers[0].values == {
        "validation_loss": epochs[0]["validation"],
        "validation_accuracy": epochs[0]["accuracy"],
    }
    for line, epoch in zip(numbers[1:-1], epochs[1:], strict=True):
        assert line.values == {
            "loss": epoch["loss"],
            "validation_loss": epoch["validation"],
            "validation_accuracy": epoch["accuracy"],
        }
    assert numbers[-1].in_kfp
    metrics = made.artifacts["metrics"].metadata
    assert metrics == numbers[-1].values
    assert metrics["packed_bytes"] == made.summary["packed_bytes"]
    assert metrics["validation_loss_before"] == epochs[0]["validation"]
    assert metrics["validation_loss_after"] == min(e["validation"] for e in epochs)
    assert metrics["training_samples"] == 160


@pytest.mark.parametrize(
    ("options", "does"),
    [
        ({}, "recipe int8 calibrates"),
        ({"recipe": "channels60"}, "recipe channels60 runs samples"),
        ({"recipe_yaml": TRAINED}, "recipe school trains"),
    ],
    ids=["calibrates", "runs-samples", "trains"],
)
def test_a_recipe_that_needs_data_and_got_none_is_refused(
    task: Callable[..., Made], folder: Path, options: dict[str, str], does: str
) -> None:
    with pytest.raises(ConfigError, match=f"{does} and got no data"):
        task(compress, given=False, **options)
    assert not (folder / "out").exists()
    (journal,) = journals(folder / "journal")
    last = read_journal(journal)[-1]
    assert isinstance(last, End)
    assert last.status == "FAILED"
    assert last.error is not None
    assert does in last.error[1]
