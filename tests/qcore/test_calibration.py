import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.calibration import calibrate, load_table, merge_tables, save_table
from qcore.canonical import canonical_json
from qcore.errors import CalibrationError

DIGESTS = {"model_sha256": "a" * 64, "data_sha256": "b" * 64}


def activations(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [
        (1, {"t": rng.standard_normal((1, 50)).astype(np.float32) * (i + 1), "u": np.ones(3, np.float32)})
        for i in range(n)
    ]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_shards_in_any_order_give_the_bytes_of_one_process(order, cut):
    data = activations(6)
    whole = calibrate(data, **DIGESTS)
    shuffled = [data[i] for i in order]
    shards = [calibrate(part, **DIGESTS) for part in (shuffled[:cut], shuffled[cut:])]
    assert canonical_json(merge_tables(shards).to_json()) == canonical_json(whole.to_json())


def test_a_table_survives_the_disk(tmp_path):
    table = calibrate(activations(3), **DIGESTS)
    save_table(table, tmp_path / "t.json")
    save_table(load_table(tmp_path / "t.json"), tmp_path / "again.json")
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert load_table(tmp_path / "t.json").samples == 3


def test_tables_of_different_models_do_not_merge():
    other = {**DIGESTS, "model_sha256": "c" * 64}
    with pytest.raises(CalibrationError, match="disagree on model_sha256"):
        merge_tables([calibrate(activations(1), **DIGESTS), calibrate(activations(1), **other)])


def test_nan_in_an_activation_is_named():
    bad = [(2, {"t": np.array([1.0, np.nan], np.float32)})]
    with pytest.raises(CalibrationError, match="activation t: tensor holds NaN or infinity in samples 0 to 1"):
        calibrate(bad, **DIGESTS)


def test_no_samples_is_refused():
    with pytest.raises(CalibrationError, match="no samples"):
        calibrate([], **DIGESTS)
    with pytest.raises(CalibrationError, match="no calibration tables"):
        merge_tables([])


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", json.dumps({"schema": "x"}).encode()])
def test_what_is_not_a_table_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match="calibration table") as e:
        load_table(path)
    assert "run `qcore calibrate`" in str(e.value)
