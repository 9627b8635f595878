"""The verb `finetune`: its methods with defaults, what it prints, and what it refuses."""

import json

import numpy as np
import onnx
import pytest
from learning import small_net, write_blobs
from models import save
from quantizing import constants

from qcore import steps
from qcore.cli.main import run
from qcore.errors import ConfigError, ModelError
from qcore.recipe import load_recipe
from qcore.steps.finetuning import recipe_of

FAST = ["--target", "npu-int8-symmetric", "--epochs", "2", "--batch", "32", "--device", "cpu"]
FAST += ["--learning-rate", "0.02"]


@pytest.fixture
def verb(tmp_path, capfd):
    """Return a function that runs the verb and returns exit code, JSON, stderr and the model."""
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    model, data = save(small_net(channels=8), tmp_path / "m.onnx"), write_blobs(tmp_path / "data")

    def finetune(*arguments):
        out = tmp_path / "out.onnx"
        given = ["--model", str(model), "--data", str(data), "--out", str(out), "--json"]
        code = run(["finetune", *given, *FAST, *arguments])
        said = capfd.readouterr()
        return code, json.loads(said.out), said.err, onnx.load(out) if out.exists() else None

    return finetune


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("qat", ["fold-batchnorm", "gemm-head", "equalize", "quantize", "qat"]),
        ("prune", ["fold-batchnorm", "finetune"]),
        ("cluster --clusters 4", ["fold-batchnorm", "cluster", "finetune"]),
        ("finetune", ["finetune"]),
    ],
)
def test_each_method_is_a_recipe(verb, method, names):
    method, *options = method.split()
    code, made, err, model = verb("--method", method, *options, "--teacher-weight", "0.2")
    assert code == 0, err
    assert [s["method"] for s in made["steps"]] == names
    last = made["steps"][-1]
    assert [e["number"] for e in last["epochs"]] == [0, 1, 2]
    assert last["samples"] == 160
    assert last["seconds"] == pytest.approx(sum(e["seconds"] for e in last["epochs"]))
    assert last["error"]["after"] < last["error"]["before"]
    assert last["kept"]
    assert last["best"] > 0
    before, after = last["epochs"][0]["accuracy"], last["epochs"][last["best"]]["accuracy"]
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    assert "epoch 2: loss" in err
    weights = [v for v in constants(model).values() if v.ndim > 1]
    if method == "prune":
        assert sum(np.count_nonzero(w == 0) for w in weights) == sum(w.size for w in weights) // 2
    if method == "cluster":
        assert max(np.unique(w).size for w in weights) == 4
    integers = [v for v in constants(model).values() if v.dtype == np.int8]
    assert bool(integers) == (method == "qat")


def test_distillation_brings_a_student_to_another_model(verb, tmp_path):
    teacher = save(small_net(channels=4, seed=5), tmp_path / "t.onnx")
    code, made, err, _ = verb("--method", "distill", "--teacher", str(teacher), "--epochs", "4")
    assert code == 0, err
    (step,) = made["steps"]
    assert step["error"]["after"] < step["error"]["before"] / 2
    assert "finetune: asking the teacher 160/160" in err


@pytest.mark.parametrize(("method", "step"), [("channels", "prune-channels"), ("decompose", "decompose")])
def test_what_made_a_model_smaller_is_made_good_by_training(method, step):
    recipe = recipe_of(steps.Finetuning(method=method, macs=0.5, epochs=3))
    assert [s.method for s in recipe.steps] == ["fold-batchnorm", step, "finetune"]
    assert recipe.steps[1].macs == 0.5
    assert recipe.steps[2].epochs == 3
    assert recipe_of(steps.Finetuning(method=method, learning_rate=0.5)).steps[2].learning_rate == 0.5


