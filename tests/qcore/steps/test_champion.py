"""A released model in the evaluation of files, and a gate that is told what its report has to be about."""

import hashlib
import json
import re

import numpy as np
import pytest
from models import conv_net, model_of, save, write_data
from onnx import helper

from qcore import steps
from qcore.cli.main import run
from qcore.errors import DataError, GateRefused, ModelError
from qcore.recount import refuse_contradictions
from qcore.release.keys import create_keys
from qcore.report_file import report_from_json

POLICY = """\
name: release
top1: {max_drop: 0.5, max_drop_champion: 0.5}
max_age_days: 1
parity: {sqnr_db: -100}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A float model, a fine candidate, a coarse released one, a card, keys and a policy that wants all of it."""
    folder = tmp_path_factory.mktemp("world")
    proto = conv_net()
    card, model = write_data(folder, proto), save(proto, folder / "m.onnx")
    for name, recipe in (("q", "int8"), ("old", "int2-weights")):
        steps.compress(model=model, data=card, out=folder / f"{name}.onnx", target="x86-vnni", recipe=recipe)
    create_keys(folder / "keys", ["stable"])
    (folder / "p.yaml").write_text(POLICY)
    files = {"candidate": folder / "q.onnx", "baseline": model, "data": card}
    steps.evaluate(**files, champion=folder / "old.onnx", out=folder / "r.json")
    steps.parity(model=folder / "q.onnx", data=card, out=folder / "parity.json", samples=8)
    return folder


def files_of(world):
    return {"candidate": world / "q.onnx", "baseline": world / "m.onnx", "data": world / "tiny.yaml"}


def load(path):
    return report_from_json(json.loads(path.read_bytes()))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def timeless(report):
    value = report.to_json()
    for name in ("measured_at", "latency_ms", "model", "baseline", "rounds", "ratios", "machine"):
        value.pop(name)
    return value | {"files": (report.model.sha256, report.baseline.sha256)}


def test_the_champion_is_what_it_would_be_as_a_candidate(world, tmp_path):
    report = load(world / "r.json")
    swapped = {**files_of(world), "candidate": world / "old.onnx"}
    alone = steps.evaluate(**swapped, out=tmp_path / "old.json")
    assert report.samples.champion == alone.samples.candidate
    for name in ("top1", "agreement", "output_sqnr_db"):
        assert report.metrics[f"champion_{name}"] == alone.metrics[name]
    assert (report.champion.sha256, report.champion.size_bytes) == (alone.model.sha256, alone.model.size_bytes)
    refuse_contradictions(report)


def test_without_a_champion_the_report_is_the_same_but_for_it(world, tmp_path):
    plain = steps.evaluate(**files_of(world), out=tmp_path / "plain.json")
    assert plain.champion is None
    value, with_it = timeless(plain), timeless(load(world / "r.json"))
    assert value["samples"].pop("champion") is None
    with_it["samples"].pop("champion")
    with_it["metrics"] = {k: v for k, v in with_it["metrics"].items() if not k.startswith("champion_")}
    with_it["champion"] = None
    assert (value["download"], with_it.pop("download")["released_sha256"]) == (None, digest(world / "old.onnx"))
    with_it["download"] = None
    assert json.dumps(value, sort_keys=True) == json.dumps(with_it, sort_keys=True)


def test_shards_with_a_champion_merge_to_the_report_of_one_process(world, tmp_path):
    parts = []
    for k in (2, 1):
        parts.append(tmp_path / f"{k}.json")
        steps.evaluate_shard(**files_of(world), champion=world / "old.onnx", out=parts[-1], shard=(k, 2))
    steps.merge_reports(parts=parts, out=tmp_path / "merged.json")
    assert timeless(load(tmp_path / "merged.json")) == timeless(load(world / "r.json"))
    began = [json.loads(p.read_bytes())["measured_at"] for p in parts]
    assert load(tmp_path / "merged.json").measured_at == min(began)
    steps.evaluate_shard(**files_of(world), out=parts[0], shard=(2, 2))
    with pytest.raises(DataError, match="parts disagree on champion"):
        steps.merge_reports(parts=parts, out=tmp_path / "merged.json")


