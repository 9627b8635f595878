"""Candidates held against one float model that ran once: the same report as one by one."""

from dataclasses import replace

import pytest
from models import conv_net, save, write_data

from qcore import steps
from qcore.data.dataset import open_dataset
from qcore.graph.io import read_model_bytes
from qcore.steps import judgement
from qcore.steps.costs import ONE_RUN
from qcore.steps.guard import silent


@pytest.fixture(scope="module", params=["N", 3])
def files(tmp_path_factory, request):
    """A model with a symbolic batch, or one that insists on 3 samples; 200 leave a smaller last batch."""
    folder = tmp_path_factory.mktemp("judged")
    proto = conv_net(batch=request.param)
    card = write_data(folder, conv_net())
    model = save(proto, folder / "m.onnx")
    steps.compress(model=model, data=card, out=folder / "q.onnx", target="x86-vnni", recipe="int2-weights")
    return [read_model_bytes(folder / name) for name in ("q.onnx", "m.onnx")], open_dataset(card, "evaluation")


def facts(report):
    value = report.to_json()
    costs = ("latency_ms", "model", "baseline", "rounds", "ratios", "machine", "measured_at")
    return {k: v for k, v in value.items() if k not in costs}


@pytest.mark.parametrize("most", [judgement.ANSWER_BYTES, 0])
def test_remembered_answers_give_the_report_of_a_fresh_run(files, monkeypatch, most):
    (candidate, baseline), data = files
    monkeypatch.setattr(judgement, "ANSWER_BYTES", most)
    judge = judgement.judge_of(baseline, data, ONE_RUN, silent)
    assert (judge.answers is None) == (most == 0)
    fresh = judgement.report_on((candidate, "q"), (baseline, "m"), data, silent)
    assert 0 < fresh.metrics["agreement"] < 1
    for _ in range(2):  # the answers are not used up
        assert facts(judgement.judged(judge, candidate, "q")) == facts(fresh)
    itself = judgement.judged_itself(judge)
    assert itself.metrics["agreement"] == 1.0
    assert facts(itself) == facts(judgement.report_on((baseline, "m"), (baseline, "m"), data, silent))


def test_the_float_model_runs_once_over_the_samples(files):
    (candidate, baseline), data = files
    judge = judgement.judge_of(baseline, data, ONE_RUN, silent)

    ran: list[object] = []
    known = replace(judge, baseline=replace(judge.baseline, predict=ran.append))
    assert judgement.judged(known, candidate, "q").n == judgement.judged_itself(known).n > 0
    assert ran == []


def test_latency_that_nobody_asks_for_is_one_run(files):
    (candidate, baseline), data = files
    judge = judgement.judge_of(baseline, data, ONE_RUN, silent)
    assert judgement.judged(judge, candidate, "q").model.latency_ms.runs == 1
