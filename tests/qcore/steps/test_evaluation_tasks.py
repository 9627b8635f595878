"""Evaluation of files: regressions, anomalies, slices and metrics of a data card; shards merged to one report."""

import json
import sys

import numpy as np
import pytest
from models import conv_net, model_of, save, write_data
from onnx import helper

from qcore import steps
from qcore.cli.main import run
from qcore.errors import CalibrationError, DataError
from qcore.gate import decide, default_policy
from qcore.policy import ParityLimit
from qcore.report_file import report_from_json

CARD = """\
name: points
path: points.npz
task: {task}
splits:
  calibration: {{range: [0, 40]}}
  evaluation: {{range: [40, 440]}}
slices:
  first: [40, 41, 42]
  batch: group
metrics: {{"own_metrics:largest": lower}}
"""
METRIC = """\
def largest(outputs, truth):
    return abs(next(iter(outputs.values()))).reshape(len(truth), -1).max(axis=1)

mae = largest
"""


def linear(weights):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = {"inputs": {"x": ["N", 3]}, "outputs": {"y": ["N", weights.shape[1]]}}
    return model_of([node], {"w": weights.astype(np.float32)}, **shapes)


OUTCOME = {"regression": "pass", "anomaly": "inconclusive"}
"""A hundred anomalies do not show that less than one in a hundred is missed."""


@pytest.fixture(params=["regression", "anomaly"])
def points(tmp_path, request, monkeypatch):
    """A folder with a linear model, a candidate that is a little off, and a card of the task."""
    (tmp_path / "own_metrics.py").write_text(METRIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(440, 3)).astype(np.float32), rng.normal(size=(3, 2 if request.param == "regression" else 1))
    y = x @ w + 0.2 * rng.normal(size=(440, w.shape[1]))
    if request.param == "anomaly":
        y = (y[:, 0] > 1).astype(np.int64)
    np.savez(tmp_path / "points.npz", x=x, y=y, group=np.arange(440) % 3)
    (tmp_path / "card.yaml").write_text(CARD.format(task=request.param))
    save(linear(w), tmp_path / "m.onnx")
    save(linear(w + 0.001 * rng.normal(size=w.shape)), tmp_path / "q.onnx")
    return tmp_path


def files(folder):
    return {"candidate": folder / "q.onnx", "baseline": folder / "m.onnx", "data": folder / "card.yaml"}


def test_a_card_says_what_is_measured(points):
    report = steps.evaluate(**files(points), out=points / "r.json")
    task = report.data.task
    assert {"regression": {"mae", "rmse", "r2"}, "anomaly": {"auc"}}[task] <= set(report.metrics)
    assert "agreement" not in report.metrics
    assert report.user_metrics == {"largest": "lower"}
    assert report.slices["first"] == (0, 1, 2)
    assert report.data.slices == {"first": 3, "batch=0": 133, "batch=1": 134, "batch=2": 133}
    assert report_from_json(json.loads((points / "r.json").read_text())) == report
    assert decide(report, default_policy(report)).outcome == OUTCOME[task]


def test_parity_is_measured_for_every_task(points):
    report = steps.parity(model=points / "q.onnx", data=points / "card.yaml", out=points / "p.json", samples=16)
    assert report.top1 is None
    assert all(c.agreement is None and c.top1 is None and c.sqnr_db > 90 for c in report.conditions)
    judged = steps.evaluate(**files(points), out=points / "r.json")
    asked = default_policy(judged).model_copy(update={"parity": ParityLimit(sqnr_db=60)})
    assert decide(judged, asked, report).outcome == OUTCOME[judged.data.task]
    assert decide(judged, asked).outcome == "fail"


def timeless(path):
    """Return the report without what no two runs measure alike."""
    value = json.loads(path.read_text())
    value.pop("measured_at")
    for part in (value, value["model"], value["baseline"]):
        for name in ("latency_ms", "latency_all_cores_ms", "cold_start_ms", "peak_memory_bytes"):
            part.pop(name, None)
    return {k: v for k, v in value.items() if k not in ("rounds", "ratios", "machine")}


