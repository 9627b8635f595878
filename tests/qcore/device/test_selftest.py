"""The self-test command: the golden answers decide, and a bad model is a verdict, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulators import CPU, package_source, run_python, tiny_model, write_golden

from qcore.canonical import Json, sha256_bytes
from qcore.release.package import build_package, unpack_package
from qcore.runtime.selftest import main


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    package = build_package(package_source(tmp_path / "src"), tmp_path / "p.qpkg")
    unpack_package(package.path, tmp_path / "slot")
    return tmp_path / "slot"


def answer(slot: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main([str(slot)])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    value: dict[str, object] = json.loads(out)
    return code, value


def save_golden(slot: Path, arrays: dict[str, Any]) -> None:
    np.savez(slot / "golden.npz", **arrays)


def set_manifest(slot: Path, change: Callable[[Json], object]) -> None:
    value = json.loads((slot / "manifest.json").read_bytes())
    change(value)
    (slot / "manifest.json").write_text(json.dumps(value))


def set_model(slot: Path, model: bytes) -> None:
    """Put other bytes in the slot, and a manifest that vouches for them."""
    (slot / "model.onnx").write_bytes(model)

    def vouch(manifest: Json) -> None:
        for member in manifest["members"]:
            if member["path"] == "model.onnx":
                member["sha256"] = sha256_bytes(model)

    set_manifest(slot, vouch)


def test_a_good_model_passes_as_a_process(slot: Path) -> None:
    done = run_python(["-m", "qcore.runtime.selftest", str(slot)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {
        "ok": True,
        "provider": CPU,
        "n": 5,
        "max_abs_error": 0.0,
        "argmax_agreement": 1.0,
    }


@pytest.mark.parametrize("model", [b"", b"not onnx", tiny_model(0)[:-10]], ids=["empty", "text", "cut"])
def test_bytes_that_are_no_model_are_a_verdict(slot: Path, model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    set_model(slot, model)
    code, value = answer(slot, capsys)
    assert (code, value["ok"]) == (1, False)


def test_changed_model_bytes_are_refused_before_they_are_loaded(slot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slot / "model.onnx").write_bytes(tiny_model(1))
    code, value = answer(slot, capsys)
    assert code == 1
    assert "not the one of the manifest" in str(value["error"])


def test_other_weights_miss_the_golden_answers(slot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_model(slot, tiny_model(1))
    code, value = answer(slot, capsys)
    assert code == 1
    assert "golden samples: error" in str(value["error"])


@pytest.mark.parametrize(("shift", "allowed", "code"), [(0.01, 0.02, 0), (0.03, 0.02, 1)])
def test_the_manifest_decides_how_much_error_is_allowed(
    slot: Path, capsys: pytest.CaptureFixture[str], shift: float, allowed: float, code: int
) -> None:
    write_golden(slot / "golden.npz", tiny_model(0), error=shift)
    set_manifest(slot, lambda v: v["golden"]["tolerances"][0].update(max_abs_error=allowed))
    assert answer(slot, capsys)[0] == code


def test_the_limits_are_those_of_the_first_provider_that_is_here(
    slot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_golden(slot / "golden.npz", tiny_model(0), error=0.01)

    def loose_elsewhere(manifest: Json) -> None:
        tight = manifest["golden"]["tolerances"][0]
        manifest["golden"]["tolerances"] = [{**tight, "provider": "QNNExecutionProvider", "max_abs_error": 1.0}, tight]
        manifest["compat"]["providers"] = ["QNNExecutionProvider", CPU]

    set_manifest(slot, loose_elsewhere)
    code, value = answer(slot, capsys)
    assert code == 1
    assert "error 0.01 (allowed 0.0001)" in str(value["error"])


def test_outputs_that_are_not_finite_are_refused(slot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = dict(np.load(slot / "golden.npz"))
    golden["input:x"][:] = np.inf
    save_golden(slot, golden)
    code, value = answer(slot, capsys)
    assert code == 1
    assert "not finite" in str(value["error"])


def test_pickled_golden_samples_are_never_loaded(slot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_golden(slot, {"input:x": np.array([{"a": 1}], dtype=object)})
    assert answer(slot, capsys)[0] == 1


def test_golden_samples_without_answers_or_with_fewer_are_refused(
    slot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = dict(np.load(slot / "golden.npz"))
    save_golden(slot, {"input:x": golden["input:x"]})
    assert answer(slot, capsys)[0] == 1
    save_golden(slot, {k: v[:2] for k, v in golden.items()})
    assert answer(slot, capsys)[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["compat"]["onnxruntime"].update(minimum="99.0"), "is older than 99.0"),
        (lambda v: v["compat"]["onnxruntime"].update(below="1.2"), "is not below 1.2"),
        (lambda v: v["compat"].update(providers=["NoSuchProvider"]), "none of the providers"),
    ],
)
def test_a_machine_that_cannot_try_it_says_so(
    slot: Path,
    change: Callable[[Json], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_manifest(slot, change)
    code, value = answer(slot, capsys)
    assert code == 2
    assert message in str(value["error"])


def test_a_missing_slot_and_a_missing_argument_are_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert main([]) == 2
    assert capsys.readouterr().out.count("\n") == 2
