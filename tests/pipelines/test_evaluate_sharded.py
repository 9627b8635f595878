"""The sharded pipeline on kfp.local: a task per shard, and the report of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcore import demo, steps
from qcore.demo.make_data import write_digits

MODEL = Path(demo.__file__).parent / "digits_cnn.onnx"
RUN = """
import sys
from kfp import local
from qcore.pipelines.evaluate_sharded import evaluate_sharded
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], raise_on_error=True)
evaluate_sharded(candidate_uri=sys.argv[2], baseline_uri=sys.argv[3], data_uri=sys.argv[4], data_sha256="",
                 baseline_sha256="", shards=[1, 2, 3], count=3)
"""


def timeless(path):
    """Return the report without what no two runs measure alike."""
    value = json.loads(path.read_text())
    for part in (value, value["model"], value["baseline"]):
        for name in ("latency_ms", "latency_all_cores_ms", "cold_start_ms", "peak_memory_bytes"):
            part.pop(name, None)
    return {k: v for k, v in value.items() if k not in ("rounds", "ratios", "machine", "measured_at")}


@pytest.mark.slow
def test_the_merged_report_is_that_of_one_process(tmp_path):
    card, candidate = write_digits(tmp_path / "data"), tmp_path / "q.onnx"
    steps.compress(model=MODEL, data=card, out=candidate, recipe="int4-weights", target="x86-vnni")
    steps.evaluate(candidate=candidate, baseline=MODEL, data=card, out=tmp_path / "one.json")
    # A process of its own: kfp.local keeps settings and sys.stdout in globals.
    command = [sys.executable, "-c", RUN, str(tmp_path / "out"), str(candidate), str(MODEL), str(card)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (merged,) = (tmp_path / "out").glob("*/merge-reports/report")
    assert timeless(merged) == timeless(tmp_path / "one.json")