def test_images_are_moved_where_that_is_asked():
    moved = recipe_of(steps.Finetuning(method="prune", pad_crop=4, flip=True)).training_steps[0].augment
    assert (moved.pad_crop, moved.flip) == (4, True)


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ({"method": "prune"}, "sparse50-tuned"),
        ({"method": "prune", "pattern": "2:4"}, "sparse24-tuned"),
        ({"method": "channels", "macs": 0.6, "latency": 0.75}, "channels60-tuned"),
        ({"method": "cluster", "clusters": 16}, "cluster16-tuned"),
        ({"method": "decompose", "macs": 0.5}, "decomposed50-tuned"),
        ({"method": "qat", "weight_bits": 4}, "int4-qat"),
    ],
)
def test_verbs_and_shipped_recipes_do_the_same(method, recipe):
    ours, shipped = recipe_of(steps.Finetuning(**method, pad_crop=4)), load_recipe(recipe)
    assert [s.model_dump() for s in ours.steps] == [s.model_dump() for s in shipped.steps]


def test_few_bits_are_rounded_first():
    pytest.importorskip("pydantic")
    names = [s.method for s in recipe_of(steps.Finetuning(weight_bits=4)).steps]
    assert names[-3:] == ["quantize", "round-weights", "qat"]
    assert recipe_of(steps.Finetuning(weight_bits=4)).quantize_step.weight_bits == 4
    assert recipe_of(steps.Finetuning(epochs=3, patience=1, seed=7)).training_steps[0].epochs == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "qta"}, "method is 'qta'; allowed: qat, prune, channels, cluster, decompose, distill, finetune"),
        ({"method": "prune", "weight_bits": 4}, "weight_bits is for method qat; prune has none; leave it out"),
        ({"method": "qat", "sparsity": 0.5}, "sparsity is for method prune; qat has none; leave it out"),
        ({"method": "qat", "macs": 0.5}, "macs is for method channels and decompose"),
        ({"method": "prune", "sparsity": 0.5, "pattern": "2:4"}, "sparsity and pattern are both given"),
        ({"method": "distill"}, "distill learns from another model and got none; pass --teacher FILE"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"method": "prune", "sparsity": 1.0}, "sparsity"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(options, says):
    with pytest.raises(ConfigError, match=says) as e:
        recipe_of(steps.Finetuning(**options))
    assert "\n" not in str(e.value)


def test_an_output_that_is_the_teacher_is_refused(verb, tmp_path):
    teacher = save(small_net(), tmp_path / "out.onnx")
    code, made, _, _ = verb("--method", "distill", "--teacher", str(teacher))
    assert code == 1
    assert "is also an input; inputs are never changed" in made["error"]


def test_a_missing_teacher_is_one_line(verb):
    code, made, _, model = verb("--method", "distill", "--teacher", "nowhere.onnx")
    assert code == 1
    assert "nowhere.onnx" in made["error"]
    assert model is None


def test_diverged_training_writes_nothing(tmp_path):
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    model, data = save(small_net(), tmp_path / "m.onnx"), write_blobs(tmp_path / "data")
    how = steps.Finetuning(method="finetune", learning_rate=1e30, epochs=3, teacher_weight=0.0)
    with pytest.raises(ModelError, match="nothing was written; lower learning_rate"):
        steps.finetune(model=model, data=data, out=tmp_path / "new" / "out.onnx", how=how, device="cpu")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["blobs.npz", "blobs.yaml", "data", "m.onnx"]


def test_people_see_what_it_cost_and_gained(tmp_path, capfd):
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    model, data = save(small_net(), tmp_path / "m.onnx"), write_blobs(tmp_path / "data")
    given = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out.onnx")]
    assert run(["finetune", *given, *FAST, "--method", "finetune", "--teacher-weight", "0"]) == 0
    shown = capfd.readouterr().out
    assert "160 samples x 2 in" in " ".join(shown.split())
    assert "Epochs of finetune; 0 is before training" in shown
    assert shown.count("<-") == 1
    assert "accuracy" in shown
