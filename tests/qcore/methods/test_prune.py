import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_net, model_of
from onnx import helper, numpy_helper

from qcore.config import check_config
from qcore.errors import ConfigError, ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.prune import PruneStep, prune
from qcore.recipe import Recipe


def weights_of(data: bytes) -> dict[str, np.ndarray]:
    graph = onnx.ModelProto.FromString(data).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    return {n.name: constants[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")}


@given(st.floats(0, 0.99), st.integers(0, 20))
def test_exactly_the_asked_number_of_the_smallest_weights_goes(sparsity, seed):
    raw = conv_net(seed).SerializeToString()
    model = parse_model(raw, "m")
    rewrite = prune(model, PruneStep(sparsity=sparsity))
    before, after = weights_of(raw), weights_of(serialize_model(rewrite.model))
    assert rewrite.changed == ("conv1", "depthwise", "pointwise", "fc")
    for name, w in before.items():
        gone = (after[name] == 0) & (w != 0)
        assert gone.sum() == round(sparsity * w.size)
        assert np.array_equal(after[name][~gone], w[~gone])
        if gone.any() and not gone.all():
            assert np.abs(w[gone]).max() <= np.abs(w[~gone]).min()


def test_the_argument_is_not_changed_and_bytes_repeat():
    model = parse_model(conv_net().SerializeToString(), "m")
    before = serialize_model(model)
    first = serialize_model(prune(model, PruneStep(sparsity=0.5)).model)
    assert serialize_model(model) == before
    assert serialize_model(prune(model, PruneStep(sparsity=0.5)).model) == first
    onnx.checker.check_model(onnx.ModelProto.FromString(first), full_check=True)


def test_excluded_and_dynamic_layers_are_left_alone_with_the_reason():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="kept"),
        helper.make_node("MatMul", ["a", "x"], ["y"], name="dynamic"),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="pruned"),
    ]
    proto = model_of(
        nodes, {"w": np.arange(16, dtype=np.float32).reshape(4, 4)}, inputs={"x": [4, 4]}, outputs={"z": [4, 4]}
    )
    rewrite = prune(parse_model(proto.SerializeToString(), "m"), PruneStep(exclude=("kept",)))
    assert rewrite.changed == ("pruned",)
    assert [(s.node, s.reason) for s in rewrite.skipped] == [
        ("kept", "excluded by the recipe"),
        ("dynamic", "its weights are not float constants"),
    ]


def test_a_model_without_layers_is_refused():
    proto = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, inputs={"x": [4]}, outputs={"y": [4]})
    with pytest.raises(ModelError, match="no layer can be pruned"):
        prune(parse_model(proto.SerializeToString(), "m"), PruneStep())


def test_a_pattern_runs_along_the_inputs_of_every_layer():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = {"c": normal(8, 8, 3, 3), "d": normal(8, 1, 3, 3), "t": normal(8, 4, 2, 2), "g": normal(8, 6),
               "h": normal(6, 8), "m": normal(2, 8, 4)}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Conv", ["a", "d"], ["b"], name="depthwise", group=8, pads=[1] * 4),
        helper.make_node("ConvTranspose", ["b", "t"], ["u"], name="up"),
        helper.make_node("Gemm", ["f", "g"], ["p"], name="plain"),
        helper.make_node("MatMul", ["s", "m"], ["r"], name="stack"),
        helper.make_node("Gemm", ["e", "h"], ["q"], name="turned", transB=1),
    ]
    proto = model_of(nodes, weights, inputs={"x": [1, 8, 4, 4], "f": [1, 8], "e": [1, 8], "s": [2, 3, 8]},
                     outputs={"u": list("abcd"), "p": list("ef"), "q": list("gh"), "r": list("ijk")})  # fmt: skip
    rewrite = prune(parse_model(proto.SerializeToString(), "m"), PruneStep(pattern="2:4"))
    assert rewrite.changed == ("conv", "up", "plain", "stack", "turned")
    assert [(s.node, s.reason) for s in rewrite.skipped] == [
        ("depthwise", "it has 1 inputs per output and tap, fewer than 4")
    ]
    graph = onnx.ModelProto.FromString(serialize_model(rewrite.model)).graph
    after = {i.name.removesuffix("_pruned"): numpy_helper.to_array(i) for i in graph.initializer}
    for name, axis in {"c": 1, "t": 0, "g": 0, "h": 1, "m": 1}.items():
        runs = np.moveaxis(after[name] != 0, axis, -1).reshape(-1, 4)
        assert np.all(runs.sum(axis=1) == 2), name


def test_layers_share_zeros_where_they_share_weights_along_one_axis():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("Gemm", ["a", "w"], ["b"], name="same"),
        helper.make_node("Gemm", ["b", "w"], ["y"], name="turned", transB=1),
    ]
    w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    proto = model_of(nodes, {"w": w}, inputs={"x": [1, 8]}, outputs={"y": [1, 8]})
    made = prune(parse_model(proto.SerializeToString(), "m"), PruneStep(pattern="1:4")).model
    graph = onnx.ModelProto.FromString(serialize_model(made)).graph
    assert [n.input[1] for n in graph.node] == ["w_pruned", "w_pruned", "w_pruned_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.5}, "sparsity and pattern are both given"),
        ({"pattern": "4:4"}, "pattern is 4:4"),
        ({"pattern": "2/4"}, "pattern"),
    ],
)
def test_patterns_that_say_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config({"name": "r", "steps": [{"method": "prune", **options}]}, Recipe, "recipe")


def test_a_model_too_narrow_for_the_pattern_is_refused_with_the_reason():
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"w": np.ones((3, 3), np.float32)},
                     inputs={"x": [3, 3]}, outputs={"y": [3, 3]})  # fmt: skip
    with pytest.raises(ModelError, match="of m: it has 3 inputs per output and tap, fewer than 4"):
        prune(parse_model(proto.SerializeToString(), "m"), PruneStep(pattern="2:4"))
