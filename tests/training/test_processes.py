"""Whole runs in processes of their own: equal bytes, killed and taken up again, and shared by two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from learning import small_net, write_blobs
from models import save
from quantizing import constants

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

RECIPE = """\
name: test
steps:
  - {method: finetune, epochs: 2, batch: 32, learning_rate: 0.02, teacher_weight: 0.5}
  - {method: quantize}
  - {method: qat, epochs: 6, batch: 32, learning_rate: 0.02, ema: 0.5, augment: {pad_crop: 1, flip: true}}
"""


def command(folder: Path, out: str) -> list[str]:
    """Return the arguments that make `out` of the files in `folder`, which are written where they are missing."""
    if not (folder / "m.onnx").exists():
        save(small_net(channels=8), folder / "m.onnx")
        write_blobs(folder / "data")
        (folder / "r.yaml").write_text(RECIPE)
    made = ["--model", "m.onnx", "--data", "data", "--recipe", "r.yaml", "--target", "npu-int8-symmetric"]
    return ["-m", "qcore", "compress", *made, "--device", "cpu", "--out", out, "--json"]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "2"}  # the number of threads decides the order of sums
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-P", *arguments], cwd=folder, text=True, env=env, **pipes)


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"m.onnx", "data", "r.yaml"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The folder of a run that nobody disturbed, what it printed, and what it said on the way."""
    folder = tmp_path_factory.mktemp("whole")
    out, err = finished(started(folder, *command(folder, "a.onnx")))
    return folder, json.loads(out), err


def numbers(summary: dict, position: int) -> list[tuple]:
    fields = ("number", "loss", "validation", "accuracy")
    return [tuple(e[k] for k in fields) for e in summary["steps"][position]["epochs"]]


def test_the_same_run_gives_the_same_bytes(whole: tuple[Path, dict, str]) -> None:
    folder, first, said = whole
    out, _ = finished(started(folder, *command(folder, "b.onnx")))
    second = json.loads(out)
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    assert all(numbers(first, k) == numbers(second, k) for k in (0, 2))
    assert [s["best"] for s in first["steps"]][0::2] != [0, 0]
    assert first["steps"][2]["samples"] == 160
    assert "before training: validation loss" in said
    assert "epoch 6: loss" in said
    assert "qat: training 30/30" in said


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(whole: tuple[Path, dict, str], tmp_path: Path) -> None:
    process = started(tmp_path, *command(tmp_path, "a.onnx"))
    checkpoint = tmp_path / "a.onnx.2.checkpoint"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    kept = {p.name for p in tmp_path.glob("*.checkpoint")}
    assert kept == {"a.onnx.0.checkpoint", "a.onnx.2.checkpoint"}
    assert not (tmp_path / "a.onnx").exists()
    done = {k: torch.load(tmp_path / f"a.onnx.{k}.checkpoint", weights_only=True)["state"]["epochs"] for k in (0, 2)}
    assert len(done[0]) == 3
    assert 2 <= len(done[2]) < 7
    out, err = finished(started(tmp_path, *command(tmp_path, "a.onnx")))
    folder, undisturbed, _ = whole
    again = json.loads(out)
    assert (tmp_path / "a.onnx").read_bytes() == (folder / "a.onnx").read_bytes()
    for k in (0, 2):
        assert again["steps"][k]["epochs"][: len(done[k])] == done[k]  # their seconds too: they are not run again
        assert numbers(again, k) == numbers(undisturbed, k)
    assert "finetune: training" not in err
    assert f"qat: training {5 * (len(done[2]) - 1)}/30" not in err
    assert {name for name in files(tmp_path) if not name.endswith(".tmp")} == {"a.onnx"}


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    arguments = command(tmp_path, "a.onnx")
    (tmp_path / "a.onnx.0.checkpoint").write_bytes(b"PK\x03\x04 something else")
    out, err = finished(started(tmp_path, *arguments), code=1)
    says = json.loads(out)["error"]
    assert "a.onnx.0.checkpoint is not a checkpoint of qcore" in says
    assert says.endswith("delete it and start again")
    assert err.splitlines()[-1] == f"error: {says}"
    assert not (tmp_path / "a.onnx").exists()


def test_the_state_of_another_recipe_is_not_taken_up(whole: tuple[Path, dict, str], tmp_path: Path) -> None:
    arguments = command(tmp_path, "a.onnx")
    torch.save({"key": "of another run", "state": {}}, tmp_path / "a.onnx.0.checkpoint")
    finished(started(tmp_path, *arguments))
    assert (tmp_path / "a.onnx").read_bytes() == (whole[0] / "a.onnx").read_bytes()
    assert files(tmp_path) == {"a.onnx"}


PLAIN = """\
name: test
steps:
  - {method: finetune, epochs: 2, batch: 31, learning_rate: 0.1, teacher_weight: 0.5, augment: {pad_crop: 1},
     batch_norms: NORMS}
"""


def together(folder: Path, processes: int, *arguments: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return started(folder, *torchrun, *arguments)


@pytest.mark.parametrize("batch_norms", ["false", "true"])
def test_two_processes_do_what_one_does(batch_norms: str, tmp_path: Path) -> None:
    command(tmp_path, "")
    (tmp_path / "r.yaml").write_text(PLAIN.replace("NORMS", batch_norms))
    alone = json.loads(finished(started(tmp_path, *command(tmp_path, "one.onnx")))[0])
    out, err = finished(together(tmp_path, 2, *command(tmp_path, "two.onnx")))
    shared = json.loads(out)  # one object: only one of them speaks
    assert err.count("epoch 1:") == 1
    assert files(tmp_path) == {"one.onnx", "two.onnx"}
    for ours, theirs in zip(numbers(shared, 0), numbers(alone, 0), strict=True):
        assert [v or 0 for v in ours] == pytest.approx([v or 0 for v in theirs], rel=1e-4)
    a, b = (constants(onnx.load(tmp_path / f"{name}.onnx")) for name in ("one", "two"))
    before = constants(onnx.load(tmp_path / "m.onnx"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-4)  # float sums in another order, through 12 steps of Adam
        assert np.abs(a[name] - before[name]).max() > 1e-2
    assert "destroy_process_group" not in err  # torch warns of a group that was left behind


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_killed(whole: tuple[Path, dict, str], tmp_path: Path) -> None:
    arguments = command(tmp_path, "a.onnx")
    first = json.loads(finished(together(tmp_path, 2, *command(tmp_path, "b.onnx")))[0])
    process = together(tmp_path, 2, *arguments)
    while not (tmp_path / "a.onnx.2.checkpoint").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in [process.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    again = json.loads(finished(together(tmp_path, 2, *arguments))[0])
    assert numbers(again, 2) == numbers(first, 2)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_process_without_the_others_says_so(tmp_path: Path) -> None:
    arguments = command(tmp_path, "a.onnx")
    env = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    env.pop("MASTER_ADDR", None)
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "WORLD_SIZE is 2, but MASTER_ADDR is not set; start all processes with torchrun" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    arguments = ["cuda" if a == "cpu" else a for a in command(tmp_path, "a.onnx")]
    _, err = finished(started(tmp_path, *arguments), code=1)
    assert "device is cuda, but torch sees no CUDA device here; allowed here: cpu, auto" in err