def test_shards_merge_to_the_report_of_one_process(points):
    steps.evaluate(**files(points), out=points / "one.json")
    parts = [points / f"part{k}.json" for k in (3, 1, 2)]
    for path, k in zip(parts, (3, 1, 2), strict=True):
        steps.evaluate_shard(**files(points), out=path, shard=(k, 3))
    merged = steps.merge_reports(parts=parts, out=points / "merged.json")
    assert timeless(points / "merged.json") == timeless(points / "one.json")
    part1 = json.loads(parts[1].read_text())
    assert list(merged.rounds["latency"].candidate) == part1["costs"]["rounds"]["latency"]["candidate"]
    assert json.loads(parts[0].read_text())["costs"] is None
    with pytest.raises(DataError, match="samples 0 to 127 of the split are missing"):
        steps.merge_reports(parts=[parts[0], parts[2]], out=points / "merged.json")
    with pytest.raises(DataError, match="are missing; merge every shard once"):
        steps.merge_reports(parts=parts[1:], out=points / "merged.json")
    with pytest.raises(DataError, match="are in two parts"):
        steps.merge_reports(parts=[*parts, parts[2]], out=points / "merged.json")
    save(linear(np.ones((3, json.loads(parts[0].read_text())["tally"]["classes"]))), points / "q.onnx")
    steps.evaluate_shard(**files(points), out=parts[2], shard=(2, 3))
    with pytest.raises(DataError, match="parts disagree on model"):
        steps.merge_reports(parts=parts, out=points / "merged.json")
    parts[2].write_text("{}")
    with pytest.raises(DataError, match="expected schema"):
        steps.merge_reports(parts=parts, out=points / "merged.json")
    with pytest.raises(CalibrationError, match="shard 4/3 does not exist"):
        steps.evaluate_shard(**files(points), out=parts[2], shard=(4, 3))


@pytest.mark.parametrize("batch", ["N", 3])
def test_shards_of_a_classifier_merge_byte_for_byte(tmp_path, batch):
    proto = conv_net(batch=batch)
    card = write_data(tmp_path, conv_net())
    model = save(proto, tmp_path / "m.onnx")
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni", recipe="int4-weights")
    asked = ["--model", str(tmp_path / "q.onnx"), "--baseline", str(model), "--data", str(card)]
    assert run(["evaluate", *asked, "--out", str(tmp_path / "one.json")]) == 0
    for k in (1, 2):
        assert run(["evaluate", *asked, "--shard", f"{k}/2", "--out", str(tmp_path / f"{k}.json")]) == 0
    parts = [str(tmp_path / f"{k}.json") for k in (2, 1)]
    assert run(["merge-reports", *parts, "--out", str(tmp_path / "merged.json")]) == 0
    assert timeless(tmp_path / "merged.json") == timeless(tmp_path / "one.json")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("own_metrics:largest", "has no direction; allowed: module:function=higher or =lower"),
        ("own_metrics:largest=up", "has no direction"),
        ("own_metrics=higher", "is no entry; allowed: module:function such as"),
        ("os;x:f=higher", "is no entry"),
        ("no_such_module:f=higher", "cannot be imported"),
        ("own_metrics:smallest=lower", "own_metrics has no function 'smallest'"),
        ("own_metrics:mae=lower", "metric 'mae' has a name that is taken"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_in_a_line(points, metric, says, capsys):
    f = {k: str(v) for k, v in files(points).items()}
    asked = ["--model", f["candidate"], "--baseline", f["baseline"], "--data", f["data"], "--metric", metric]
    assert run(["evaluate", *asked, "--out", str(points / "r.json")]) == 1
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"y": np.full((440, 1), np.nan)}, "target 0 of points is NaN or infinite|hold the value nan"),
        ({"y": np.arange(440.0)}, "labels of points hold the value 2|targets have 1 values per sample"),
        ({"y": np.zeros(3)}, "has 3 rows; allowed: 440"),
        ({"group": np.arange(440.0)}, "slice 'batch' of points is float64"),
        ({"group": np.zeros(3, int)}, "has 3 rows; allowed: 440"),
    ],
)
def test_truth_and_slices_that_do_not_fit_are_refused(points, change, says):
    with np.load(points / "points.npz") as stored:
        arrays = {**stored, **change}
    np.savez(points / "points.npz", **arrays)
    with pytest.raises(DataError, match=says):
        steps.evaluate(**files(points), out=points / "r.json")
