"""The component `finetune`, called as a function with real artifacts."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kfp import dsl
from learning import small_net, write_blobs
from models import save
from quantizing import constants

from qcore import steps
from qcore.components import finetune
from qcore.errors import ConfigError
from qcore.files import sha256_file
from qcore.tracking.journal import Metrics, Params, journals, read_journal


@pytest.fixture
def component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the component and returns its artifacts by name."""
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QCORE_JOURNAL_DIR", str(tmp_path / "journal"))
    save(small_net(channels=8), tmp_path / "m.onnx")
    write_blobs(tmp_path / "data")
    made = {
        "model": dsl.Model(name="model", uri=str(tmp_path / "m.onnx")),
        "data": dsl.Dataset(name="data", uri=str(tmp_path / "data")),
        "trained": dsl.Model(name="trained", uri=str(tmp_path / "out" / "trained")),
        "summary": dsl.Artifact(name="summary", uri=str(tmp_path / "out" / "summary")),
        "metrics": dsl.Metrics(name="metrics", uri=str(tmp_path / "out" / "metrics")),
    }

    def run(**options: Any) -> dict[str, dsl.Artifact]:
        finetune.python_func(**made, batch=32, **options)
        return made

    return run


def test_curves_and_what_was_gained_are_tracked(component: Any, tmp_path: Path) -> None:
    made = component(epochs=3, learning_rate=0.02, target="npu-int8-symmetric")
    path = Path(made["trained"].path)
    assert made["trained"].metadata["sha256"] == sha256_file(path)
    assert any(v.dtype == "int8" for v in constants(onnx.load(path)).values())
    summary = json.loads(Path(made["summary"].path).read_bytes())
    epochs = summary["steps"][-1]["epochs"]
    metrics = made["metrics"].metadata
    assert metrics["validation_loss_before"] == epochs[0]["validation"]
    assert metrics["validation_loss_after"] == min(e["validation"] for e in epochs)
    assert metrics["training_samples"] == 160
    assert metrics.keys() >= {"validation_accuracy_before", "validation_accuracy_after", "training_seconds"}
    (journal,) = journals(tmp_path / "journal")
    lines = read_journal(journal)
    curves = {(x.step, k): v for x in lines if isinstance(x, Metrics) and not x.in_kfp for k, v in x.values.items()}
    assert curves == {
        **{(e["number"], "validation_loss"): e["validation"] for e in epochs},
        **{(e["number"], "validation_accuracy"): e["accuracy"] for e in epochs},
        **{(e["number"], "loss"): e["loss"] for e in epochs[1:]},
    }
    (params,) = [x.values for x in lines if isinstance(x, Params)]
    assert params == {
        "method": "qat",
        "target": "npu-int8-symmetric",
        "epochs": "3",
        "batch": "32",
        "learning_rate": "0.02",
    }


def test_another_model_teaches(component: Any, tmp_path: Path) -> None:
    teacher = dsl.Model(name="teacher", uri=str(save(small_net(seed=8), tmp_path / "t.onnx")))
    made = component(method="distill", teacher=teacher, epochs=2, learning_rate=0.05)
    metrics = made["metrics"].metadata
    assert metrics["validation_loss_after"] < metrics["validation_loss_before"]


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [
        ("prune", {"pattern": "2:4", "score": "movement", "schedule": "constant"}, ["fold-batchnorm", "finetune"]),
        ("prune", {"sparsity": 0.25, "temperature": 2.0, "seed": 3}, ["fold-batchnorm", "finetune"]),
        ("cluster", {"clusters": 4, "patience": 1}, ["fold-batchnorm", "cluster", "finetune"]),
        (
            "channels",
            {"macs": 0.7, "teacher_weight": 0.9, "pad_crop": 1, "flip": True},
            ["fold-batchnorm", "prune-channels", "finetune"],
        ),
        ("channels", {"latency": 0.9}, ["fold-batchnorm", "prune-channels", "finetune"]),
        ("finetune", {"pad_crop": 1, "flip": True}, ["finetune"]),
        ("decompose", {"size": 0.9}, ["fold-batchnorm", "decompose", "finetune"]),
    ],
    ids=["pattern", "sparsity", "clusters", "channels", "latency", "images", "decompose"],
)
def test_every_method_takes_its_options(
    component: Any,
    wide_net: onnx.ModelProto,
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    names: list[str],
) -> None:
    save(wide_net, tmp_path / "m.onnx")
    made = component(method=method, epochs=2, learning_rate=0.02, **options)
    summary = json.loads(Path(made["summary"].path).read_bytes())
    assert [s["method"] for s in summary["steps"]] == names
    assert ("packed_bytes" in made["metrics"].metadata) == (method in ("prune", "cluster"))
    (journal,) = journals(tmp_path / "journal")
    (params,) = [x.values for x in read_journal(journal) if isinstance(x, Params)]
    given = {"method": method, "target": "x86-avx2", "epochs": 2, "batch": 32, "learning_rate": 0.02, **options}
    assert params == {name: str(value) for name, value in given.items()}
    weights = [w for w in constants(onnx.load(made["trained"].path)).values() if w.ndim > 1]
    if "pattern" in options:
        (w,) = [w for w in weights if w.shape == (48, 32, 3, 3)]
        assert np.all(np.count_nonzero(np.moveaxis(w, 1, -1).reshape(-1, 4), axis=1) == 2)
    if "sparsity" in options:
        flat = np.concatenate([w.ravel() for w in weights])
        assert np.mean(flat == 0) == pytest.approx(0.25, abs=1 / flat.size)
    if "clusters" in options:
        assert max(np.unique(w).size for w in weights) == 4
    if method in ("channels", "decompose"):
        assert sum(w.size for w in weights) < sum(w.size for w in constants(wide_net).values() if w.ndim > 1)


def test_whatever_a_training_can_be_told_the_component_takes() -> None:
    assert {f.name for f in fields(steps.Finetuning)} <= set(finetune.component_spec.inputs)


def test_an_option_of_another_method_is_refused(component: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="macs is for method channels and decompose; qat has none"):
        component(macs=0.5)
    assert not (tmp_path / "out").exists()


def test_a_wrong_method_is_refused_and_writes_nothing(component: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="method is 'qta'; allowed: qat, prune, channels, cluster, decompose, distill, finetune"
    ):
        component(method="qta")
    assert not (tmp_path / "out").exists()
