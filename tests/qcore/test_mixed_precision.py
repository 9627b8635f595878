"""The search keeps its promises on any error surface; then once on a real net."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_net, save, write_data

from qcore import steps
from qcore.graph.io import load_model
from qcore.graph.traverse import node_name
from qcore.mixed_precision import LADDER, Trial, search_precision

LEFT = {None: 1.0, "int16": 0.05, "float16": 0.01, "float": 0.0}
BYTES = {None: 1, "int16": 2, "float16": 3, "float": 4}
errors = st.lists(st.floats(0, 10), min_size=1, max_size=40)
allowed = st.lists(st.sampled_from(LADDER), unique=True)


def additive(costs, ran, disturbance=lambda key: 0.0):
    """Return a trial in which each layer adds its own error, less at a higher precision."""

    def run(assignment):
        ran.append(assignment)
        levels = [assignment.get(f"n{k}") for k in range(len(costs))]
        error = sum(c * LEFT[level] for c, level in zip(costs, levels, strict=True))
        return Trial(error=error + disturbance(assignment), size_bytes=sum(BYTES[level] for level in levels))

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
    result = search_precision(ranking(costs), additive(costs, ran, jumpy), precisions, budget, demotions)
    assert result.chosen in result.attempts
    assert len(ran) == len(result.attempts) == len({tuple(a.items()) for a in ran})
    assert all(set(a.precision.values()) <= set(precisions) for a in result.attempts)
    if result.met:
        assert result.chosen.trial.error <= budget
    else:
        assert result.chosen.trial.error == min(a.trial.error for a in result.attempts)
    assert len(ran) <= 1 + len(precisions) * (2 + math.log2(len(costs) + 1)) + demotions
    for a in result.pareto:
        worse = [
            b for b in result.attempts if b.trial.error <= a.trial.error and b.trial.size_bytes < a.trial.size_bytes
        ]
        assert worse == []


@settings(deadline=None)
@given(errors, st.floats(0, 60))
def test_where_errors_add_up_no_single_promotion_is_wasted(costs, budget):
    ran = []
    run = additive(costs, ran)
    result = search_precision(ranking(costs), run, LADDER, budget, len(costs))
    assert result.met  # all layers in float have no error
    chosen = dict(result.chosen.precision)
    for node in chosen:
        without = {k: v for k, v in chosen.items() if k != node}
        assert run(without).error > budget
    sensitive = ranking(costs)
    levels = [LADDER.index(chosen[n]) if n in chosen else -1 for n in sensitive]
    kept = [level for level in levels if level >= 0]
    assert kept == sorted(kept, reverse=True)  # the more sensitive layer never has the lower precision of two promoted


def test_nothing_is_promoted_where_int8_will_do():
    result = search_precision(["n0", "n1"], additive([1, 1], []), LADDER, 2.0)
    assert result.met
    assert result.chosen.precision == {}
    assert len(result.attempts) == 1
    assert result.why == "int8 everywhere: error 2, budget 2"


def test_a_device_without_other_precisions_cannot_be_helped():
    result = search_precision(["n0"], additive([1], []), (), 0.5)
    assert not result.met
    assert "the device allows nothing besides int8" in result.why


def test_levels_mix_where_only_the_most_sensitive_need_the_highest():
    costs = [100, 1, 1, 0.01]
    result = search_precision(ranking(costs), additive(costs, []), LADDER, 1.5)
    assert result.chosen.precision == {"n0": "float16", "n1": "int16"} or result.chosen.trial.error <= 1.5
    assert result.chosen.precision["n0"] in ("float16", "float")
    assert "n3" not in result.chosen.precision
    value = result.to_json()
    assert value["attempts"][value["pareto"][0]]["precision"] == {}


def test_a_real_net_gets_just_enough_float_layers_and_the_second_run_tries_nothing(tmp_path, monkeypatch):
    proto = conv_net()
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    card.write_text(card.read_text() + "task: none\n")
    arguments = {"model": model, "data": card, "target": "x86-vnni", "recipe": "int2-weights"}
    wanted = 0.02
    result = steps.mixed_precision(**arguments, out=tmp_path / "q.onnx", max_error=wanted)
    assert result.met
    assert result.chosen.trial.error <= wanted < result.attempts[0].trial.error
    assert 0 < len(result.chosen.precision) < 6
    written = load_model(tmp_path / "q.onnx")
    quantized = {
        node_name(n) for n in written.graph if n.op_type in ("Conv", "Gemm") and n.inputs[1].producer() is not None
    }
    assert quantized & set(result.chosen.precision) == set()
    assert (tmp_path / "q.onnx").stat().st_size == result.chosen.trial.size_bytes
    journal = steps.journal_path(tmp_path / "q.onnx").read_bytes()
    again = steps.mixed_precision(**arguments, out=tmp_path / "q.onnx", max_error=wanted)
    assert again == result
    assert steps.journal_path(tmp_path / "q.onnx").read_bytes() == journal
    refused = steps.mixed_precision(**arguments, out=tmp_path / "no.onnx", max_error=-1.0)
    assert not refused.met
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize("target", ["fixed-point-pow2"])
def test_a_profile_without_mixed_precision_offers_none(target):
    from qcore.target import load_target

    assert load_target(target).mixed == ()
    assert load_target("npu-int8-symmetric").mixed == ("int16",)
