"""Samples read in any order are those that `batches` gives in theirs."""

import numpy as np
import pytest
from PIL import Image

from qcore.data.dataset import batches, open_dataset
from qcore.data.samples import open_samples
from qcore.errors import DataError

CARD = """\
name: d
path: d.npz
layout: NHWC
model_layout: NCHW
preprocess:
  - {normalize: {mean: [1, 2], std: [2, 4]}}
splits:
  seed: 3
  some: {count: 9}
  all: {}
"""


def npz(folder, compressed):
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 2)).astype(np.uint8)
    (np.savez_compressed if compressed else np.savez)(folder / "d.npz", x=x, y=np.arange(20) % 4)
    (folder / "d.yaml").write_text(CARD)
    return folder / "d.yaml"


def shards(folder):
    x, y = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 3
    (folder / "shards").mkdir()
    for k, (a, b) in enumerate([(0, 5), (5, 5), (5, 6), (6, 12)]):  # one is empty
        np.savez(folder / "shards" / f"{k}.npz", x=x[a:b], y=y[a:b])
    (folder / "d.yaml").write_text("name: d\npath: shards\nsplits:\n  some: {indices: [0, 4, 5, 6, 11]}\n  all: {}\n")
    return folder / "d.yaml"


def inputs(folder):
    ids, mask = np.arange(30).reshape(10, 3), np.arange(10, dtype=np.float32)
    np.savez(folder / "d.npz", a=ids, b=mask)
    card = "name: d\ntask: none\npath: d.npz\ninputs: {ids: a, mask: b}\nsplits:\n  some: {range: [2, 9]}\n  all: {}\n"
    (folder / "d.yaml").write_text(card)
    return folder / "d.yaml"


def photos(folder):
    rng = np.random.default_rng(1)
    for kind in ("cat", "dog"):
        (folder / "p" / kind).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)).save(folder / "p" / kind / f"{k}.png")
    card = "name: d\nformat: image_folder\npath: p\nlayout: NCHW\npreprocess:\n  - {resize: 5}\n"
    (folder / "d.yaml").write_text(card + "splits:\n  some: {range: [1, 7]}\n  all: {}\n")
    return folder / "d.yaml"


MADE = {
    "npz": lambda f: npz(f, False),
    "compressed": lambda f: npz(f, True),
    "shards": shards,
    "inputs": inputs,
    "photos": photos,
}


@pytest.mark.parametrize("split", ["some", "all"])
@pytest.mark.parametrize("kind", MADE)
def test_any_order_gives_the_samples_of_batches(kind, split, tmp_path):
    data = open_dataset(MADE[kind](tmp_path), split)
    (tmp_path / "unpacked").mkdir()
    samples = open_samples(data, tmp_path / "unpacked")
    (whole,) = batches(data, data.n)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(data.n)[: data.n - seed]
        read = samples.read(order)
        assert np.array_equal(read.index, whole.index[order])
        assert read.x.keys() == whole.x.keys()
        for name in whole.x:
            assert read.x[name].dtype == whole.x[name].dtype
            assert np.array_equal(read.x[name], whole.x[name][order])
        assert (read.y is None) == (whole.y is None)
        assert read.y is None or np.array_equal(read.y, whole.y[order])


def test_a_sample_that_is_not_finite_is_named(tmp_path):
    x = np.zeros((6, 2), np.float32)
    x[4, 1] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(6, int))
    (tmp_path / "d.yaml").write_text("name: d\npath: d.npz\nsplits:\n  all: {}\n")
    (tmp_path / "unpacked").mkdir()
    samples = open_samples(open_dataset(tmp_path / "d.yaml", "all"), tmp_path / "unpacked")
    assert samples.read(np.array([5, 3])).y.tolist() == [0, 0]
    with pytest.raises(DataError, match="sample 4 of d"):
        samples.read(np.array([1, 4]))
