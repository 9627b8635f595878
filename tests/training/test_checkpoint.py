"""A state that was written is the state that is read, and nothing else is taken for one."""

import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.errors import ConfigError  # noqa: E402
from qcore.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

STATE = {"w": torch.arange(6.0).reshape(2, 3), "best": 2, "epochs": [{"loss": None, "validation": 0.25}]}


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert load_checkpoint(path, "k") is None
    save_checkpoint(path, "k", STATE)
    found = load_checkpoint(path, "k")
    assert found is not None
    assert torch.equal(found["w"], STATE["w"])
    assert {k: v for k, v in found.items() if k != "w"} == {k: v for k, v in STATE.items() if k != "w"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_that_of_another_run_is_not_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", "k", STATE)
    assert load_checkpoint(tmp_path / "c", "other") is None


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("/tmp/qcore-test-was-executed"),)


def damaged(kind: str, path: Path) -> bytes:
    save_checkpoint(path, "k", STATE)
    whole = path.read_bytes()
    return {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "other": pickle.dumps({"key": "k", "state": Evil()}, protocol=2),
        "middle": whole[:200] + bytes(b ^ 255 for b in whole[200:400]) + whole[400:],
    }[kind]


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "other", "middle"])
def test_a_damaged_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(damaged(kind, path))
    with pytest.raises(ConfigError, match=r"is not a checkpoint of qcore .*; delete it and start again") as e:
        load_checkpoint(path, "k")
    assert "\n" not in str(e.value)
    assert not Path("/tmp/qcore-test-was-executed").exists()


def test_another_object_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "c")
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "c", "k")
