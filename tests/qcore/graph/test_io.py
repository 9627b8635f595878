import numpy as np
import onnx
import pytest
from models import conv_net, model_of, save
from onnx import TensorProto, helper

from qcore.errors import ModelError
from qcore.graph.io import load_model, parse_model, save_model, serialize_model


def test_round_trip_keeps_the_graph_and_is_deterministic(tmp_path):
    path = save(conv_net(), tmp_path / "m.onnx")
    first = save_model(load_model(path), tmp_path / "a.onnx")
    assert save_model(load_model(path), tmp_path / "b.onnx") == first
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"), full_check=True)
    assert serialize_model(load_model(tmp_path / "a.onnx")) == (tmp_path / "a.onnx").read_bytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "has 0 bytes"),
        (b"this is not a model, but a line of text", "not"),
        (b"\x00" * 100, "not"),
        ((conv_net().SerializeToString())[:200], "not"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as e:
        load_model(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


def test_a_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelError, match="is not a file"):
        load_model(tmp_path)


def test_old_opsets_are_refused_with_the_way_out():
    old = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, inputs={"x": [1]}, outputs={"y": [1]}, opset=11)
    with pytest.raises(ModelError, match=r"opset 11; allowed: 13 or newer; convert"):
        parse_model(old.SerializeToString(), "old.onnx")


def test_external_weights_are_refused(tmp_path):
    proto = conv_net()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(ModelError, match="external files"):
        load_model(tmp_path / "m.onnx")


def test_an_invalid_graph_is_refused():
    proto = conv_net()
    proto.graph.node[2].input[0] = "nobody_makes_this"
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        parse_model(proto.SerializeToString(), "m.onnx")


def test_inputs_on_a_read_only_folder_are_untouched(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = save(conv_net(), folder / "m.onnx")
    before = path.read_bytes()
    load_model(path)
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["m.onnx"]


def test_weights_keep_their_bits():
    w = np.array([1.0, -0.0, 1e-45, 3.4e38], np.float32)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    proto = model_of([node], {"w": w}, inputs={"x": [4]}, outputs={"y": [4]})
    again = onnx.ModelProto.FromString(serialize_model(parse_model(proto.SerializeToString(), "m")))
    assert onnx.numpy_helper.to_array(again.graph.initializer[0]).tobytes() == w.tobytes()
    assert again.graph.initializer[0].data_type == TensorProto.FLOAT
