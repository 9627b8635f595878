"""Rules that keep the tree readable and the device light; import-linter holds the layers (see pyproject.toml)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for tree in ("qcore", "components", "pipelines") for path in (ROOT / tree).rglob("*.py"))
BANNED_NAMES = {"utils", "common", "helpers", "base", "misc"}
MODULE_LINES = 500
BODY_LINES = 60

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "mlflow", "kfp", "pydantic", "sklearn", "boto3")
DEVICE = ("qcore.device.updater", "qcore.device.__main__")


def heavy_after(code: str, cwd: Path) -> set[str]:
    """The heavy packages that a fresh interpreter holds after running `code`."""
    code = f"import sys; {code}; print(*(name for name in {HEAVY!r} if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


@pytest.mark.parametrize("module", ["qcore", "qcore.steps", *DEVICE])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    loaded = heavy_after(f"import {module}", tmp_path)
    if module in DEVICE:
        loaded -= {"boto3"}  # securesystemslib tries it for its AWS signer; no device has it, see the next test
    assert loaded == set()


@pytest.mark.parametrize("module", DEVICE)
def test_the_device_needs_none_of_the_heavy_packages(module: str, tmp_path: Path) -> None:
    not_installed = f"sys.modules.update(dict.fromkeys({HEAVY!r}))"  # None: an import of it raises ImportError
    assert heavy_after(f"{not_installed}; import {module}", tmp_path) == set()


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(p.relative_to(ROOT)) for p in MODULES if {p.stem, p.parent.name} & BANNED_NAMES] == []


def test_modules_and_functions_are_short() -> None:
    too_long = []
    for path in MODULES:
        text = path.read_text()
        name = path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MODULE_LINES:
            too_long.append(f"{name}: {lines} lines, at most {MODULE_LINES}")
        too_long += [
            f"{name}:{f.lineno} {f.name}: body of {body_lines(f)} lines, at most {BODY_LINES}"
            for f in functions(ast.parse(text))
            if body_lines(f) > BODY_LINES
        ]
    assert too_long == []
