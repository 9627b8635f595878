"""Weights that are no numbers are named; infinite constants that are meant are left in peace."""

import numpy as np
import pytest
from models import conv_net, model_of, save, write_data
from onnx import helper, numpy_helper

from qcore import steps
from qcore.errors import CalibrationError, ModelError
from qcore.graph.finite import refuse_non_finite_weights
from qcore.graph.io import parse_model

NODES = {
    "w2": "Conv depthwise",
    "b3": "Conv pointwise",
    "var": "BatchNormalization bn1",
    "wf": "Gemm fc",
}


def broken(name, value):
    proto = conv_net()
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[-1] = value
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    return proto


def linear(mask, bias=0.0, moved=False):
    """Return softmax(W x + b + mask): what exporters write of a masked score."""
    weights = {
        "w": np.ones((4, 4), np.float32),
        "b": np.full(4, bias, np.float32),
        "mask": np.array([0, 0, 0, mask], np.float32),
    }
    nodes = [
        helper.make_node("Identity", ["b"], ["b.same"], name="same"),
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
        helper.make_node("Add", ["xw", "b.same" if moved else "b"], ["l"], name="bias"),
        helper.make_node("Add", ["l", "mask"], ["s"], name="masked"),
        helper.make_node("Softmax", ["s"], ["y"], name="softmax"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 4]}, outputs={"y": ["N", 4]})


def parsed(proto):
    return parse_model(proto.SerializeToString(), "m")


@pytest.mark.parametrize("recipe", ["int8-weights", "int4-weights", "float16", "int8-dynamic", "int8"])
@pytest.mark.parametrize(("name", "value", "held"), [("wf", np.nan, "NaN"), ("w2", -np.inf, "infinity")])
def test_every_recipe_refuses_weights_that_are_no_numbers(recipe, name, value, held, tmp_path):
    card = write_data(tmp_path, conv_net())
    model = save(broken(name, value), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=f"initializer {name} of {NODES[name]} holds {held}; allowed: finite weights"):
        steps.compress(model=model, out=tmp_path / "q.onnx", data=card, recipe=recipe, target="x86-vnni")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(("name", "jobs"), [("b3", 1), ("var", 1), ("wf", 2)])
def test_calibration_names_the_weights_and_not_the_data(name, jobs, tmp_path):
    card = write_data(tmp_path, conv_net())
    model = save(broken(name, np.nan), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=f"initializer {name} of {NODES[name]} holds NaN"):
        steps.calibrate(model=model, data=card, out=tmp_path / "t.json", jobs=jobs)


@pytest.mark.parametrize("search", [steps.compress_auto, steps.mixed_precision])
def test_searches_name_the_weights(search, tmp_path):
    card = write_data(tmp_path, conv_net())
    model = save(broken("wf", np.nan), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="initializer wf of Gemm fc holds NaN"):
        search(model=model, data=card, out=tmp_path / "q.onnx")


def test_infinity_that_is_meant_is_no_weight():
    refuse_non_finite_weights(parsed(linear(-np.inf)))
    refuse_non_finite_weights(parsed(broken("high", np.inf)))


@pytest.mark.parametrize(
    ("proto", "named"),
    [
        (linear(np.nan), "mask of Add masked holds NaN"),
        (linear(0, bias=np.inf), "b of Add bias holds infinity"),
        (linear(0, bias=np.inf, moved=True), "b of Add bias holds infinity"),
    ],
)
def test_operands_that_no_model_can_mean_are_refused(proto, named):
    with pytest.raises(ModelError, match=named):
        refuse_non_finite_weights(parsed(proto))


def test_an_activation_that_a_constant_makes_infinite_names_it(tmp_path):
    model = save(linear(-np.inf), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((8, 4), np.float32))
    (tmp_path / "d.yaml").write_text(
        "name: d\npath: d.npz\ntask: none\ninputs: {x: x}\nsplits:\n  calibration: {fraction: 1.0}\n"
    )
    with pytest.raises(
        CalibrationError, match=r"activation s: tensor holds NaN or infinity .* but initializer mask holds infinity"
    ):
        steps.calibrate(model=model, data=tmp_path / "d.yaml", out=tmp_path / "t.json")
