"""Ranks that are measured: budgets hold, scores are of the model's output, and what is written computes."""

import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import model_of
from onnx import helper, numpy_helper
from recovering import Net, evidence_of, images, parsed

from qcore.compression import compress
from qcore.config import check_config
from qcore.decomposition import decompose_to_budget
from qcore.errors import ConfigError, ModelError
from qcore.graph.chain import PARTS
from qcore.graph.cost import node_macs
from qcore.graph.io import serialize_model
from qcore.methods.decompose import DecomposeStep, NewLayer, decompose, with_weight
from qcore.numerics.error import normalised_mse
from qcore.numerics.factors import factorize, reconstruct
from qcore.recipe import Recipe, load_recipe
from qcore.recovery import output_distance
from qcore.target import load_target

SMALL = {"multiple": 2, "samples": 16}


def quiet(what, done, total):
    pass


def net():
    """Convolutions whose weights have few components each, as those of trained nets nearly have."""
    built = Net(0, channels=3, size=8)
    for outputs, stride in ((16, 1), (16, 1), (24, 2)):
        rank = 3
        a, b = built.normal(outputs, rank, scale=1), built.normal(rank, built.channels * 9, scale=0.3)
        w = (a @ b).reshape(outputs, built.channels, 3, 3) / np.sqrt(built.channels) + 0.01 * built.normal(
            outputs, built.channels, 3, 3
        )
        inputs = [built.at, built.constant(w), built.constant(0.1 * built.normal(outputs))]
        built.op("Conv", inputs, pads=[1] * 4, strides=[stride, stride])
        built.channels = outputs
        built.relu()
    return built.head()


