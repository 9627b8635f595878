import numpy as np
import pytest
from PIL import Image

from qcore.data.dataset import batches, open_dataset, shared_samples
from qcore.errors import ConfigError, DataError

CARD = """\
name: d
path: d.npz
layout: NHWC
model_layout: NCHW
preprocess:
  - {normalize: {mean: [1, 2], std: [2, 4]}}
splits:
  seed: 3
  calibration: {count: 5}
  half: {fraction: 0.4}
  evaluation: {rest: true}
  some: {indices: [7, 2]}
  part: {range: [3, 6]}
  all: {}
"""


def write(folder, card=CARD, *, x=None, y=None, compressed=False):
    x = np.arange(20 * 3 * 3 * 2, dtype=np.uint8).reshape(20, 3, 3, 2) if x is None else x
    y = np.arange(20) % 4 if y is None else y
    (np.savez_compressed if compressed else np.savez)(folder / "d.npz", x=x, y=y)
    (folder / "d.yaml").write_text(card)
    return folder / "d.yaml"


def everything(dataset, size):
    parts = list(batches(dataset, size))
    return (
        np.concatenate([p.index for p in parts]),
        np.concatenate([p.x[""] for p in parts]),
        np.concatenate([p.y for p in parts]),
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_samples_are_the_chosen_rows_prepared_for_the_model(tmp_path, size, compressed):
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 3, 2)).astype(np.uint8)
    dataset = open_dataset(write(tmp_path, x=x, compressed=compressed), "part")
    index, got, y = everything(dataset, size)
    assert index.tolist() == [3, 4, 5]
    want = ((x[3:6].astype(np.float32) - [1, 2]) / [2, 4]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == np.float32
    assert y.tolist() == [3, 0, 1]


def test_seeded_splits_are_disjoint_complete_and_repeatable(tmp_path):
    card = write(tmp_path)
    sets = {name: set(open_dataset(card, name).indices) for name in ("calibration", "half", "evaluation")}
    assert [len(s) for s in sets.values()] == [5, 8, 7]
    assert set.union(*sets.values()) == set(range(20))
    assert sum(map(len, sets.values())) == 20
    assert open_dataset(card, "half").indices == open_dataset(card, "half").indices
    assert open_dataset(card, "some").indices == (2, 7)
    assert open_dataset(card, "all").n == 20


def test_the_digest_follows_the_samples_and_the_preprocessing(tmp_path):
    card = write(tmp_path)
    first = open_dataset(card, "part").sha256
    assert open_dataset(card, "part").sha256 == first
    assert open_dataset(card, "all").sha256 != first
    card.write_text(CARD.replace("mean: [1, 2]", "mean: [1, 3]"))
    assert open_dataset(card, "part").sha256 != first
    x = np.zeros((20, 3, 3, 2), np.uint8)
    assert open_dataset(write(tmp_path, x=x), "part").sha256 != first


def test_shards_are_read_as_one(tmp_path):
    x, y = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 3
    shards = tmp_path / "shards"
    shards.mkdir()
    for k, (a, b) in enumerate([(0, 5), (5, 6), (6, 12)]):
        np.savez(shards / f"{k}.npz", x=x[a:b], y=y[a:b])
    (tmp_path / "d.yaml").write_text("name: d\npath: shards\nsplits:\n  a: {indices: [0, 4, 5, 6, 11]}\n")
    index, got, labels = everything(open_dataset(tmp_path / "d.yaml", "a"), 2)
    assert index.tolist() == [0, 4, 5, 6, 11]
    assert np.array_equal(got, x[[0, 4, 5, 6, 11]])
    assert labels.tolist() == [0, 1, 2, 0, 2]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c: c.replace("path: d.npz", "path: e.npz"), DataError, "does not exist"),
        (lambda c: c.replace("model_layout", "model_layuot"), ConfigError, "did you mean 'model_layout'"),
        (lambda c: c.replace("normalize:", "normalise:"), ConfigError, "did you mean 'normalize'"),
        (lambda c: c.replace("layout: NHWC\n", "layout: NC\n"), DataError, "layout NC wants 1"),
        (lambda c: c.replace("mean: [1, 2]", "mean: [1, 2, 3]"), DataError, "3 values; the samples have 2 channels"),
        (lambda c: c.replace("range: [3, 6]", "range: [3, 60]"), DataError, r"allowed: within \[0, 20\]"),
        (lambda c: c.replace("part:", "other:"), DataError, "no split 'part'; allowed: calibration"),
        (lambda c: c + "x: pixels\n", DataError, "no array 'pixels'; it holds: x, y"),
        (lambda c: c.replace("- {norm", "- {resize: 4}\n  - {norm"), DataError, "'resize' works on image folders"),
        (lambda c: c + "  bad: [\n", ConfigError, "not YAML at line"),
        (lambda c: "just text", ConfigError, "holds str; allowed: a mapping"),
        (lambda c: c.replace("name: d\n", ""), ConfigError, "field 'name' is missing"),
    ],
)
def test_a_wrong_card_is_refused_in_one_line(tmp_path, change, error, says):
    card = write(tmp_path, change(CARD))
    with pytest.raises(error, match=says) as e:
        everything(open_dataset(card, "part"), 4)
    assert "\n" not in str(e.value)


