"""The peer benchmark's protocol, with a peer that only copies: what it is told, what is kept, what is skipped."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import conv_net, save, write_data

from benchmarks import quantizers
from benchmarks.quantizers import Peer, Task, Variant

COPYING_PEER = """
import shutil, sys
from protocol import Job, serve
def quantize(job):
    job.only("weight_bits", 8)
    job.recovery("cle")
    feeds = list(job.feeds("x"))
    assert len(feeds) == 40 and feeds[0]["x"].shape == (1, 3, 8, 8), len(feeds)
    with open(str(job.model.with_name("calls")), "a") as f: f.write("x")
    if "cle" in job.options["recovery"]: raise ValueError("singular\\nmatrix")
    shutil.copy(job.model, job.output)
serve(quantize, "copy 1.0")
"""


@pytest.fixture
def task(tmp_path: Path) -> Task:
    net = conv_net()
    card = write_data(tmp_path / "data", net)
    runners = tmp_path / "runners"
    runners.mkdir()
    shutil.copy(quantizers.RUNNERS / "protocol.py", runners)
    (runners / "run_copy.py").write_text(COPYING_PEER)
    model = save(net, tmp_path / "net.onnx")
    peer = Peer("copy", runners / "run_copy.py", None, ())
    return Task(model, card, peer, "pc-u8", Variant("plain"), 60)


def test_a_peer_that_changes_nothing_is_measured_as_equal_to_float(task: Task, tmp_path: Path) -> None:
    row = quantizers.row(task, tmp_path / "cache")
    assert row["version"] == "copy 1.0"
    assert row["seconds"] > 0
    assert row["peak_mib"] >= row["import_mib"] > 1
    assert row["size_bytes"] == task.model.stat().st_size
    for arithmetic in ("reference", "product"):
        assert row[arithmetic]["top1"] == 1.0  # the labels are the answers of the float model
        assert row[arithmetic]["agreement"] == 1.0
        assert row[arithmetic]["delta_low"] < row[arithmetic]["delta"] == 0.0 < row[arithmetic]["delta_high"]
        assert row[arithmetic]["kl"] == pytest.approx(0, abs=1e-9)
    assert "+0.00" in quantizers.table_row(row)[2]


def test_nothing_is_made_twice_unless_something_changed(task: Task, tmp_path: Path) -> None:
    calls = task.model.with_name("calls")
    first = quantizers.row(task, tmp_path / "cache")
    assert quantizers.row(task, tmp_path / "cache") == first
    assert calls.read_text() == "x"
    quantizers.row(replace(task, config="pc-s8"), tmp_path / "cache")
    assert calls.read_text() == "xx"
    proto = onnx.load(task.model)
    proto.doc_string = "another model"
    save(proto, task.model)
    quantizers.row(task, tmp_path / "cache")
    assert calls.read_text() == "xxx"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": "pc-w4-s8"}, "weight_bits 4 is not offered, only 8"),
        ({"variant": Variant("v", recovery=("magic",))}, "recovery magic is not offered, only cle"),
        ({"variant": Variant("v", recovery=("cle",))}, "failed (exit 1): ValueError: singular matrix"),
        ({"limit_s": 0.0}, "took more than 0 s"),
    ],
)
def test_what_a_peer_cannot_do_is_a_row_with_its_name_and_the_reason(
    task: Task, tmp_path: Path, change: dict, reason: str
) -> None:
    row = quantizers.row(replace(task, **change), tmp_path / "cache")
    assert row["skipped"] == reason
    assert quantizers.table_row(row)[0].startswith("copy ")
    assert reason in quantizers.table_row(row)[0]


def test_a_peer_that_cannot_be_installed_is_skipped_by_name(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "missing.txt"
    requirements.write_text(f"{tmp_path}/no-such-package-1.0-py3-none-any.whl\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    absent = replace(task, peer=replace(task.peer, name="absent", requirements=requirements))
    row = quantizers.row(absent, tmp_path / "cache")
    assert row["peer"] == "absent"
    assert row["skipped"].startswith("cannot be installed: ")
    assert "no-such-package" in row["skipped"]
    assert not list((tmp_path / "cache").rglob(".complete"))  # it is tried again the next time


def test_a_worse_model_is_seen_as_worse() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((400, 10)).astype(np.float32)
    y = theirs.argmax(axis=1)
    ours = theirs + rng.standard_normal(theirs.shape).astype(np.float32)
    found = quantizers.compared(ours, theirs, y)
    assert found["delta"] == found["top1"] - 1 == found["agreement"] - 1
    assert found["delta_low"] < found["delta"] < found["delta_high"] < 0
    assert found["kl"] > 0.1
    assert found["output_sqnr_db"] == pytest.approx(0, abs=0.5)  # noise as strong as the signal


def test_every_shipped_peer_has_its_runner_and_exact_pins() -> None:
    for peer in quantizers.PEERS:
        assert peer.runner.is_file()
        assert len({v.name for v in peer.variants}) == len(peer.variants)
        if peer.requirements is not None:
            lines = peer.requirements.read_text().split()
            assert all(line.count("==") == 1 for line in lines), peer.name
            assert not [line for line in lines if line.startswith(("nvidia", "triton", "cuda"))]
            assert {line for line in lines if line.startswith("torch==")} <= {"torch==2.13.0"}


def test_a_job_says_everything_that_the_protocol_documents(task: Task, tmp_path: Path) -> None:
    quantizers.quantized(task, tmp_path / "cache")
    job = json.loads(next((tmp_path / "cache").rglob("job.json")).read_text())
    assert set(job) == {"model", "samples", "output", "result", "data", "options"}
    assert set(job["options"]) == {"weights", "weight_bits", "activations", "symmetric", "ranges", "recovery"}
