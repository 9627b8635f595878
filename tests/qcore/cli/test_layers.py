"""`qcore layers` and `qcore sensitivity` as a person or a script meets them."""

import json
import subprocess
import sys

import pytest
from models import conv_net, save, write_data

from qcore import steps


def qcore(*arguments):
    command = [sys.executable, "-P", "-m", "qcore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    proto = conv_net()
    model, card = save(proto, folder / "m.onnx"), write_data(folder, proto)
    steps.compress(model=model, data=card, out=folder / "q.onnx", target="x86-vnni", recipe="int2-weights")
    return folder / "q.onnx", model, card


def test_layers_tells_people_and_machines_the_same(files, tmp_path):
    quantized, model, card = files
    where = ["--model", quantized, "--baseline", model, "--data", card]
    shown = qcore("layers", *where, "--out", tmp_path / "report")
    assert shown.returncode == 0, shown.stderr
    told = qcore("layers", *where, "--out", tmp_path / "page.html", "--json")
    facts = json.loads(told.stdout)
    assert facts["page"] == str(tmp_path / "page.html")
    stored = json.loads((tmp_path / "report/layers.json").read_bytes())
    assert stored == {k: v for k, v in facts.items() if k not in ("output", "page")}
    at_fault = [e["node"] for e in facts["layers"] if e["verdict"] == "local"]
    assert at_fault  # two bits per weight are not enough
    assert all(node in shown.stdout for node in at_fault)
    assert facts["advice"] in " ".join(shown.stdout.split())
    assert str(tmp_path / "report/layers.html") in shown.stdout


def test_sensitivity_ranks_and_shows_progress(files, tmp_path):
    _, model, card = files
    arguments = ["--model", model, "--data", card, "--target", "x86-vnni", "--out", tmp_path / "s.json"]
    shown = qcore("sensitivity", *arguments, "--samples", "8")
    assert shown.returncode == 0, shown.stderr
    assert "measuring sensitivity 6/6" in shown.stderr
    ranked = json.loads((tmp_path / "s.json").read_bytes())["layers"]
    assert [e["error"] for e in ranked] == sorted((e["error"] for e in ranked), reverse=True)
    assert f"1. {ranked[0]['node']}" in shown.stdout
