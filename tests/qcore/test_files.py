"""Files that are there whole or not at all, and refusals that name what the user wrote."""

import errno
from pathlib import Path

import pytest
from models import conv_net, save

from qcore.cli.main import run
from qcore.files import atomic_path, write_atomic


@pytest.mark.parametrize("verb", ["compress", "prune"])
def test_a_path_that_cannot_be_written_is_named_as_it_was_given(verb, tmp_path, capsys):
    model = save(conv_net(), tmp_path / "m.onnx")
    more = ["--recipe", "float16"] if verb == "compress" else []
    assert run([verb, "--model", str(model), "--out", "/proc/x.onnx", *more]) == 1
    problem = capsys.readouterr().err
    assert (
        problem == "error: No such file or directory /proc/x.onnx; check the path, its permissions and the free space\n"
    )


def test_missing_folders_are_made(tmp_path):
    model = save(conv_net(), tmp_path / "m.onnx")
    out = tmp_path / "a" / "b" / "q.onnx"
    assert run(["compress", "--model", str(model), "--out", str(out), "--recipe", "float16"]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["q.onnx"]


def test_errors_about_other_files_stay_theirs(tmp_path):
    out = tmp_path / "q.onnx"
    write_atomic(out, b"old")
    with pytest.raises(FileNotFoundError) as e, atomic_path(out):
        Path(tmp_path / "other").read_bytes()
    assert e.value.filename == str(tmp_path / "other")
    with pytest.raises(OSError, match=r"q\.onnx") as e, atomic_path(out) as tmp:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp))
    assert e.value.filename == str(out)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("q.onnx", b"old")]
