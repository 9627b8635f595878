"""One run of the pipeline `release` by `kfp.local`, in a process of its own; `local.py` starts it.

A process, because kfp.local keeps its settings, `print`, `sys.stdout` and the root logger's handlers in globals: here
nobody else uses them. Reads `request.json` of the run's folder, writes `result.json`; the exit status is 0 if the
pipeline succeeded and every declared output is there (kfp's own word is not enough).
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import local

from qcore.canonical import Json
from qcore.errors import QcoreError
from qcore.files import write_json
from qcore.pipelines.compile import SOURCES
from qcore.pipelines.release import release

NO_FILE = frozenset({"system.Metrics", "system.ClassificationMetrics", "system.SlicedClassificationMetrics"})
"""Types whose content kfp.local keeps in `executor_output.json`."""


def use_own_python(folder: Path) -> None:
    """Make `python3` in this process's PATH this interpreter, and let kfp call it so.

    kfp.local replaces the text `python3` by the interpreter's path in every argument, values and paths included, and
    a path with a blank breaks its shell line. With this it replaces `python3` by `python3`.
    """
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sys.executable = "python3"


def collect(root: Path) -> dict[str, dict[str, Json]]:
    """Return the declared outputs by task, from the one run below `root`: paths of artifacts, values of parameters.

    Raises:
        QcoreError: a task that ran lacks a declared output.
    """
    found: dict[str, dict[str, Json]] = {}
    for folder in root.glob("*/*/"):
        component = SOURCES.get(f"components/{folder.name.replace('-', '_')}/component.yaml")
        if component is not None and (folder / "executor_output.json").is_file():
            found[folder.name] = _outputs(component, folder)
    return found


def _outputs(component: Any, folder: Path) -> dict[str, Json]:
    said = json.loads((folder / "executor_output.json").read_bytes())
    values = said.get("parameterValues", {})
    result: dict[str, Json] = {}
    for name, spec in (component.component_spec.outputs or {}).items():
        is_file = "@" in spec.type
        if is_file and spec.type.split("@")[0] in NO_FILE:
            continue
        if name not in values and not (is_file and (folder / name).exists()):
            raise QcoreError(f"task {folder.name}: declared output {name} is missing in {folder}; see the log")
        result[name] = str(folder / name) if is_file else values[name]
    return result


def run(folder: Path) -> None:
    """Run the request in `folder` and write the result beside it.

    Raises:
        RuntimeError: a task failed (kfp's exception; the task's own error is in its journal and in the log).
        QcoreError: a declared output is missing.
    """
    request = json.loads((folder / "request.json").read_bytes())
    root = folder / "kfp"
    with tempfile.TemporaryDirectory(prefix="qcore-bin-") as programs:
        use_own_python(Path(programs))
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
        release(**request)
    write_json(folder / "result.json", collect(root))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
