"""The collapse on CPUs without VNNI, made on purpose, and its cures."""

import json

import numpy as np
import pytest
from models import conv_net, model_of, save, write_data
from onnx import helper

from qcore import steps
from qcore.errors import ConfigError, ModelError
from qcore.parity_report import CONDITION_NAMES, ConditionResult, ParityOf, ParityReport
from qcore.target import PROFILES

FEATURES = 32
NAMES = list(CONDITION_NAMES)


def saturating_net():
    """Two classes: one adds up all features, the other has its weight on every second one.

    Of inputs near 1 the first adds 32, the second 24. In integers the first has weights of 127 everywhere: of
    activations near 255 every pair of products is 64,770, and int16 holds half of it. The second has zeros between its
    weights, and no pair of it exceeds 32,385.
    """
    weights = np.stack([np.ones(FEATURES), np.tile([1.5, 0.0], FEATURES // 2)]).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="sums", transB=1)
    return model_of([node], {"w": weights}, inputs={"x": ["N", FEATURES]}, outputs={"y": ["N", 2]})


@pytest.fixture
def files(tmp_path):
    """Half of the samples have all features near 1, the others only every second one: class 0 and class 1."""
    x = np.random.default_rng(0).uniform(0.95, 1.0, (200, FEATURES)).astype(np.float32)
    x[::2, 1::2] = 0.0
    np.savez(tmp_path / "data.npz", x=x, y=(np.arange(200) % 2 == 0).astype(np.int64))
    card = tmp_path / "data.yaml"
    card.write_text(
        "name: pairs\npath: data.npz\nsplits:\n  calibration: {range: [0, 40]}\n  evaluation: {range: [40, 200]}\n"
    )
    return save(saturating_net(), tmp_path / "m.onnx"), card


def parity_for(target, files, folder):
    model, card = files
    steps.compress(model=model, data=card, out=folder / "q.onnx", target=str(target))
    return steps.parity(model=folder / "q.onnx", data=card, out=folder / "parity.json")


def by_name(report):
    return {c.name: c for c in report.conditions}


def test_a_model_that_is_perfect_with_vnni_collapses_without(files, tmp_path):
    report = parity_for("x86-vnni", files, tmp_path)
    found = by_name(report)
    assert list(found) == NAMES
    assert report.measured.n == 64
    assert report.top1 == 1.0
    assert found["exact-integers"].top1 == found["optimizations-off"].top1 == 1.0
    worst = report.worst
    assert worst.name == "saturating-pairs"
    assert worst.verdict == "far"
    assert worst.agreement == worst.top1 == 0.5  # two classes: chance
    assert "x86-avx2" in worst.advice
    assert "reduce_range" in worst.advice


@pytest.mark.parametrize("cure", ["reduce_range", "x86-avx2"])
def test_seven_bits_or_uint8_weights_cure_it(cure, files, tmp_path):
    target = cure
    if cure == "reduce_range":
        target = tmp_path / "target.yaml"
        target.write_text((PROFILES / "x86-vnni.yaml").read_text() + "reduce_range: true\n")
    report = parity_for(target, files, tmp_path)
    found = by_name(report)
    assert found["saturating-pairs"].top1 == found["saturating-pairs"].agreement == 1.0
    assert found["saturating-pairs"].sqnr_db == found["exact-integers"].sqnr_db
    assert all(c.verdict != "far" for c in report.conditions)


def test_the_file_holds_what_is_returned_and_equal_runs_are_equal(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    calls = []
    arguments = {"model": tmp_path / "q.onnx", "data": card, "samples": 20}
    report = steps.parity(**arguments, out=tmp_path / "a.json", progress=lambda *call: calls.append(call))
    steps.parity(**arguments, out=tmp_path / "b.json")
    stored = (tmp_path / "a.json").read_bytes()
    assert stored == (tmp_path / "b.json").read_bytes()
    value = json.loads(stored)
    assert value == report.to_json()
    assert value["schema"] == "qcore.parity/2"
    assert value["target"] == "x86-vnni"
    assert value["data"]["n"] == 20
    assert [(name, 20, 20) in calls for name in NAMES] == [True] * len(NAMES)
    assert by_name(report)["exact-integers"].verdict == "equal"


def test_a_float_model_without_labels_is_compared_by_its_outputs(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    card.write_text(card.read_text() + "task: none\n")
    report = steps.parity(model=model, data=card, out=tmp_path / "p.json", samples=8)
    assert report.top1 is None
    assert all(c.top1 is None and c.verdict != "far" and c.sqnr_db > 90 for c in report.conditions)


def result(name, verdict, agreement, sqnr_db, advice="nothing to do"):
    return ConditionResult(
        name=name, verdict=verdict, agreement=agreement, top1=None, sqnr_db=sqnr_db, meaning="m", advice=advice
    )


def report_of(*conditions):
    measured = ParityOf(
        model="m",
        model_sha256="0" * 64,
        target=None,
        data="d",
        split="s",
        data_sha256="1" * 64,
        split_sha256="2" * 64,
        n=1,
        runtime={},
        qcore_version="",
    )
    return ParityReport(measured=measured, top1=None, conditions=conditions)


def test_the_worst_case_has_the_least_agreement_then_the_most_noise():
    a, b, c = result("a", "near", 0.99, 30.0), result("b", "far", 0.9, 25.0, "mend it"), result("c", "near", 0.99, 28.0)
    assert report_of(a, b, c).worst is b
    assert report_of(a, b, c).advice() == "Worst case: b, far from what was evaluated; mend it."
    assert report_of(a, c).worst is c
    assert report_of(a, c).advice() == "Worst case: c, near what was evaluated; nothing to do."
    equal = report_of(result("a", "equal", 1.0, 300.0))
    assert equal.worst is None
    assert equal.to_json()["worst"] is None
    assert equal.advice() == "Every condition gives the same numbers to the bit."


def test_refusals(files, tmp_path):
    model, card = files
    with pytest.raises(ConfigError, match="samples is 0; allowed: 1 or more"):
        steps.parity(model=model, data=card, out=tmp_path / "p.json", samples=0)
    with pytest.raises(ModelError, match="does not exist; check the path"):
        steps.parity(model=tmp_path / "none.onnx", data=card, out=tmp_path / "p.json")
    with pytest.raises(ConfigError):
        steps.parity(model=model, data=card, out=model)
    assert not (tmp_path / "p.json").exists()
