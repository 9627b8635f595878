"""The review on files: each is put to the candidate it is about; what does not belong leaves no output behind."""

import base64
import json

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from reviewing import drawn, everything

from qcore.calibration import calibrate, save_table
from qcore.canonical import sha256_bytes
from qcore.errors import ConfigError, DataError, GateRefused
from qcore.graph.history import Making, serialize_made
from qcore.release.evidence import sign_decision
from qcore.release.keys import create_keys, load_signer
from qcore.steps import Beside, review, review_paths

A, C = "a" * 64, "c" * 64


@pytest.fixture
def files(tmp_path):
    """Return a folder with the reports of two candidates and the decisions on them."""
    create_keys(tmp_path / "keys", ["stable"])
    signer = load_signer(tmp_path / "keys" / "gate.pem")
    for name, seed, sha256 in (("ptq", 0, A), ("qat", 1, C)):
        whole = everything(name, drawn(seed=seed, model=sha256))
        (tmp_path / f"{name}.json").write_text(json.dumps(whole.report.to_json()))
        (tmp_path / f"{name}.evidence").write_bytes(sign_decision(whole.decision, signer))
    card = "name: parts\npath: x.npz\nclasses: [cat, dog]\nsplits: {evaluation: {}}\n"
    (tmp_path / "card.yaml").write_text(card)
    (tmp_path / "other.yaml").write_text(card.replace("parts", "others"))
    return tmp_path


def reports(folder):
    return [(name, folder / f"{name}.json") for name in ("ptq", "qat")]


def test_files_find_their_candidate_whatever_their_order(files):
    beside = Beside(evidence=[files / "qat.evidence", files / "ptq.evidence"], data=files / "card.yaml")
    out = review_paths(files / "deep" / "out")
    found = review(reports=reports(files), out=out, beside=beside, title="net")
    assert [c.source.decision.model_sha256 for c in found.candidates] == [A, C]
    assert found.classes == {0: "cat", 1: "dog"}
    document = json.loads(out.facts.read_text())
    assert document["verdict"] in out.page.read_text()
    assert out.markdown.read_text().startswith("**PASS")
    before = [p.read_bytes() for p in (out.page, out.markdown, out.facts)]
    review(reports=reports(files), out=out, beside=beside, title="net")
    assert [p.read_bytes() for p in (out.page, out.markdown, out.facts)] == before


def test_what_does_not_belong_is_refused_and_nothing_is_written(files):
    out, whole = review_paths(files / "out"), reports(files)
    only = whole[:1]
    (files / "damaged.json").write_bytes(whole[0][1].read_bytes()[:-20])
    table = calibrate([(1, {})], model_sha256=A, data_sha256=C)
    save_table(table, files / "table")
    cases = [
        (only, Beside(evidence=[files / "qat.evidence"]), DataError, "is about model ccc"),
        (only, Beside(evidence=[files / "ptq.evidence"] * 2), DataError, "the second decision"),
        (only, Beside(evidence=[files / "none"]), GateRefused, "cannot be read"),
        (only, Beside(data=files / "other.yaml"), DataError, "is of others, the reports are of parts"),
        (only, Beside(tables=[files / "table"]), ConfigError, "tables are given without"),
        (only, Beside(layers=[whole[1][1]]), DataError, "is not a layer report"),
        ([("x", files / "damaged.json")], None, GateRefused, "is not an evaluation report"),
        ([("x", files / "none.json")], None, GateRefused, "does not exist"),
        ([], None, DataError, "there is no report"),
        ([whole[0], ("ptq", whole[1][1])], None, DataError, "each with a name of its own"),
    ]
    for given, beside, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            review(reports=given, out=out, beside=beside)
        assert "\n" not in str(caught.value)
    assert not (files / "out").exists()


def test_an_input_is_never_an_output(files):
    out = review_paths(files)
    (files / "review.json").write_bytes((files / "ptq.json").read_bytes())
    with pytest.raises(ConfigError, match="is also an input"):
        review(reports=[("ptq", files / "review.json")], out=out)


def test_a_statement_that_contradicts_itself_is_refused(files):
    path = files / "ptq.evidence"
    envelope = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["result"] = "FAILED"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(envelope))
    with pytest.raises(GateRefused, match="predicate contradicts the decision inside it"):
        review(reports=reports(files)[:1], out=review_paths(files / "out"), beside=Beside(evidence=[path]))


def made_model(folder, quantized: bool, calibrated: str | None) -> str:
    """Write a model that says what it was calibrated with, and the report on it; return its digest."""
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        pair if quantized else [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.array(0.5, np.float32), "s")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    making = Making(
        made_from=A,
        recipe="r",
        recipe_sha256=A,
        steps=("quantize",),
        target=None,
        data={} if calibrated is None else {"calibration": calibrated},
        qcore_version="0",
    )
    raw = serialize_made(model, making)
    (folder / "m.onnx").write_bytes(raw)
    (folder / "m.json").write_text(json.dumps(drawn(model=sha256_bytes(raw)).to_json()))
    return sha256_bytes(raw)


@pytest.mark.parametrize(
    ("quantized", "calibrated", "tensor", "says"),
    [
        (True, C, "x", None),
        (False, None, "x", "the model quantizes no activations"),
        (True, C, "z", "no table knows one of its 1 quantized activations"),
        (True, A, "x", f"calibrated with samples {A[:12]}, the tables are of {C[:12]}"),
    ],
)
def test_ranges_that_cannot_be_drawn_stop_no_review(tmp_path, quantized, calibrated, tensor, says):
    made_model(tmp_path, quantized, calibrated)
    values = np.array([[0.1, 0.5, 1.0, 2.0]], np.float32)
    save_table(calibrate([(1, {tensor: values})], model_sha256=A, data_sha256=C), tmp_path / "table")
    beside, out = Beside(models=[tmp_path / "m.onnx"], tables=[tmp_path / "table"]), review_paths(tmp_path / "out")
    source = review(reports=[("m", tmp_path / "m.json")], out=out, beside=beside).judged.source
    assert (source.ranges is None) == (says is not None)
    if says is not None:
        assert says in out.page.read_text()
