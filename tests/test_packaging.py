"""The wheel holds the three source trees under the one name `qcore`, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {"qcore": "qcore", "components": "qcore/components", "pipelines": "qcore/pipelines"}
"""Folder in the repository -> folder in the wheel."""


def source_files() -> dict[str, Path]:
    """Every file of the three trees by its path in the wheel."""
    return {
        f"{target}/{path.relative_to(ROOT / tree).as_posix()}": path
        for tree, target in TREES.items()
        for path in (ROOT / tree).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing is written into the repository."""
    tmp = tmp_path_factory.mktemp("wheel")
    for tree in TREES:
        shutil.copytree(ROOT / tree, tmp / "src" / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp / "src")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp), str(tmp / "src")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = tmp.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_package_list_is_what_is_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {PurePosixPath(name).parent for name in source_files()}  # folders of data too: unlisted ones are left out
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in on_disk)


def test_every_folder_with_a_module_is_a_package() -> None:
    names = source_files()
    folders = {PurePosixPath(name).parent for name in names if name.endswith(".py")}
    assert [str(f) for f in sorted(folders) if f"{f}/__init__.py" not in names] == []


def test_the_wheel_holds_qcore_and_its_metadata_only(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qcore"}


def test_every_file_in_the_wheel_has_a_source_twin_and_the_reverse(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.startswith("qcore/")}
    expected = source_files()
    assert packed == set(expected)
    assert {name for name in packed if wheel.read(name) != expected[name].read_bytes()} == set()


def test_the_wheel_holds_types_data_and_the_demo_model(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "qcore/py.typed" in names
    assert "qcore/demo/digits_cnn.onnx" in names
    assert any(name.endswith(".yaml") for name in names)


def test_both_commands_are_there_and_name_modules_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {"qcore", "qcore-device"}
    modules = {target.split(":")[0].replace(".", "/") + ".py" for target in scripts.values()}
    assert modules <= set(wheel.namelist())
