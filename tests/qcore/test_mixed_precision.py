"""The search keeps its promises on any error surface; then on real nets, by hand, and through a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_net, save, write_data
from onnx import numpy_helper
from recovering import outlier_net

from qcore import steps
from qcore.errors import ConfigError
from qcore.files import sha256_file
from qcore.graph.io import load_model
from qcore.graph.traverse import node_name
from qcore.mixed_precision import LADDER, Trial, search_precision

LEFT = {None: 1.0, "int16": 0.05, "float16": 0.01, "float": 0.0}
BYTES = {None: 1, "int16": 2, "float16": 3, "float": 4}
errors = st.lists(st.floats(0, 10), min_size=1, max_size=40)
allowed = st.lists(st.sampled_from(LADDER), unique=True)


def additive(costs, ran, budget, disturbance=lambda key: 0.0):
    """Return a trial in which each layer adds its own error, less at a higher precision."""

    def run(assignment):
        ran.append(assignment)
        levels = [assignment.get(f"n{k}") for k in range(len(costs))]
        error = sum(c * LEFT[level] for c, level in zip(costs, levels, strict=True))
        error += disturbance(assignment)
        return Trial(error=error, size_bytes=sum(BYTES[level] for level in levels), holds=error <= budget)

    return run


def ranking(costs):
    return [f"n{k}" for k in sorted(range(len(costs)), key=lambda k: -costs[k])]


@settings(deadline=None)
@given(errors, allowed, st.floats(0, 60), st.integers(0, 2**32), st.integers(0, 5))
def test_what_is_said_to_hold_was_measured_to_hold_in_few_trials(costs, precisions, budget, seed, demotions):
    """Also where errors jump about, as accuracies on few samples do."""

    def jumpy(assignment):
        return (hash((seed, *sorted(assignment))) % 1000) / 100

    ran = []
    result = search_precision(ranking(costs), additive(costs, ran, budget, jumpy), precisions, "it", demotions)
    assert result.chosen in result.attempts
    assert len(ran) == len(result.attempts) == len({tuple(a.items()) for a in ran})
    assert all(set(a.precision.values()) <= set(precisions) for a in result.attempts)
    if result.met:
        assert result.chosen.trial.error <= budget
    else:
        assert result.chosen.trial.error == min(a.trial.error for a in result.attempts)
    assert len(ran) <= 1 + len(precisions) * (2 + math.log2(len(costs) + 1)) + demotions
    for a in (result.attempts[k] for k in result.pareto):
        worse = [
            b for b in result.attempts if b.trial.error <= a.trial.error and b.trial.size_bytes < a.trial.size_bytes
        ]
        assert worse == []


@settings(deadline=None)
@given(errors, st.floats(0, 60))
def test_where_errors_add_up_no_single_promotion_is_wasted(costs, budget):
    ran = []
    run = additive(costs, ran, budget)
    result = search_precision(ranking(costs), run, LADDER, "it", len(costs))
    assert result.met  # all layers in float have no error
    chosen = dict(result.chosen.precision)
    for node in chosen:
        without = {k: v for k, v in chosen.items() if k != node}
        assert not run(without).holds
    sensitive = ranking(costs)
    levels = [LADDER.index(chosen[n]) if n in chosen else -1 for n in sensitive]
    kept = [level for level in levels if level >= 0]
    assert kept == sorted(kept, reverse=True)  # the more sensitive layer never has the lower precision of two promoted


def test_nothing_is_promoted_where_int8_will_do():
    result = search_precision(["n0", "n1"], additive([1, 1], [], 2.0), LADDER, "at most 2")
    assert result.met
    assert result.chosen.precision == {}
    assert len(result.attempts) == 1
    assert result.why == "the recipe everywhere: error 2, at most 2"


def test_a_device_without_other_precisions_cannot_be_helped():
    result = search_precision(["n0"], additive([1], [], 0.5), (), "it")
    assert not result.met
    assert "the device allows nothing besides what the recipe gives" in result.why


def test_a_choice_that_another_trial_beats_says_so():
    """On tiny nets the scales of integers take more bytes than the weights, and float is exact."""

    def run(assignment):
        left = 2 - len(assignment)
        return Trial(error=float(left), size_bytes=1000 + 100 * left, holds=left < 2)

    result = search_precision(["n0", "n1"], run, ("float",), "it")
    assert result.met
    assert len(result.chosen.precision) == 1
    assert result.why.startswith(
        "1 in float of 2 layers: error 1, it; 2 in float of 2 layers is better in all that was"
    )
    assert "(error 0, 1,000 bytes against 1,100)" in result.why
    value = result.to_json()
    assert value["attempts"][value["dominated_by"]]["precision"] == {"n0": "float", "n1": "float"}


def test_levels_mix_where_only_the_most_sensitive_need_the_highest():
    costs = [100, 1, 1, 0.01]
    result = search_precision(ranking(costs), additive(costs, [], 1.5), LADDER, "it")
    assert result.chosen.precision == {"n0": "float16", "n1": "int16"} or result.chosen.trial.error <= 1.5
    assert result.chosen.precision["n0"] in ("float16", "float")
    assert "n3" not in result.chosen.precision
    value = result.to_json()
    assert value["attempts"][value["pareto"][0]]["precision"] == {}
    assert value["attempts"][value["chosen"]]["precision"] == dict(result.chosen.precision)
    assert value["dominated_by"] is None
    assert "better in all" not in result.why


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """A net whose int2 weights cost too much, on data without labels; x86 can keep layers in float."""
    folder = tmp_path_factory.mktemp("unlabelled")
    proto = conv_net()
    card, model = write_data(folder / "in", proto), save(proto, folder / "m.onnx")
    card.write_text(card.read_text() + "task: none\n")
    return {"model": model, "data": card, "target": "x86-vnni", "recipe": "int2-weights"}


def test_a_real_net_gets_just_enough_float_layers_and_the_second_run_tries_nothing(unlabelled, tmp_path):
    wanted, out = 0.02, tmp_path / "q.onnx"
    result = steps.mixed_precision(**unlabelled, out=out, max_error=wanted)
    search = result.found.search
    assert search.met
    assert search.chosen.trial.error <= wanted < search.attempts[0].trial.error
    assert 0 < len(search.chosen.precision) < 6
    written = load_model(out)
    quantized = {
        node_name(n) for n in written.graph if n.op_type in ("Conv", "Gemm") and n.inputs[1].producer() is not None
    }
    assert quantized & set(search.chosen.precision) == set()
    assert out.stat().st_size == search.chosen.trial.size_bytes
    report = steps.evaluate(
        candidate=out, baseline=unlabelled["model"], data=unlabelled["data"], out=tmp_path / "r.json"
    )
    assert 10 ** (-report.metrics["output_sqnr_db"] / 10) == pytest.approx(search.chosen.trial.error, rel=1e-12)
    files = [steps.journal_path(out), *steps.pareto_paths(out)]
    before = [p.read_bytes() for p in files]
    assert steps.mixed_precision(**unlabelled, out=out, max_error=wanted) == result
    assert [p.read_bytes() for p in files] == before
    assert not steps.models_path(out).exists()


def test_another_budget_asks_the_same_trials_again(unlabelled, tmp_path):
    out = tmp_path / "q.onnx"
    steps.mixed_precision(**unlabelled, out=out, max_error=0.02)
    before = steps.journal_path(out).read_bytes()
    steps.mixed_precision(**unlabelled, out=out, max_error=0.6)
    after = steps.journal_path(out).read_bytes()
    assert after.startswith(before)
    trials = [json.dumps(json.loads(line)["trial"]) for line in after.splitlines()]
    assert len(trials) == len(set(trials))


def test_float_everywhere_is_an_answer_too(unlabelled, tmp_path):
    result = steps.mixed_precision(**unlabelled, out=tmp_path / "q.onnx", max_error=1e-12)
    assert result.found.search.met
    assert set(result.found.search.chosen.precision.values()) == {"float"}
    assert not any("Quantize" in n.op_type for n in load_model(tmp_path / "q.onnx").graph)


def test_a_trial_that_overflows_in_float16_does_not_hold_and_the_search_goes_on(tmp_path):
    """Sums of a million are beyond float16; the next layer takes them down again."""
    proto = conv_net()
    for name, factor in (("w3", 1e6), ("b3", 1e6), ("wf", 1e-6)):
        weight = next(w for w in proto.graph.initializer if w.name == name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    arguments = {"model": model, "data": card, "target": "tensorrt", "recipe": "int2-weights", "max_drop": 0.02}
    result = steps.mixed_precision(**arguments, out=tmp_path / "q.onnx")
    failed = [a for a in result.found.search.attempts if a.trial.error == math.inf]
    assert failed
    assert not any(a.trial.holds for a in failed)
    assert result.found.search.met
    value = json.loads(result.report.read_bytes())
    assert value["attempts"][result.found.search.attempts.index(failed[0])]["error"] is None
    assert "gives no finite numbers" in result.page.read_text()
    report = steps.evaluate(candidate=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    assert report.metrics["top1_delta"] >= -0.02


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """A net that loses its accuracy in int8, labelled by its float self; the target offers 16-bit activations."""
    folder = tmp_path_factory.mktemp("outliers")
    proto = outlier_net()
    card, model = write_data(folder / "in", proto), save(proto, folder / "m.onnx")
    return {"model": model, "data": card, "target": "npu-int8-symmetric"}


def test_what_cannot_be_met_writes_no_model_but_the_curve(outliers, tmp_path):
    result = steps.mixed_precision(**outliers, out=tmp_path / "no.onnx", max_drop=0.0)
    search = result.found.search
    assert not search.met
    assert result.written is None
    assert not (tmp_path / "no.onnx").exists()
    assert "a drop in top-1 of at most 0 does not hold with all layers promoted" in search.why
    assert search.chosen.trial.error == min(a.trial.error for a in search.attempts)
    value = json.loads(result.report.read_bytes())
    assert (value["met"], value["written"]) == (False, None)
    assert "no model was written" in result.page.read_text()


def test_where_int8_holds_no_layer_is_ranked(outliers, tmp_path):
    arguments = {**outliers, "recipe": "int8-equalized", "max_drop": 0.5}
    result = steps.mixed_precision(**arguments, out=tmp_path / "q.onnx")
    assert result.found.search.why.startswith("the recipe everywhere: error")
    assert result.found.layers == ()
    assert len(steps.journal_path(tmp_path / "q.onnx").read_bytes().splitlines()) == 1
    assert result.written.recipe == "int8-equalized"
    assert "most sensitive" not in result.page.read_text()


def test_recovery_takes_part_in_every_trial_and_spares_bits(tmp_path):
    """16-bit layers are what plain int8 lacks; with equalization int8 itself holds the budget."""
    proto = outlier_net()
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    arguments = {"model": model, "data": card, "target": "npu-int8-symmetric", "max_drop": 0.03}
    plain = steps.mixed_precision(**arguments, out=tmp_path / "plain.onnx")
    mended = steps.mixed_precision(**arguments, out=tmp_path / "mended.onnx", recipe="int8-equalized")
    assert mended.found.search.met
    assert len(mended.found.search.chosen.precision) < len(plain.found.layers)
    assert [s.method for s in mended.written.steps] == [s.method for s in mended.found.tried.recipe.steps]
    report = steps.evaluate(candidate=tmp_path / "mended.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    assert -report.metrics["top1_delta"] == mended.found.search.chosen.trial.error <= 0.03
    assert not plain.found.search.met or len(plain.found.search.chosen.precision) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.01}, "max_drop needs labels, and tiny has task none; allowed: max_error"),
        ({}, "the data have no labels, so a budget of accuracy is missing"),
        ({"max_drop": 0.01, "max_error": 0.1}, "both given; allowed: one budget"),
        ({"max_error": 2.0}, "max_error is 2.0; allowed: above 0 and below 1"),
    ],
)
def test_budgets_that_do_not_fit_are_refused_before_any_trial(unlabelled, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        steps.mixed_precision(**unlabelled, out=tmp_path / "q.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_drop_is_a_share(outliers, tmp_path):
    with pytest.raises(ConfigError, match="max_drop is 1; allowed: a share of 1"):
        steps.mixed_precision(**outliers, out=tmp_path / "q.onnx", max_drop=1)


def mixed(arguments, out, *more):
    command = [sys.executable, "-P", "-m", "qcore", "mixed", "--out", str(out), *more]
    return command + [x for k, v in arguments.items() for x in (f"--{k}", str(v))]


def test_after_kill_9_in_mid_search_no_trial_runs_twice_and_the_bytes_are_the_same(unlabelled, tmp_path):
    whole = steps.mixed_precision(**unlabelled, out=tmp_path / "whole.onnx", max_error=0.02)
    out = tmp_path / "q.onnx"
    journal = steps.journal_path(out)
    command = mixed(unlabelled, out, "--max-error", "0.02", "--json")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    layers = len(whole.found.layers)
    while not journal.exists() or journal.read_bytes().count(b"\n") < layers + 3:  # in mid search, behind the ranking
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = journal.read_bytes().splitlines()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = journal.read_bytes().splitlines()
    finished = before if journal.read_bytes().startswith(b"\n".join(before) + b"\n") else before[:-1]
    assert after[: len(finished)] == finished
    tried = [json.dumps(json.loads(line)["trial"]) for line in after]
    assert len(tried) == len(set(tried)) == layers + len(whole.found.search.attempts)  # none twice, none missing
    assert done.stderr.count("trying int2-weights-mixed 1/1") == len(after) - len(finished)
    assert sha256_file(out) == whole.written.sha256
    value = json.loads(done.stdout)
    assert value["attempts"] == [
        {**a, "latency_ms": b["latency_ms"]}  # measured by each process for itself
        for a, b in zip(whole.found.search.to_json()["attempts"], value["attempts"], strict=True)
    ]


def test_the_command_says_the_same_to_people_and_machines(unlabelled, tmp_path):
    out = tmp_path / "q.onnx"
    shown = subprocess.run(mixed(unlabelled, out, "--max-error", "0.02"), capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "trying precisions: 1 done" in shown.stderr
    assert "trying precisions 1/1" not in shown.stderr
    told = subprocess.run(
        mixed(unlabelled, out, "--max-error", "0.02", "--json"), capture_output=True, text=True, check=False
    )
    value = json.loads(told.stdout)
    stored = json.loads((tmp_path / "q.onnx.pareto.json").read_bytes())
    assert stored == {k: v for k, v in value.items() if k not in ("output", "report", "page")}
    assert value["schema"] == "qcore.precision/1"
    assert value["met"] is True
    assert value["base"] == "w2a8"  # not int8: the recipe gives weights two bits
    chosen = value["attempts"][value["chosen"]]
    assert chosen["holds"] is True
    assert chosen["error"] <= 0.02
    assert value["written"]["size_bytes"] == chosen["size_bytes"] == out.stat().st_size
    assert {s["node"]: s["precision"] for s in value["layers"] if s["precision"] != "w2a8"} == chosen["precision"]
    assert all(node in shown.stdout for node in chosen["precision"])
    assert value["why"] in " ".join(shown.stdout.split())
    assert f"Pareto front of {len(value['attempts'])} trials" in shown.stdout
    page = (tmp_path / "q.onnx.pareto.html").read_text()
    assert page.count('<td class="text">holds</td>') == sum(a["holds"] for a in value["attempts"])


def test_a_budget_that_does_not_hold_is_exit_code_3(outliers, tmp_path):
    command = mixed(outliers, tmp_path / "q.onnx", "--max-drop", "0")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "no model written; allow more in the budget, or train" in done.stdout
    assert not (tmp_path / "q.onnx").exists()
    assert (tmp_path / "q.onnx.pareto.html").exists()


@pytest.mark.parametrize("target", ["fixed-point-pow2"])
def test_a_profile_without_mixed_precision_offers_none(target):
    from qcore.target import load_target

    assert load_target(target).mixed == ()
    assert load_target("npu-int8-symmetric").mixed == ("int16",)
