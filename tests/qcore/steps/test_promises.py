"""What every verb promises: inputs stay as they are, the same data give the same bytes, damaged notes are refused."""

import os

import pytest
from models import conv_net, save, write_data

from qcore import steps
from qcore.cli.main import run
from qcore.files import sha256_file

TARGET = "npu-int8-symmetric"


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    proto = conv_net()
    return save(proto, folder / "m.onnx"), write_data(folder, proto)


def command(verb, inputs, out):
    model, card = inputs
    verbs = {
        "compress": ["compress", "--recipe", "int8-rounded"],
        "auto": ["compress", "--recipe", "auto"],
        "mixed": ["mixed", "--max-drop", "0.5"],
        "calibrate": ["calibrate"],
        "calibrate-jobs": ["calibrate", "--jobs", "2"],
        "sensitivity": ["sensitivity", "--samples", "4"],
    }
    target = [] if verb.startswith("calibrate") else ["--target", TARGET]
    return run([*verbs[verb], "--model", str(model), "--data", str(card), "--out", str(out), *target])


def state(folder):
    """Return what a file written, or made and removed again, in `folder` would change."""
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    return files, folder.stat().st_mtime_ns


@pytest.mark.parametrize(
    "verb", ["compress", "auto", "mixed", "calibrate", "calibrate-jobs", "sensitivity", "quantize", "prune"]
)
def test_nothing_is_written_beside_inputs(verb, inputs, tmp_path, capfd):
    model, card = inputs
    if verb == "quantize":
        steps.calibrate(model=model, data=card, out=model.parent / "t.json")
    before = state(model.parent)
    model.parent.chmod(0o555)  # root may write all the same, so the state is compared too
    out = tmp_path / "out" / "q"
    try:
        if verb == "quantize":
            table = model.parent / "t.json"
            code = run(["quantize", "--model", str(model), "--table", str(table), "--out", str(out)])
        elif verb == "prune":
            code = run(["prune", "--model", str(model), "--out", str(out)])
        else:
            code = command(verb, inputs, out)
    finally:
        model.parent.chmod(0o755)
    assert code == 0, capfd.readouterr().err
    assert out.is_file()
    assert state(model.parent) == before


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("recipe", ["int8", "int8-rounded", "int8-equalized"])
def test_the_same_seed_gives_the_same_bytes(recipe, seed, inputs, tmp_path):
    model, card = inputs
    splits = f"splits:\n  seed: {seed}\n  calibration: {{count: 24}}\n  evaluation: {{rest: true}}\n"
    card.write_text(card.read_text().partition("splits:")[0] + splits)
    written = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.onnx"
        made = steps.compress(model=model, data=card, out=out, recipe=recipe, target=TARGET)
        steps.calibrate(model=model, data=card, out=tmp_path / f"{name}.json")
        written.append((made.sha256, sha256_file(out), sha256_file(tmp_path / f"{name}.json")))
    assert written[0] == written[1]


def test_another_seed_chooses_other_samples(inputs, tmp_path):
    model, card = inputs
    tables = set()
    for seed in range(4):
        splits = f"splits:\n  seed: {seed}\n  calibration: {{count: 24}}\n"
        card.write_text(card.read_text().partition("splits:")[0] + splits)
        tables.add(steps.calibrate(model=model, data=card, out=tmp_path / "t.json").data_sha256)
    assert len(tables) == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw.replace(b'"agreement":', b'"agreement":0,"was":', 1), "was changed"),
        (lambda raw: raw.replace(b"}", b"]", 1), "is not a trial"),
        (lambda raw: b"\xff\xfe" + raw, "is not a trial"),
        (lambda raw: b"3\n" + raw, "is not a trial"),
    ],
)
@pytest.mark.parametrize("verb", ["auto", "mixed"])
def test_a_damaged_journal_is_refused_in_one_line_and_nothing_is_written(verb, damage, words, inputs, tmp_path, capfd):
    out = tmp_path / "q.onnx"
    assert command(verb, inputs, out) == 0
    capfd.readouterr()
    journal, first = steps.journal_path(out), sha256_file(out)
    whole = journal.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    journal.write_bytes(damaged)
    assert command(verb, inputs, out) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [f"error: journal {journal}: line 1 {words}; delete the file to start over"]
    assert sha256_file(out) == first
    assert journal.read_bytes() == damaged
    os.unlink(journal)
    assert command(verb, inputs, out) == 0
    assert sha256_file(out) == first
