"""`qcore parity` as a person or a script meets it."""

import json
import subprocess
import sys

from models import conv_net, save, write_data

from qcore import steps


def qcore(*arguments):
    command = [sys.executable, "-P", "-m", "qcore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parity_tells_people_and_machines_the_same(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    where = ["--model", tmp_path / "q.onnx", "--data", card, "--samples", "16"]
    shown = qcore("parity", *where, "--out", tmp_path / "a.json")
    assert shown.returncode == 0, shown.stderr
    told = qcore("parity", *where, "--out", tmp_path / "b.json", "--json")
    facts = json.loads(told.stdout)
    assert facts.pop("output") == str(tmp_path / "b.json")
    assert facts == json.loads((tmp_path / "a.json").read_bytes())
    text = " ".join(shown.stdout.split())
    for condition in facts["conditions"]:
        assert f"{condition['name']}: {condition['meaning']}; {condition['advice']}" in text
    assert facts["advice"] in text
    assert "saturating-pairs 16/16" in shown.stderr


def test_a_missing_model_is_one_line(tmp_path):
    card = write_data(tmp_path, conv_net())
    done = qcore("parity", "--model", tmp_path / "no.onnx", "--data", card, "--out", tmp_path / "p.json")
    assert done.returncode == 1
    assert done.stderr == f"error: model file {tmp_path / 'no.onnx'} does not exist; check the path\n"
