"""One layer at a time: the layer that was made sensitive comes first, and a killed run goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx_ir as ir
import pytest
from models import conv_net, model_of, save, write_data
from onnx import helper

from qcore import steps
from qcore.errors import ConfigError, ModelError
from qcore.files import sha256_file
from qcore.runtime import ort
from qcore.sensitivity import SmallSet, outputs_of, sensitivity


def net_with_outlier(sensitive):
    """Return four alike convolutions and a Gemm; in the weights of one, those of a dead input channel are huge."""
    rng = np.random.default_rng(7)
    names = ["a", "b", "c", "d"]
    weights = {k: (rng.standard_normal((8, 8, 1, 1)) * 0.5).astype(np.float32) for k in names}
    weights["head"] = rng.standard_normal((8, 4)).astype(np.float32)
    weights[names[names.index(sensitive) - 1]][3] = 0.0
    weights[sensitive][:, 3] *= 100.0  # per tensor, the other channels share its scale and lose their levels
    nodes, value = [], "x"
    for name in names:
        nodes.append(helper.make_node("Conv", [value, name], [f"{name}_out"], name=f"conv_{name}"))
        value = f"{name}_out"
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "head"], ["y"], name="fc"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 8, 4, 4]}, outputs={"y": ["N", 4]})


@pytest.mark.parametrize("which", ["b", "c", "d"])
def test_the_layer_with_one_huge_channel_is_ranked_first(tmp_path, which):
    proto = net_with_outlier(which)
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    report = steps.sensitivity(
        model=model, data=card, out=tmp_path / "s.json", target="npu-int8-symmetric", recipe="int8-min-max"
    )
    first, second = report.layers[:2]
    assert first.node == f"conv_{which}"
    assert first.error > 5 * second.error
    assert {s.node for s in report.layers} == {"conv_a", "conv_b", "conv_c", "conv_d", "pool", "fc"}
    assert report.samples == 32
    stored = json.loads((tmp_path / "s.json").read_bytes())
    assert stored["schema"] == "qcore.sensitivity/1"
    assert stored["layers"][0] == {"node": first.node, "op_type": "Conv", "error": first.error}
    assert stored["model"]["sha256"] == sha256_file(model)


def test_a_second_run_repeats_nothing_and_other_data_repeats_all(tmp_path):
    proto = conv_net()
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    arguments = {"model": model, "data": card, "out": tmp_path / "s.json", "target": "x86-vnni"}
    steps.sensitivity(**arguments)
    journal, result = steps.journal_path(tmp_path / "s.json"), sha256_file(tmp_path / "s.json")
    assert len(journal.read_bytes().splitlines()) == 6
    steps.sensitivity(**arguments)
    assert len(journal.read_bytes().splitlines()) == 6
    assert sha256_file(tmp_path / "s.json") == result
    steps.sensitivity(**arguments, samples=8)
    assert len(journal.read_bytes().splitlines()) == 12


@pytest.mark.slow  # two whole command lines; tests/qcore/test_trials.py kills the journal itself
def test_after_kill_9_finished_layers_are_not_measured_again(tmp_path):
    proto = conv_net()
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    out, journal = tmp_path / "s.json", tmp_path / "s.json.trials.jsonl"
    command = [sys.executable, "-P", "-m", "qcore", "sensitivity", "--json", "--target", "x86-vnni"]
    command += ["--model", str(model), "--data", str(card), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = journal.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(whole)
    trials = [json.loads(line)["trial"]["node"] for line in journal.read_bytes().splitlines()]
    assert sorted(trials) == sorted(set(trials))  # none twice
    assert len(json.loads(done.stdout)["layers"]) == len(trials) == 6


def test_the_function_is_pure_and_computes_the_float_outputs_once():
    runs = []

    def predictor(model):
        runs.append(model.graph.name)
        offset = np.float32(0 if model.graph.name == "float" else len(model.graph.name))
        return lambda fed: {"y": fed["x"] + offset}

    def named(name):
        return ir.Model(ir.Graph([], [], nodes=[], name=name), ir_version=10)

    small = SmallSet(batches=({"x": np.ones((2, 3), np.float32)},) * 2, task="none", predictor=predictor)
    ranked = sensitivity(named("float"), named, {"a": "Conv", "ccc": "Gemm", "bb": "Conv"}, small)
    assert [(s.node, s.op_type, s.error) for s in ranked] == [
        ("ccc", "Gemm", 9.0),
        ("bb", "Conv", 4.0),
        ("a", "Conv", 1.0),
    ]
    assert runs.count("float") == 1
    broken = SmallSet(
        batches=small.batches, task="none", predictor=lambda m: lambda fed: {"y": fed["x"] * float(m.graph.name)}
    )
    with pytest.raises(ModelError, match="NaN or infinity"):
        sensitivity(named("1"), lambda node: named("nan"), {"a": "Conv"}, broken)


def test_a_search_runs_models_by_their_own_numbers():
    proto = conv_net().SerializeToString()
    fed = ({"x": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)},)
    plain, fast = (outputs_of(load(proto).predict, fed)["y"] for load in (ort.load_as_written, ort.load_unfused))
    np.testing.assert_allclose(plain, fast, rtol=1e-4, atol=1e-5)


def test_no_samples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="samples is 0"):
        steps.sensitivity(model=tmp_path / "m", data=tmp_path / "d", out=tmp_path / "s.json", samples=0)