def test_a_split_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="'calibration' wants 50 samples; 20 of 20 are left"):
        open_dataset(write(tmp_path, CARD.replace("count: 5", "count: 50")), "calibration")


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.full((20, 3, 3, 2), np.nan, np.float32), None, "sample 3 of d .* holds NaN"),
        (np.zeros((19, 3, 3, 2), np.uint8), None, r"labels 'y' in d.npz have shape \(20, 1\); allowed: \(19,\)"),
        (None, np.linspace(0, 1, 20), "allowed: integer class numbers"),
        (np.array([object()] * 20), None, "Python objects"),
        (np.ones((20, 3, 3, 2), np.complex64), None, "of dtype complex64; allowed: real numbers"),
        (np.array(["a"] * 20), None, "of dtype <U1"),
        (None, np.full(20, 2**63, np.uint64), "exceed"),
        (None, np.array([object()] * 20), "Python objects"),
        (np.asfortranarray(np.zeros((20, 3, 3, 2), np.float32)), None, "column-major"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, x, y, says):
    card = write(tmp_path, x=x, y=y)
    with pytest.raises(DataError, match=says):
        everything(open_dataset(card, "part"), 4)


def test_a_file_that_is_not_npz_is_refused(tmp_path):
    card = write(tmp_path)
    (tmp_path / "d.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is not an"):
        open_dataset(card, "part")


def test_a_flipped_byte_behind_the_split_is_seen(tmp_path):
    card = write(tmp_path)
    data = bytearray((tmp_path / "d.npz").read_bytes())
    at = data.index(b"x.npy") + 400  # inside the stored rows, behind the first
    data[at] ^= 1
    (tmp_path / "d.npz").write_bytes(data)
    card.write_text(CARD + "  first: {range: [0, 1]}\n")
    with pytest.raises(DataError, match="is damaged"):
        list(batches(open_dataset(card, "first"), 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\nsplits: {}\n", "field 'name' is there twice"),
        ("name: &n a\ntask: *n\nsplits: {}\n", "aliases are not allowed"),
        ("[" * 5000, "nested too deeply|not YAML"),
        (CARD.replace("std: [2, 4]", "std: [2, 0]"), "std holds 0"),
        (CARD.replace("- {norm", "- {scale: .nan}\n  - {norm"), "finite"),
        (CARD.replace("seed: 3", "seed: -1"), "seed"),
    ],
)
def test_cards_that_mean_something_else_than_they_show_are_refused(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        open_dataset(write(tmp_path, text), "part")


def test_a_truncated_file_is_refused(tmp_path):
    card = write(tmp_path)
    data = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="is not an"):
        open_dataset(card, "part")


IMAGES = """\
name: pics
format: image_folder
path: pics
classes: classes.txt
layout: NCHW
preprocess:
  - {resize_shorter: 8}
  - {center_crop: 6}
  - {normalize: {mean: 128, std: 128}}
splits:
  all: {}
"""


def write_images(folder):
    for name, level in (("cat", 10), ("dog", 200)):
        (folder / "pics" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (16, 12 + k), (level, level, 0)).save(folder / "pics" / name / f"{k}.png")
    (folder / "classes.txt").write_text("dog a dog\nowl an owl\ncat a cat\n")
    (folder / "pics.yaml").write_text(IMAGES)
    return folder / "pics.yaml"


def test_image_folders_give_prepared_pixels_and_class_indices(tmp_path):
    index, x, y = everything(open_dataset(write_images(tmp_path), "all"), 3)
    assert x.shape == (4, 3, 6, 6)
    assert y.tolist() == [2, 2, 0, 0]
    assert index.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(x[0, 0], (10 - 128) / 128, rtol=1e-6)
    np.testing.assert_allclose(x[2, 2], -1.0)


def test_an_unknown_class_folder_is_named(tmp_path):
    card = write_images(tmp_path)
    (tmp_path / "pics" / "bird").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pics" / "bird" / "b.png")
    with pytest.raises(DataError, match=r"image bird/b.png .* not in a class folder"):
        open_dataset(card, "all")


def test_a_broken_image_is_named(tmp_path):
    card = write_images(tmp_path)
    (tmp_path / "pics" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        list(batches(open_dataset(card, "all"), 4))


def test_samples_in_two_splits_are_counted(tmp_path):
    card = write(tmp_path)
    part, some, everything_ = (open_dataset(card, name) for name in ("part", "some", "all"))
    assert shared_samples(part, some) == 0
    assert shared_samples(part, everything_) == 3


def test_inputs_are_not_prepared_so_a_card_that_asks_for_it_is_refused(tmp_path):
    card = write(tmp_path, CARD + "inputs: {a: x}\n")
    with pytest.raises(DataError, match="`inputs` together with preprocess or layout"):
        open_dataset(card, "part")


def test_nothing_is_written_beside_the_data(tmp_path):
    card = write(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    everything(open_dataset(card, "all"), 7)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