def test_a_champion_that_answers_something_else_is_refused(world, tmp_path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    other = save(model_of(nodes, {}, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": ["N", 3]}), tmp_path / "three.onnx")
    with pytest.raises(ModelError, match=r"champion gives outputs .*; a champion that answers something else"):
        steps.evaluate(**files_of(world), champion=other, out=tmp_path / "r.json")
    with pytest.raises(ModelError, match="does not exist"):
        steps.evaluate(**files_of(world), champion=tmp_path / "no.onnx", out=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def gate(world, out, *more):
    fixed = ["--report", world / "r.json", "--key", world / "keys" / "gate.pem", "--out", out]
    return run(["gate", *map(str, [*fixed, "--policy", world / "p.yaml", *more])])


def everything(world):
    named = {"model": "q.onnx", "baseline": "m.onnx", "champion": "old.onnx", "data": "tiny.yaml"}
    pairs = [(f"--{k}", world / v) for k, v in named.items()]
    return [*(x for pair in pairs for x in pair), "--split", "evaluation", "--parity", world / "parity.json"]


def test_the_gate_passes_what_is_about_these_files(world, tmp_path, capsys):
    assert gate(world, tmp_path / "e.json", *everything(world), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {c["name"] for c in found["checks"]} == {
        "top1_drop", "top1_champion_drop", "parity_conditions", "parity_sqnr_db", "age_days",
    }  # fmt: skip
    assert found["champion_sha256"] == load(world / "r.json").champion.sha256
    assert gate(world, tmp_path / "e.json") == 3  # the policy wants parity, and nobody gave it


@pytest.mark.parametrize(
    ("option", "file", "says"),
    [
        ("--model", "old.onnx", "model .*old.onnx has digest"),
        ("--baseline", "q.onnx", "baseline .*q.onnx has digest"),
        ("--champion", "q.onnx", "champion .*q.onnx has digest"),
        ("--split", "calibration", "split 'calibration' is asked for and the report is about split 'evaluation'"),
    ],
)
def test_a_report_on_other_files_is_refused(world, tmp_path, option, file, says, capsys):
    value = file if option == "--split" else world / file
    assert gate(world, tmp_path / "e.json", *everything(world), option, value) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(says, error)
    assert "qcore evaluate" in error
    assert not (tmp_path / "e.json").exists()


def test_a_report_on_other_samples_is_refused(world, tmp_path, capsys):
    proto = conv_net()
    card = write_data(tmp_path, proto)
    with np.load(tmp_path / "tiny.npz") as stored:
        arrays = dict(stored)
    arrays["x"] = arrays["x"] + 1
    np.savez(tmp_path / "tiny.npz", **arrays)
    assert gate(world, tmp_path / "e.json", *everything(world), "--data", card) == 1
    assert "the report is about" in capsys.readouterr().err


def test_a_stale_parity_report_is_refused(world, tmp_path, capsys):
    steps.parity(model=world / "old.onnx", data=world / "tiny.yaml", out=tmp_path / "p.json", samples=4)
    assert gate(world, tmp_path / "e.json", "--parity", tmp_path / "p.json") == 1
    assert "the parity report is about model" in capsys.readouterr().err
    for text, says in (("{}", "expected a parity report"), ("[", "is not a parity report")):
        (tmp_path / "p.json").write_text(text)
        assert gate(world, tmp_path / "e.json", "--parity", tmp_path / "p.json") == 1
        assert says in capsys.readouterr().err
    assert gate(world, tmp_path / "e.json", "--parity", tmp_path / "none.json") == 1
    assert "run `qcore parity`" in capsys.readouterr().err


def test_an_old_report_fails(world, tmp_path):
    value = json.loads((world / "r.json").read_bytes())
    (tmp_path / "old.json").write_text(json.dumps({**value, "measured_at": "2020-01-01T00:00:00Z"}))
    key = world / "keys" / "gate.pem"
    decision = steps.gate(
        report=tmp_path / "old.json", out=tmp_path / "e.json", key=key, policy=world / "p.yaml",
        parity=world / "parity.json",
    )  # fmt: skip
    assert [c.name for c in decision.checks if c.outcome == "fail"] == ["age_days"]
    future = {**value, "measured_at": "2120-01-01T00:00:00Z"}
    (tmp_path / "old.json").write_text(json.dumps(future))
    with pytest.raises(GateRefused, match="which is not yet"):
        steps.gate(report=tmp_path / "old.json", out=tmp_path / "e.json", key=key, policy=world / "p.yaml")


def test_a_released_package_is_a_champion(world, tmp_path):
    released = {"model": world / "old.onnx", "data": world / "tiny.yaml", "family": "f", "version": "1"}
    steps.package(**released, out=tmp_path / "old.qpkg")
    (tmp_path / "package").write_bytes((tmp_path / "old.qpkg").read_bytes())  # as a pipeline calls its outputs
    for name in ("old.qpkg", "package"):
        report = steps.evaluate(**files_of(world), champion=tmp_path / name, out=tmp_path / "r.json")
        assert timeless(report) == timeless(load(world / "r.json"))