def outputs(model, x):
    raw = serialize_model(model)
    onnx.checker.check_model(onnx.ModelProto.FromString(raw), full_check=True)
    return ort.InferenceSession(raw, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def made(model, **options):
    return decompose_to_budget(model, DecomposeStep(**{**SMALL, **options}), evidence_of(images(size=8)), quiet)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_the_budget_of_multiplications_holds(kept):
    model = parsed(net())
    before = serialize_model(model)
    result = made(model, macs=kept)
    assert serialize_model(model) == before
    total, left = (sum(node_macs(m).values()) for m in (model, result.rewrite.model))
    assert left <= kept * total
    assert (result.before, result.after) == (total, left)
    chosen = {la.node for la in result.layers if la.choice}
    assert set(result.rewrite.changed) == chosen
    assert {s.node for s in result.rewrite.skipped} == {la.node for la in result.layers} - chosen
    x = images(96, seed=9, size=8)
    assert normalised_mse(outputs(model, x), outputs(result.rewrite.model, x)) < 0.05


def test_the_budget_of_weights_holds():
    model = parsed(net())
    result = made(model, size=0.4)

    def weights(m):
        arrays = [numpy_helper.to_array(i) for i in onnx.ModelProto.FromString(serialize_model(m)).graph.initializer]
        return sum(a.size for a in arrays if a.dtype.kind == "f")

    assert result.before == weights(model)
    assert weights(result.rewrite.model) == result.after <= 0.4 * result.before
    assert len(serialize_model(result.rewrite.model)) < len(serialize_model(model))


def test_scores_are_the_output_error_with_one_layer_alone():
    model, evidence = parsed(net()), evidence_of(images(size=8))
    step = DecomposeStep(**SMALL, kinds=("svd",))
    result = decompose_to_budget(model, step, evidence, quiet)
    layer = result.layers[1]
    assert [s.macs for s in layer.scores] == sorted(s.macs for s in layer.scores)
    assert [s.score for s in layer.scores] == sorted((s.score for s in layer.scores), reverse=True)
    assert all(s.macs < layer.macs and s.parameters < layer.parameters for s in layer.scores)
    assert all(r % 2 == 0 for s in layer.scores for r in s.ranks)
    node = next(n for n in model.graph if n.name == layer.node)
    w = node.inputs[1].const_value.numpy().astype(np.float64)
    first = layer.scores[0]
    blind = reconstruct(factorize("svd", w, first.ranks))
    seen = evidence.some(evidence.fit, step.samples)
    x = np.concatenate([b["x"] for b in seen])
    worse = normalised_mse(outputs(model, x), outputs(with_weight(model, layer.node, blind, None), x))
    assert 0 < first.score < worse  # moments of the inputs and the bias help
    assert json.loads(json.dumps(asdict(layer)))["scores"][0]["kind"] == "svd"


def test_layers_behind_chains_are_fitted_to_what_these_give():
    model = parsed(net())
    evidence = evidence_of(images(size=8))
    result = made(model, macs=0.3)
    x = images(96, seed=9, size=8)
    ours = normalised_mse(outputs(model, x), outputs(result.rewrite.model, x))
    alone = {}
    for la in (la for la in result.layers if la.choice):
        node = next(n for n in model.graph if n.name == la.node)
        w = node.inputs[1].const_value.numpy().astype(np.float64)
        w = w if w.ndim == 4 else w[:, :, None, None]
        alone[la.node] = NewLayer(factors=factorize(la.choice.kind, w, la.choice.ranks))
    blind = normalised_mse(outputs(model, x), outputs(decompose(model, alone).model, x))
    assert ours < 0.5 * blind
    assert output_distance(result.rewrite.model, model, evidence) < 0.05


def test_a_budget_out_of_reach_is_refused_with_what_is_possible():
    model = parsed(net())
    with pytest.raises(
        ConfigError, match=r"cannot keep 1% of the multiplications: the smallest ranks leave \d+%; allow"
    ):
        made(model, macs=0.01)
    with pytest.raises(ConfigError, match=r"leave 100%; allow more, lower multiple \(64\)"):
        made(model, macs=0.5, multiple=64)


def test_layers_that_are_excluded_or_not_worth_it_are_left_alone():
    model = parsed(net())
    first = next(n.name for n in model.graph if n.op_type == "Conv")
    result = made(model, macs=0.7, exclude=(first,))
    reasons = {s.node: s.reason for s in result.rewrite.skipped}
    assert reasons[first] == "excluded by the recipe"
    gemm = next(n.name for n in model.graph if n.op_type == "Gemm")
    assert reasons.get(gemm, "the budget holds without it") in (
        "the budget holds without it",
        "no chain of these kinds and ranks is cheaper",
    )
    assert any(n.name == first for n in result.rewrite.model.graph)
    with pytest.raises(ModelError, match="exclude names node 'nobody'"):
        made(model, exclude=("nobody",))


def test_equal_runs_give_equal_bytes_and_names_say_what_they_are():
    one, two = (made(parsed(net())) for _ in range(2))
    assert serialize_model(one.rewrite.model) == serialize_model(two.rewrite.model)
    assert one.layers == two.layers
    names = [n.name for n in one.rewrite.model.graph]
    for la in (la for la in one.layers if la.choice):
        parts = PARTS[la.choice.kind]
        at = names.index(f"{la.node}.{parts[0]}")
        assert names[at : at + len(parts)] == [f"{la.node}.{p}" for p in parts]


@pytest.mark.parametrize("bias", [False, True])
def test_matrices_with_and_without_a_bias(bias):
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((32, 4)) @ rng.standard_normal((4, 32)), "v": rng.standard_normal((32, 3))}
    weights |= {"b": rng.standard_normal(32)} if bias else {}
    op = ("Gemm", ["x", "w", "b"]) if bias else ("MatMul", ["x", "w"])
    nodes = [
        helper.make_node(*op, ["a"], name="wide"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="narrow"),
    ]
    proto = model_of(nodes, {k: v.astype(np.float32) for k, v in weights.items()},
                     inputs={"x": ["N", 32]}, outputs={"y": ["N", 3]})  # fmt: skip
    model, x = parsed(proto), rng.standard_normal((64, 32)).astype(np.float32) + 1
    result = decompose_to_budget(model, DecomposeStep(multiple=2, macs=0.5), evidence_of(x), quiet)
    assert result.rewrite.changed == ("wide",)
    np.testing.assert_allclose(outputs(result.rewrite.model, x), outputs(model, x), atol=1e-2)


def test_the_recipe_reads_samples_and_its_steps_go_on_from_there():
    model, evidence = parsed(net()), evidence_of(images(size=8))
    value = {"name": "both", "steps": [{"method": "decompose", **SMALL}, {"method": "quantize"}]}
    recipe = check_config(value, Recipe, "recipe")
    assert recipe.needs_samples
    result = compress(model, recipe, load_target("x86-vnni"), evidence)
    step = result.steps[0]
    assert step.method == "decompose"
    assert {la.node for la in step.layers if la.choice} == set(step.changed)
    assert any(n.op_type == "DequantizeLinear" for n in result.model.graph)
    assert output_distance(result.model, model, evidence) < 0.2
    with pytest.raises(ConfigError, match="needs calibration data"):
        compress(model, recipe, load_target("x86-vnni"), None)
    assert load_recipe("decomposed50").steps[-1] == DecomposeStep(macs=0.5)
    with pytest.raises(ConfigError, match="macs and size are both given"):
        check_config({"name": "r", "steps": [{"method": "decompose", "macs": 0.5, "size": 0.5}]}, Recipe, "recipe")


def test_numbers_that_are_none_are_refused():
    model, evidence = parsed(net()), evidence_of(images(size=8))
    strange = replace(evidence, fit=({"x": np.full_like(evidence.fit[0]["x"], np.nan)},))
    with pytest.raises(ModelError, match="NaN or infinit"):
        decompose_to_budget(model, DecomposeStep(**SMALL), strange, quiet)
