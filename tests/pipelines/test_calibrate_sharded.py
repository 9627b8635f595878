"""The sharded pipeline on kfp.local: a task per shard, and the table of one process."""

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
from qcore.pipelines.calibrate_sharded import calibrate_sharded
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], raise_on_error=True)
calibrate_sharded(model_uri=sys.argv[2], data_uri=sys.argv[3], data_sha256="", shards=[1, 2, 3], count=3)
"""


@pytest.mark.slow
def test_the_merged_table_is_that_of_one_process(tmp_path):
    card = write_digits(tmp_path / "data")
    steps.calibrate(model=MODEL, data=card, out=tmp_path / "one.json")
    # A process of its own: kfp.local keeps settings and sys.stdout in globals.
    command = [sys.executable, "-c", RUN, str(tmp_path / "out"), str(MODEL), str(card)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (merged,) = (tmp_path / "out").glob("*/merge-tables/table")
    assert merged.read_bytes() == (tmp_path / "one.json").read_bytes()
    assert len(list((tmp_path / "out").glob("*/for-loop-1-iteration-*/calibrate/table"))) == 3
