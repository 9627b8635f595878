"""Zeros that come while training: when, how many, which, and that only states with all of them are kept."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from learning import small_net, write_blobs
from models import conv_net, model_of, save
from onnx import helper
from quantizing import constants

pytest.importorskip("torch", reason="the extra `train` is not installed")

import torch

from qcore import steps
from qcore.config import check_config
from qcore.errors import ConfigError, ModelError
from qcore.graph.io import parse_model
from qcore.methods.finetune import Sparsify
from qcore.recipe import Recipe
from qcore.training.sparsify import Sparse, SparsifiedWeights, chooses, chosen, reached, sparse_weights
from qcore.training.weights import trainable_names


def trained(folder: Path, proto: onnx.ModelProto, *recipe: dict, target: str = "npu-int8-symmetric"):
    model, card = save(proto, folder / "m.onnx"), write_blobs(folder / "data")
    (folder / "recipe.yaml").write_text(json.dumps({"name": "test", "steps": recipe}))
    out = folder / "out.onnx"
    made = steps.compress(
        model=model, data=card, out=out, recipe=str(folder / "recipe.yaml"), target=target, device="cpu"
    )
    return onnx.load(out), made


def finetune(epochs: int = 4, **options) -> dict:
    sparsify = {"sparsity": 0.5, "every": 2, **options}
    if "pattern" in options:
        del sparsify["sparsity"]
    return {
        "method": "finetune",
        "epochs": epochs,
        "batch": 32,
        "learning_rate": 0.02,
        "teacher_weight": 0,
        "sparsify": sparsify,
    }


def layers(proto: onnx.ModelProto) -> list[np.ndarray]:
    found = constants(proto)
    return [found[n.input[1]] for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]


@pytest.mark.parametrize("score", ["magnitude", "movement"])
@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
def test_half_of_all_weights_are_zero_at_the_end(score: str, schedule: str, tmp_path: Path) -> None:
    after, made = trained(tmp_path, small_net(channels=8), finetune(40, score=score, schedule=schedule))
    zeros, size = sum((w == 0).sum() for w in layers(after)), sum(w.size for w in layers(after))
    assert zeros == round(0.5 * size)
    (step,) = made.steps
    assert step.kept
    assert step.best > 20  # choosing ends behind the twentieth of forty epochs; what was denser is no result
    assert step.epochs[step.best].accuracy > 0.8
    assert all((w != 0).any() for w in layers(after))
    assert made.packed_bytes is not None


def test_of_every_layer_half_is_zero_where_that_is_asked(tmp_path: Path) -> None:
    after, _ = trained(tmp_path, small_net(channels=8), finetune(scope="layer"))
    assert [int((w == 0).sum()) for w in layers(after)] == [36, 12]


def test_a_pattern_lies_along_the_inputs(tmp_path: Path) -> None:
    after, made = trained(tmp_path, small_net(channels=8), finetune(pattern="2:4"))
    conv, gemm = layers(after)
    assert (conv != 0).all()  # one input channel: no four neighbours
    assert ((gemm.reshape(3, 2, 4) != 0).sum(axis=2) == 2).all()
    assert [(s.node, s.reason) for s in made.steps[0].skipped] == [
        ("conv", "it has 1 inputs per output and tap, fewer than 4")
    ]


def test_layers_that_are_excluded_stay_whole(tmp_path: Path) -> None:
    after, _ = trained(tmp_path, small_net(channels=8), finetune(exclude=["fc"]))
    conv, gemm = layers(after)
    assert (conv == 0).sum() == 36
    assert (gemm != 0).all()


def test_zeros_survive_quantization_aware_training(tmp_path: Path) -> None:
    qat = {"method": "qat", "epochs": 2, "batch": 32, "learning_rate": 0.02, "teacher_weight": 0}
    recipe = (finetune(), {"method": "quantize", "per_channel": False}, qat)
    after, made = trained(tmp_path, small_net(channels=8), *recipe)
    assert made.steps[2].kept
    integers = [v for v in constants(after).values() if v.dtype == np.int8 and v.ndim > 1]
    assert sum(v.size for v in integers) == 96
    assert sum((v == 0).sum() for v in integers) >= 48


def test_a_run_that_is_repeated_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    (a, _), (b, _) = (trained(tmp_path / k, small_net(), finetune(score="movement")) for k in "ab")
    assert a.SerializeToString() == b.SerializeToString()


def test_weights_go_by_the_schedule_of_zhu_and_gupta() -> None:
    step = Sparsify(sparsity=0.8, start=0.1, end=0.6, every=10)
    when = [k for k in range(100) if chooses(step, k, 100)]
    assert when == [10, 20, 30, 40, 50, 60]
    shares = [reached(step, k, 100) for k in when]
    assert shares == pytest.approx([1 - (1 - k / 50) ** 3 for k in (0, 10, 20, 30, 40, 50)])
    scores = [(np.random.default_rng(0).random((20, 50)), 1)]
    counts = [int((~chosen(step, scores, s)[0]).sum()) for s in shares]
    assert counts == [round(800 * s) for s in shares]
    assert all(reached(step.model_copy(update={"schedule": "constant"}), k, 100) == 1 for k in when)


def test_a_pattern_comes_one_weight_at_a_time() -> None:
    step, w = Sparsify(pattern="1:4"), np.random.default_rng(0).random((6, 8))
    left = [chosen(step, [(w, 1)], share)[0].reshape(6, 2, 4).sum(axis=2) for share in (0, 0.33, 0.67, 1)]
    assert [np.unique(k).tolist() for k in left] == [[4], [3], [2], [1]]


def test_what_moves_from_zero_stays_and_what_moves_to_zero_goes() -> None:
    w = torch.nn.Parameter(torch.tensor([[1.0, 1.0, 0.1, 0.1]]))
    sparse = Sparse(w.detach().numpy(), 1, torch.nn.Identity())
    weights = SparsifiedWeights(step=Sparsify(score="movement", end=0.5, every=1), rate=1.0, weights=((sparse, w),))
    for k in range(2):
        w.grad = None
        (sparse(w) * torch.tensor([[1.0, -1.0, -1.0, 1.0]])).sum().backward()
        weights(k, 3)
    assert sparse.mask.tolist() == [[0, 1, 1, 0]]  # by size the first two would stay
    assert w.grad.tolist() == [[0, -1, -1, 0]]  # held still while they are left out
    assert sparse(w).detach().numpy() == pytest.approx(np.array([[0, 1, 0.1, 0]]))


def test_a_weight_that_is_needed_after_all_comes_back() -> None:
    w = torch.nn.Parameter(torch.tensor([[3.0, 2.0, 1.0, 0.5]]))
    sparse = Sparse(w.detach().numpy(), 1, torch.nn.Identity())
    weights = SparsifiedWeights(step=Sparsify(schedule="constant", end=0.9, every=1), rate=0.1, weights=((sparse, w),))
    w.grad = torch.zeros_like(w)
    weights(0, 10)
    assert sparse.mask.tolist() == [[1, 1, 0, 0]]
    with torch.no_grad():
        w[0, 0] = 0.1
    weights(1, 10)
    assert sparse.mask.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.5}, "sparsity and pattern are both given"),
        ({"pattern": "5:4"}, "pattern is 5:4; allowed: N:M with 1 <= N < M"),
        ({"start": 0.6, "end": 0.5}, "start is 0.6 and end is 0.5; allowed: start < end"),
        ({"sparsity": 1}, "sparsity"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config({"name": "r", "steps": [{"method": "finetune", "sparsify": options}]}, Recipe, "recipe")


def test_a_model_without_layers_to_prune_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="scale")]
    proto = model_of(
        nodes, {"w": np.ones((1, 1, 6, 6), np.float32)}, inputs={"x": ["N", 1, 6, 6]}, outputs={"y": ["N", 1, 6, 6]}
    )
    with pytest.raises(ModelError, match="no layer can be pruned"):
        sparse_weights(parse_model(proto.SerializeToString(), "m"), Sparsify(), ("w",), {})
    step = Sparsify(pattern="2:8", exclude=("conv1", "depthwise", "pointwise"))
    model = parse_model(conv_net().SerializeToString(), "m")
    with pytest.raises(ModelError, match="of conv1: excluded by the recipe"):
        sparse_weights(model, step, trainable_names(model), {})
