"""The demo's data is the same every time, and the committed model is good on images it was not trained on."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

import qcore.demo
from qcore.demo.make_data import write_digits

DEMO = Path(qcore.demo.__file__).parent
MODEL = DEMO / "digits_cnn.onnx"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_the_data_set_has_the_same_bytes_every_time(card: Path, tmp_path: Path) -> None:
    again = write_digits(tmp_path / "new" / "folder")
    assert again.name == "digits.yaml"
    for name in ("digits.yaml", "digits.npz"):
        assert again.with_name(name).read_bytes() == card.with_name(name).read_bytes()


def test_the_splits_share_no_sample_and_use_all(card: Path) -> None:
    described = yaml.safe_load(card.read_text())
    with np.load(card.with_name(described["path"])) as arrays:
        x, y = arrays["x"], arrays["y"]
    assert x.shape == (1797, 8, 8, 1)
    assert x.dtype == np.uint8
    assert (x.min(), x.max()) == (0, 16)
    assert y.shape == (1797,)
    assert set(y) == set(range(10))
    used = [i for split in described["splits"].values() for i in range(*split["range"])]
    assert sorted(used) == list(range(1797))


def test_the_model_is_right_on_97_percent_of_the_evaluation_split(card: Path) -> None:
    described = yaml.safe_load(card.read_text())
    part = slice(*described["splits"]["evaluation"]["range"])
    with np.load(card.with_name(described["path"])) as arrays:
        x, y = arrays["x"][part], arrays["y"][part]
    (step,) = described["preprocess"]
    assert step["normalize"] == {"mean": 0, "std": 16}
    image = x.transpose(0, 3, 1, 2).astype(np.float32) / step["normalize"]["std"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL.read_bytes(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": image})
    assert (logits.argmax(axis=1) == y).mean() >= 0.97


def test_the_model_is_a_small_valid_onnx_file_that_exercises_the_path() -> None:
    assert MODEL.stat().st_size <= 200_000
    model = onnx.load(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 1, 8, 8]
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("BatchNormalization") == ops.count("Conv") == 5
    assert {"Add", "GlobalAveragePool", "Gemm"} <= set(ops)
    groups = [a.i for node in model.graph.node for a in node.attribute if a.name == "group"]
    assert 32 in groups  # the depthwise convolution
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
