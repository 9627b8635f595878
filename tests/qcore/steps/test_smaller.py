"""The verbs that make a float model smaller: prune, cluster and decompose, as files and as commands."""

import json

import numpy as np
import onnx
import pytest
from models import model_of, save, write_data
from onnx import helper, numpy_helper

from qcore import steps
from qcore.cli.main import run
from qcore.config import check_config
from qcore.errors import ConfigError
from qcore.recipe import Recipe


def wide_net(seed=0):
    """Convolutions wide enough for ranks of 16, of few components: (N,3,8,8) -> (N,4)."""
    rng = np.random.default_rng(seed)

    def low(outputs, inputs, size, rank=8):
        a, b = rng.standard_normal((outputs, rank)), rng.standard_normal((rank, inputs * size * size))
        w = (a @ b).reshape(outputs, inputs, size, size) / np.sqrt(rank * inputs * size * size)
        return w.astype(np.float32)

    weights = {"w1": low(32, 3, 3), "w2": low(48, 32, 3), "w3": low(48, 48, 1), "b2": np.zeros(48, np.float32),
               "wf": rng.standard_normal((4, 48)).astype(np.float32), "bf": np.zeros(4, np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="body", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], name="pointwise"),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf", "bf"], ["y"], name="fc", transB=1),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": ["N", 4]})


@pytest.fixture
def files(tmp_path):
    proto = wide_net()
    (tmp_path / "in").mkdir()
    return save(proto, tmp_path / "in" / "m.onnx"), write_data(tmp_path / "in", proto)


def said(capsys, *arguments, code=0):
    assert run([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_decompose_holds_its_budget_and_names_every_rank(files, tmp_path, capsys):
    model, card = files
    asked = ("--model", model, "--data", card, "--macs", 0.6, "--out")
    made = said(capsys, "decompose", *asked, tmp_path / "d.onnx")
    again = said(capsys, "decompose", *asked, tmp_path / "e.onnx")
    assert made["model"]["sha256"] == again["model"]["sha256"]
    assert [s["method"] for s in made["steps"]] == ["fold-batchnorm", "decompose"]
    layers = {la["node"]: la for la in made["steps"][1]["layers"]}
    assert set(layers) == {"stem", "body", "pointwise", "fc"}
    body = layers["body"]["scores"][layers["body"]["chosen"]]
    assert body["macs"] < layers["body"]["macs"]
    assert all(r % 16 == 0 for r in body["ranks"])
    left = sum(la["macs"] if la["chosen"] is None else la["scores"][la["chosen"]]["macs"] for la in layers.values())
    assert left <= 0.6 * sum(la["macs"] for la in layers.values())
    onnx.checker.check_model(onnx.load(tmp_path / "d.onnx"), full_check=True)
    small = said(capsys, "decompose", "--model", model, "--data", card, "--size", 0.6, "--out", tmp_path / "s.onnx")
    assert small["size_bytes"] < 0.7 * small["input_size_bytes"]


def test_decompose_in_words(files, tmp_path, capsys):
    model, card = files
    assert run(["decompose", "--model", str(model), "--data", str(card), "--out", str(tmp_path / "d.onnx")]) == 0
    out = capsys.readouterr().out
    assert "Layers written as chains" in out
    assert "body" in out
    refused = [
        "decompose",
        "--model",
        model,
        "--data",
        card,
        "--macs",
        0.5,
        "--size",
        0.5,
        "--out",
        tmp_path / "n.onnx",
    ]
    assert "macs and size are both given" in said(capsys, *refused, code=1)["error"]
    tight = ["decompose", "--model", model, "--data", card, "--macs", 0.01, "--out", tmp_path / "n.onnx"]
    assert "decompose cannot keep 1% of the multiplications" in said(capsys, *tight, code=1)["error"]
    assert not (tmp_path / "n.onnx").exists()


def test_the_recipe_needs_data_and_no_table(files, tmp_path, capsys):
    model, card = files
    steps.compress(model=model, data=card, out=tmp_path / "d.onnx", recipe="decomposed50")
    with pytest.raises(ConfigError, match="recipe decomposed50 runs samples and got no data"):
        steps.compress(model=model, out=tmp_path / "n.onnx", recipe="decomposed50")
    steps.calibrate(model=model, data=card, out=tmp_path / "t.json")
    with pytest.raises(ConfigError, match="runs samples, which a table does not hold"):
        steps.quantize(model=model, table=tmp_path / "t.json", out=tmp_path / "n.onnx", recipe="decomposed50")
    with pytest.raises(ConfigError, match=r"changes weights \(cluster\) before it quantizes"):
        steps.quantize(model=model, table=tmp_path / "t.json", out=tmp_path / "n.onnx", recipe="cluster16")


def test_cluster_says_what_it_takes_in_a_package(files, tmp_path, capsys):
    model, _ = files
    made = said(capsys, "cluster", "--model", model, "--clusters", 8, "--out", tmp_path / "c.onnx")
    assert made["packed_bytes"] < 0.3 * made["input_packed_bytes"]
    weights = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "c.onnx").graph.initializer]
    assert all(len(np.unique(w)) <= 8 for w in weights if w.ndim > 1)
    assert run(["cluster", "--model", str(model), "--out", str(tmp_path / "c.onnx")]) == 0
    assert "in a package: " in capsys.readouterr().out
    assert "packed_bytes" in steps.compress(model=model, out=tmp_path / "r.onnx", recipe="cluster16").to_json()
    assert "error" in said(capsys, "cluster", "--model", model, "--clusters", 1, "--out", tmp_path / "n.onnx", code=1)


def test_prune_with_a_pattern(files, tmp_path, capsys):
    model, _ = files
    made = said(capsys, "prune", "--model", model, "--pattern", "2:4", "--out", tmp_path / "p.onnx")
    assert {"body", "pointwise", "fc"} <= set(made["steps"][0]["changed"])
    assert made["steps"][0]["skipped"][0]["reason"] == "it has 3 inputs per output and tap, fewer than 4"
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "p.onnx").graph.initializer}
    w = np.moveaxis(found["w2_pruned"], 1, -1).reshape(-1, 4)
    assert np.all(np.sum(w != 0, axis=1) == 2)
    assert (
        "pattern" in said(capsys, "prune", "--model", model, "--pattern", "4", "--out", tmp_path / "n", code=1)["error"]
    )


def test_steps_follow_each_other(files, tmp_path):
    model, card = files
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: all\nsteps:\n"
        "  - {method: decompose, macs: 0.7}\n  - {method: prune, pattern: '2:4'}\n  - {method: cluster}\n"
        "  - {method: quantize}\n"
    )
    made = steps.compress(model=model, data=card, out=tmp_path / "a.onnx", recipe=str(recipe), target="x86-vnni")
    assert [s.method for s in made.steps] == ["decompose", "prune", "cluster", "quantize"]
    assert all(s.changed for s in made.steps)
    with pytest.raises(ConfigError, match="step decompose follows quantize"):
        steps.compress(model=model, data=card, out=tmp_path / "n.onnx", recipe=_wrong(tmp_path))


def _wrong(folder):
    value = {"name": "wrong", "steps": [{"method": "quantize"}, {"method": "decompose"}]}
    assert check_config(value, Recipe, "recipe")
    (folder / "wrong.yaml").write_text("name: wrong\nsteps:\n  - {method: quantize}\n  - {method: decompose}\n")
    return str(folder / "wrong.yaml")
