import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.calibration import (
    CalibrationOptions,
    Shard,
    calibrate,
    check_table,
    load_table,
    merge_tables,
    missing_positions,
    save_table,
    shard_of,
)
from qcore.canonical import canonical_json
from qcore.errors import CalibrationError

DIGESTS = {"model_sha256": "a" * 64, "data_sha256": "b" * 64}


def activations(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [
        (1, {"t": rng.standard_normal((1, 50)).astype(np.float32) * (i + 1), "u": np.ones(3, np.float32)})
        for i in range(n)
    ]


def part(data, start, stop, **options):
    shard = Shard(size=len(data), start=start, stop=stop)
    return calibrate(data[start:stop], **DIGESTS, shard=shard, options=CalibrationOptions(**options))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 8)), st.randoms(), st.sampled_from([0.0, 0.5, 0.99]))
def test_shards_in_any_order_and_grouping_give_the_bytes_of_one_process(cuts, random, decay):
    data = activations(9)
    whole = part(data, 0, 9, decay=decay)
    ends = [0, *sorted(cuts), 9]
    tables = [part(data, a, b, decay=decay) for a, b in pairwise(ends)]
    while len(tables) > 1:
        group = [tables.pop(random.randrange(len(tables))) for _ in range(random.randint(2, len(tables)))]
        tables.append(merge_tables(group))
    assert canonical_json(tables[0].to_json()) == canonical_json(whole.to_json())


@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 9))
def test_shards_cover_a_split_once_and_never_tear_a_batch(size, count, batch):
    groups = -(-size // batch)
    if count > groups:
        with pytest.raises(CalibrationError, match=f"at most {groups} shards"):
            [shard_of(size, k + 1, count, batch=batch) for k in range(count)]
        return
    shards = [shard_of(size, k + 1, count, batch=batch) for k in range(count)]
    assert [s.start for s in shards] == [0, *(s.stop for s in shards[:-1])]
    assert shards[-1].stop == size
    assert all(s.start % batch == 0 for s in shards)


def test_batches_are_told_apart_along_axis_0():
    single = activations(4)
    rows = np.concatenate([tensors["t"] for _, tensors in single])
    one = calibrate([(4, {"t": rows})], **DIGESTS)
    four = calibrate([(1, {"t": t["t"]}) for _, t in single], **DIGESTS)
    assert canonical_json(one.to_json()) == canonical_json(four.to_json())


def test_tensors_of_a_batch_may_come_in_pieces():
    data = activations(3)
    pieces = [piece for n, t in data for piece in ((n, {"t": t["t"]}), (0, {"u": t["u"]}))]
    assert canonical_json(calibrate(pieces, **DIGESTS).to_json()) == canonical_json(
        calibrate(data, **DIGESTS).to_json()
    )


def test_empty_tensors_count_nothing():
    data = [(1, {"t": np.zeros((1, 0), np.float32)}), (1, {"t": np.ones((1, 2), np.float32)})]
    assert calibrate(data, **DIGESTS).stats["t"].count == 2


def test_a_sample_is_counted_once():
    data = activations(4)
    with pytest.raises(CalibrationError, match="tables share samples 1 to 2 of the split"):
        merge_tables([part(data, 0, 3), part(data, 1, 4)])


def test_a_split_of_few_samples_counts_more_values_of_each():
    def counted(samples, values):
        x = np.random.default_rng(0).standard_normal((1, 1 << 16)).astype(np.float32)
        table = calibrate([(1, {"t": x})] * samples, **DIGESTS, options=CalibrationOptions(values=values))
        return table.stats["t"].count / samples

    assert counted(2, 1 << 18) == 1 << 16
    assert 3500 <= counted(16, 1 << 16) <= 1 << 13
    assert 1 << 10 <= counted(16, 1) <= 1 << 11  # but not less than this


def test_an_incomplete_table_says_what_is_missing():
    data = activations(9)
    table = merge_tables([part(data, 6, 8), part(data, 1, 3)])
    assert missing_positions(table) == ((0, 1), (3, 6), (8, 9))
    with pytest.raises(CalibrationError, match="holds 4 of 9 samples; missing: 0, 3 to 5, 8; run `qcore merge-tables`"):
        check_table(table, model_sha256="a" * 64, name="m.onnx")
    check_table(part(data, 0, 9), model_sha256="a" * 64, name="m.onnx")
    with pytest.raises(CalibrationError, match=r"is of model aaaaaaaaaaaa, but m\.onnx is bbbbbbbbbbbb"):
        check_table(part(data, 0, 9), model_sha256="b" * 64, name="m.onnx")


@pytest.mark.parametrize("other", [{"bins": 64}, {"decay": 0.5}, {"tensors": ("t*",)}, {"batch": 2}])
def test_tables_with_other_options_do_not_merge(other):
    data = activations(2)
    one, two = part(data, 0, 1), part(data, 1, 2, **other)
    assert one.key != two.key
    with pytest.raises(CalibrationError, match="disagree on options"):
        merge_tables([one, two])


@pytest.mark.parametrize(("options", "says"), [({"bins": 1}, "bins is 1"), ({"decay": 1.0}, "decay is 1.0")])
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(CalibrationError, match=says):
        CalibrationOptions(**options)


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
    with pytest.raises(CalibrationError, match="activation t: tensor holds NaN or infinity in samples 0 to 1 of"):
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
