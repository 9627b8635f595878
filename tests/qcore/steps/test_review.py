"""The review on files: each is put to the candidate it is about; what does not belong leaves no output behind."""

import json

import pytest
from reviewing import drawn, everything

from qcore.calibration import calibrate, save_table
from qcore.errors import ConfigError, DataError, GateRefused
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
