"""Files of other verbs as they are written today are read; damaged ones are refused and never a defect."""

import copy
import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from reviewing import drawn, everything

from qcore.calibration import calibrate
from qcore.errors import DataError
from qcore.graph.io import parse_model
from qcore.graph.qdq import ActivationRange, activation_ranges
from qcore.numerics.affine import QScheme, dequantize_array, qparams_from_range, quantize_array
from qcore.numerics.error import sqnr_db
from qcore.review.histograms import BINS, ranges_of
from qcore.review.read import load_layers, load_parity, load_summary

SHA = "a" * 64
STEP = {
    "method": "quantize",
    "kept": True,
    "reason": None,
    "changed": ["a"],
    "skipped": [{"node": "n", "op_type": "Conv", "reason": "r"}],
    "epochs": [{"number": 0}, {"number": 1}],
    "samples": 3,
    "seconds": 1.5,
}
SUMMARY = {
    "model": {"sha256": SHA},
    "recipe": "int8",
    "recipe_sha256": SHA,
    "target": "t",
    "steps": [STEP],
    "breaches": [{"rule": "r", "where": "w", "observed": "o", "allowed": "a"}],
    "packed_bytes": None,
    "ladder": [{"recipe": "int8", "outcome": "pass", "error": 0.1, "size_bytes": 5, "latency_ms": None}],
    "chosen": 0,
    "stopped": "it passed",
}
PRECISION = {
    "schema": "qcore.precision/1",
    "written": {k: v for k, v in SUMMARY.items() if k not in ("ladder", "chosen", "stopped")},
    "why": "w",
    "measure": "KL",
    "base": "int8",
    "chosen": 1,
    "attempts": [
        {"precision": {}, "error": None, "size_bytes": 0, "latency_ms": None, "holds": False},
        {"precision": {"n": "int16", "m": "int16"}, "error": 0.1, "size_bytes": 5, "latency_ms": 1.0, "holds": True},
    ],
}
LAYERS = {
    "schema": "qcore.layers/1",
    "model": {"name": "q", "sha256": SHA},
    "baseline": {"name": "f", "sha256": SHA},
    "data": {"n": 4},
    "advice": "a",
    "layers": [
        {
            "node": "n",
            "op_type": "Conv",
            "verdict": "fine",
            "why": "",
            "accumulated": {"sqnr_db": 3.0},
            "local": {"sqnr_db": 4.0},
        }
    ],
}
PARITY = json.loads(json.dumps(everything("a", drawn()).parity.to_json()))
FILES = [(load_summary, SUMMARY), (load_summary, PRECISION), (load_layers, LAYERS), (load_parity, PARITY)]


def written(path, value):
    path.write_text(json.dumps(value))
    return path


def test_what_is_shown_is_what_is_written(tmp_path):
    made = load_summary(written(tmp_path / "s", SUMMARY))
    assert (made.steps[0].changed, made.steps[0].epochs, made.steps[0].skipped) == (1, 1, (("n", "Conv", "r"),))
    assert made.breaches == ("r: w: o: a",)
    assert [(t.label, t.chosen) for t in made.trials] == [("int8", True)]
    found = load_summary(written(tmp_path / "p", PRECISION))
    assert [(t.label, t.outcome, t.chosen) for t in found.trials] == [
        ("all in int8", "does not hold", False),
        ("2 in int16", "holds", True),
    ]
    assert load_layers(written(tmp_path / "l", LAYERS)).layers[0].local_db == 4.0
    assert load_parity(written(tmp_path / "c", PARITY)).conditions[0].sqnr_db == 3.0


def places(value, path=()):
    """Return the path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def changed(value, path, new):
    """Return a copy with another value at `path`; without it where `new` is `places`."""
    value = copy.deepcopy(value)
    if not path:
        return None if new is places else new
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is places:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_read_or_refused_in_one_line(tmp_path_factory, data):
    load, value = data.draw(st.sampled_from(FILES))
    path = data.draw(st.sampled_from(places(value)))
    new = data.draw(st.sampled_from([places, None, "x", -1, 1e400, True, [], {}, [None], {"a": 1}]))
    file = written(tmp_path_factory.mktemp("damage") / "f", changed(value, path, new))
    try:
        load(file)
    except DataError as e:
        assert "\n" not in str(e)  # noqa: PT017
        assert str(file) in str(e)  # noqa: PT017


@pytest.mark.parametrize("load", [load_summary, load_layers, load_parity])
def test_no_file_and_no_json_are_said(tmp_path, load):
    with pytest.raises(DataError, match="does not exist; run `qcore"):
        load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="is not JSON"):
        load(tmp_path / "text")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0.2, 1.5), st.floats(-3, 3))
def test_how_a_range_fits_is_what_the_quantizer_does_to_the_values(seed, share, shift):
    x = (np.random.default_rng(seed).normal(size=5000) + shift).astype(np.float32)
    low, high = min(0.0, share * float(x.min())), max(0.0, share * float(x.max()))
    table = calibrate([(1, {"t": x})], model_sha256=SHA, data_sha256=SHA)
    q = qparams_from_range(np.array(low), np.array(high), QScheme(dtype="uint8"))
    step, zero = float(q.scale), int(q.zero_point)
    chosen = ActivationRange(low=-zero * step, high=(255 - zero) * step, step=step)
    (fit,) = ranges_of(SHA, {"t": chosen, "unknown": chosen}, table).fits
    true = sqnr_db(x, dequantize_array(quantize_array(x, q), q))
    assert fit.sqnr_db == pytest.approx(true, abs=0.5)
    assert fit.outside == pytest.approx(
        np.mean((x < chosen.low) | (x > chosen.high)), abs=5e-3
    )  # a bin of the histogram
    assert len(fit.counts) <= BINS
    assert sum(fit.counts) == table.stats["t"].count
    width = 2.0**fit.exponent
    assert fit.first * width <= x.min()
    assert x.max() <= (fit.first + len(fit.counts)) * width


def test_ranges_are_those_that_the_file_states():
    scale, zero = np.array(0.5, np.float32), np.array(-28, np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("QuantizeLinear", ["d", "s"], ["q2"]),
            helper.make_node("DequantizeLinear", ["q2", "s"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(raw))
    assert activation_ranges(parse_model(raw, "m")) == {
        "x": ActivationRange(low=-50.0, high=77.5, step=0.5),
        "d": ActivationRange(low=0.0, high=127.5, step=0.5),
    }
