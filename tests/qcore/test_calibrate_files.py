"""Calibration on files: shards, processes, and what they refuse."""

import os
import subprocess
import sys

import numpy as np
import pytest
from models import conv_net, save, write_data

from qcore import steps
from qcore.errors import CalibrationError, DataError, QcoreError
from qcore.steps import calibration, children


@pytest.fixture
def files(tmp_path):
    proto = conv_net()
    return {"model": save(proto, tmp_path / "m.onnx"), "data": write_data(tmp_path / "d", proto)}


@pytest.mark.parametrize("batch", ["N", 16])
def test_shards_and_processes_give_the_bytes_of_one(tmp_path, batch):
    data = write_data(tmp_path / "d", conv_net())
    files = {"model": save(conv_net(batch=batch), tmp_path / "m.onnx"), "data": data}
    steps.calibrate(**files, out=tmp_path / "one.json")
    parts = [tmp_path / f"{k}.json" for k in (3, 1, 2)]
    for path in parts:
        steps.calibrate(**files, out=path, shard=(int(path.stem), 3))
    steps.merge_tables(tables=[parts[0], parts[1]], out=tmp_path / "two.json")
    steps.merge_tables(tables=[parts[2], tmp_path / "two.json"], out=tmp_path / "merged.json")
    seen = []
    steps.calibrate(**files, out=tmp_path / "jobs.json", jobs=2, progress=lambda *p: seen.append(p))
    whole = (tmp_path / "one.json").read_bytes()
    assert (tmp_path / "merged.json").read_bytes() == whole
    assert (tmp_path / "jobs.json").read_bytes() == whole
    assert seen[-1] == ("calibrating", 40, 40)


@pytest.mark.parametrize("classes", [1, 2])
def test_a_split_of_one_class_is_said(files, tmp_path, caplog, classes):
    card = files["data"]
    (source,) = card.parent.glob("*.npz")
    x = np.load(source)["x"]
    np.savez(source, x=x, y=np.arange(len(x)) % classes)
    steps.calibrate(**files, out=tmp_path / "t.json")
    said = "holds class 0 only: ranges of other classes are not seen" in caplog.text
    assert said == (classes == 1)


def test_an_incomplete_table_is_not_quantized(files, tmp_path):
    steps.calibrate(**files, out=tmp_path / "t.json", shard=(2, 2))
    with pytest.raises(CalibrationError, match="holds 20 of 40 samples; missing: 0 to 19; run `qcore merge-tables`"):
        steps.quantize(model=files["model"], table=tmp_path / "t.json", out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_only_the_named_tensors_are_measured(files, tmp_path):
    table = steps.calibrate(**files, out=tmp_path / "t.json", tensors=["r*", "x"])
    assert set(table.stats) == {"x", "r1"}
    with pytest.raises(CalibrationError, match=r"tensors names 'nope\*', which is no activation"):
        steps.calibrate(**files, out=tmp_path / "u.json", tensors=["nope*"])
    assert not (tmp_path / "u.json").exists()


def test_every_rule_reads_the_same_table(files, tmp_path):
    steps.calibrate(**files, out=tmp_path / "t.json")
    digests = set()
    for kind in ("min-max", "moving-average", "percentile", "entropy", "mse", "sqnr"):
        recipe = tmp_path / f"{kind}.yaml"
        options = f"method: quantize, ranges: {kind}, percentile: 99"
        recipe.write_text(f"name: r\nsteps: [{{method: fold-batchnorm}}, {{{options}}}]\n")
        arguments = {"model": files["model"], "table": tmp_path / "t.json", "recipe": str(recipe)}
        digests.add(steps.quantize(**arguments, out=tmp_path / "q.onnx", target="x86-vnni").sha256)
    assert len(digests) == 6


def test_the_plan_of_a_process_is_that_of_this_one(files, tmp_path, monkeypatch):
    steps.calibrate(**files, out=tmp_path / "here.json")
    monkeypatch.delitem(sys.modules, "onnx_ir")
    steps.calibrate(**files, out=tmp_path / "there.json")
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_a_process_that_fails_says_so_in_its_own_words(files, tmp_path):
    x = np.load(files["data"].parent / "tiny.npz")["x"]
    x[30, 0, 0, 0] = np.nan
    np.savez(files["data"].parent / "tiny.npz", x=x, y=np.zeros(len(x), int))
    with pytest.raises(DataError, match=r"sample 30 of tiny .* holds NaN"):
        steps.calibrate(**files, out=tmp_path / "t.json", jobs=2)
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_the_cores_do_not_change_the_table(files, tmp_path, monkeypatch, cores):
    seen = []
    steps.calibrate(**files, out=tmp_path / "here.json")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    steps.calibrate(**files, out=tmp_path / "there.json", progress=lambda *p: seen.append(p))
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()
    assert seen == [("calibrating", k, 40) for k in range(1, 41)]


def test_of_two_threads_that_fail_the_first_samples_are_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    x = np.load(files["data"].parent / "tiny.npz")["x"]
    x[[15, 21], 0, 0, 0] = np.nan  # the second thread meets its own first
    np.savez(files["data"].parent / "tiny.npz", x=x, y=np.zeros(len(x), int))
    with pytest.raises(DataError, match=r"sample 15 of tiny .* holds NaN"):
        steps.calibrate(**files, out=tmp_path / "t.json")


def test_a_process_that_is_killed_is_one_line(files, tmp_path, monkeypatch):
    real = children._start

    def start(call, log):
        child = real(call, log)
        if call.what == "count":
            child.kill()
        return child

    monkeypatch.setattr(children, "_start", start)
    with pytest.raises(QcoreError, match=r"the process that calibrates samples .* was killed by SIGKILL") as e:
        steps.calibrate(**files, out=tmp_path / "t.json", jobs=2)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "t.json").exists()


def test_a_model_that_changes_meanwhile_is_refused(files, tmp_path):
    plan = calibration.plan_file(model=str(files["model"]), patterns=[])
    save(conv_net(seed=1), files["model"])
    with pytest.raises(QcoreError, match="changed while it was read"):
        calibration.cut_file(model=str(files["model"]), plan=plan, shapes={"": (3, 8, 8)}, folder=str(tmp_path))


def test_the_verbs(files, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-P", "-m", "qcore", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    given = ["--model", files["model"], "--data", files["data"]]
    outs = [tmp_path / f"{k}.json" for k in (1, 2)]
    for k, out in enumerate(outs, 1):
        assert run("calibrate", *given, "--shard", f"{k}/2", "--out", out).returncode == 0
    assert run("merge-tables", *outs, "--out", tmp_path / "m.json").returncode == 0
    steps.calibrate(**files, out=tmp_path / "one.json")
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    twice = run("merge-tables", outs[0], outs[0], "--out", tmp_path / "n.json")
    assert twice.returncode == 1
    assert twice.stderr.startswith("error: tables share samples 0 to 19 of the split")
    assert run("calibrate", *given, "--shard", "half", "--out", tmp_path / "n.json").returncode == 2
    assert not (tmp_path / "n.json").exists()
