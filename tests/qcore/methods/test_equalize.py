"""Equalization: the same function on the calibration data, and a model that quantization hurts less."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_net, model_of
from onnx import helper, numpy_helper
from quantizing import run_plain, samples
from recovering import Net, evidence_of, images, outlier_net, parsed, recipe_with

from qcore.compression import compress
from qcore.graph.fold import fold_batchnorm
from qcore.graph.io import serialize_model
from qcore.graph.sets import equalization_sets
from qcore.graph.traverse import node_name
from qcore.methods.equalize import EqualizeStep, equalize
from qcore.recovery import channel_statistics
from qcore.target import load_target

TARGETS = ["npu-int8-symmetric", "x86-vnni"]  # a weight scale per tensor, and per channel


def run_ir(model, x):
    return run_plain(onnx.ModelProto.FromString(serialize_model(model)), x)


def equalized(proto, x, target="npu-int8-symmetric", **options):
    model = fold_batchnorm(parsed(proto)).model
    evidence = evidence_of(x)
    before = serialize_model(model)
    result = equalize(model, EqualizeStep(**options), load_target(target), channel_statistics(model, evidence))
    assert serialize_model(model) == before
    return result


def assert_same(proto, rewrite, x):
    wanted, made = run_plain(proto, x), run_ir(rewrite.model, x)
    np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())


def fitted(x):
    """The samples that steps learn from."""
    return np.concatenate([b["x"] for b in evidence_of(x).fit])


def free_layers(proto):
    sets = equalization_sets(fold_batchnorm(parsed(proto)).model.graph)
    return {node_name(la.node) for la in sets.layers if la.out in sets.free}


@pytest.mark.parametrize("target", TARGETS)
def test_conv_net_computes_what_it_did(target):
    proto = conv_net()
    x = samples(proto)
    result = equalized(proto, x, target)
    assert set(result.changed) == {"conv1", "depthwise", "pointwise", "fc"}
    assert_same(proto, result, fitted(x))
    weights = {str(i.name) for i in result.model.graph.initializers.values()}
    assert {"conv1.weight_equalized", "conv1.bias_equalized", "fc.weight_equalized"} <= weights


def residual(net):
    shortcut = net.at
    net.conv(net.channels, 1)
    net.add(shortcut)


def cut(net):
    net.conv(4, 1)
    net.clip(float(net.rng.uniform(0.2, 8)))


KINDS = {
    "conv": lambda net: net.conv(6),
    "pointwise": lambda net: net.conv(4, 1, bias=False),
    "grouped": lambda net: net.conv(8, group=2),
    "depthwise": Net.depthwise,
    "residual": residual,
    "gate": Net.gate,
    "clip": cut,
    "relu": Net.relu,
    "leaky": lambda net: net.op("LeakyRelu", [net.at], alpha=0.1),
    "pool": lambda net: net.op("AveragePool", [net.at], kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
}


def grown(seed, kinds, transposed):
    net = Net(seed)
    net.conv(4)
    net.relu()
    for kind in kinds:
        KINDS[kind](net)
    return net.head(transposed=transposed)


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(TARGETS),
)
def test_any_net_computes_what_it_did(seed, kinds, transposed, target):
    proto, x = grown(seed, kinds, transposed), images(32)
    assert_same(proto, equalized(proto, x, target), fitted(x))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_one_outlier_channel_costs_little_any_more(bias):
    proto, x = outlier_net(bias), images()
    made = compress(parsed(proto), recipe_with({"method": "equalize"}), load_target("npu-int8-symmetric"),
                    evidence_of(x))  # fmt: skip
    step = next(s for s in made.steps if s.method == "equalize")
    assert step.kept
    assert step.error_after < 0.05 * step.error_before
    assert made.error == step.error_after
    assert_same(proto, equalized(proto, x), fitted(x))


def test_what_other_operators_see_is_not_scaled():
    net = Net(0)
    net.conv(4)  # behind the graph's input, in front of Sigmoid
    net.op("Sigmoid", [net.at])
    net.conv(4)  # in front of Reshape
    net.op("Reshape", [net.at, "shape"])
    net.weights["shape"] = np.array([0, 4, 6, 6], np.int64)
    net.conv(4)  # free: conv to conv
    net.conv(2)  # the graph's output
    proto = net.model(["N", 2, 6, 6])
    sets = equalization_sets(parsed(proto).graph)
    convs = [n.name for n in proto.graph.node if n.op_type == "Conv"]
    assert free_layers(proto) == {convs[2]}
    assert {(s.op_type, s.reason) for s in sets.skipped} == {
        ("Sigmoid", "it is not homogeneous"),
        ("Reshape", "it is not homogeneous"),
    }
    x = images()
    result = equalized(proto, x)
    assert result.changed == (convs[2], convs[3])
    assert_same(proto, result, x)


def test_the_gate_of_squeeze_and_excitation_stays_exact():
    net = Net(1)
    net.conv(6)
    net.relu()
    net.gate()
    net.conv(4, 1)
    proto, x = net.head(), images()
    convs = [n.name for n in proto.graph.node if n.op_type == "Conv"]
    assert free_layers(proto) == {convs[0], convs[1], convs[3]}  # all but the one in front of the Sigmoid
    result = equalized(proto, x)
    assert set(result.changed) >= set(convs)  # its inputs are scaled
    assert_same(proto, result, x)


def adding(other):
    """conv(4 channels) + something, then a layer."""
    net = Net(2)
    shape = {"scalar": (1,), "vector": (1, 4, 1, 1)}.get(other)
    if shape is None:
        left = net.conv(4)
        net.at, net.channels = "x", 3
        net.conv(1)
        net.op("Add", [left, net.at])
    else:
        net.conv(4)
        net.op("Add", [net.at, net.constant(net.normal(*shape))])
    net.channels = 4
    net.conv(4)
    return net.head()


@pytest.mark.parametrize("other", ["scalar", "vector", "one channel"])
def test_a_sum_that_broadcasts_is_left_alone(other):
    proto, x = adding(other), images()
    summed = [n for n in proto.graph.node if n.op_type == "Conv"][:-1]
    assert free_layers(proto).isdisjoint(n.name for n in summed)
    assert_same(proto, equalized(proto, x), x)


def test_a_bound_that_is_never_reached_moves_and_one_that_is_stays_a_bound():
    for high in (0.3, 1e3):
        net = Net(4)
        net.conv(6)
        net.clip(high)
        net.conv(4)
        net.clip(high)
        proto, x = net.head(), images()
        result = equalized(proto, x)
        assert [n.op_type for n in result.model.graph].count("Clip") == 2
        assert_same(proto, result, fitted(x))
        assert len(result.changed) == 3


def test_lifted_bounds_are_gone():
    net = Net(4)
    net.conv(6)
    net.clip(1e3)
    net.conv(4)
    net.clip(1e3)
    proto, x = net.head(), images()
    result = equalized(proto, x, clips="lift")
    assert [n.op_type for n in result.model.graph].count("Relu") == 2
    assert "Clip" not in [n.op_type for n in result.model.graph]
    assert_same(proto, result, x)  # nothing was cut


def test_a_clip_without_statistics_is_left_alone():
    net = Net(4)
    net.conv(6)
    net.clip(0.5)
    proto = net.head()
    model = parsed(proto)
    result = equalize(model, EqualizeStep(), load_target("npu-int8-symmetric"), {})
    assert result.changed == ()
    assert_same(proto, result, images())


def test_weights_that_two_layers_share_are_not_scaled_twice():
    w = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)
    w[0] *= 50
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w"], ["c"], name="two"),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("Conv", ["d", "w"], ["y"], name="three"),
    ]
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 3, 6, 6]}, outputs={"y": ["N", 3, 6, 6]})
    x = images()
    result = equalized(proto, x)
    assert result.changed == ("one", "two", "three")
    assert_same(proto, result, x)
    written = onnx.ModelProto.FromString(serialize_model(result.model))
    assert len([numpy_helper.to_array(i) for i in written.graph.initializer]) == 3


def test_a_net_with_nothing_to_even_out_comes_back_as_it_was():
    net = Net(0)
    net.conv(2)
    proto = net.model(["N", 2, 6, 6])
    result = equalized(proto, images())
    assert result.changed == ()
    assert_same(proto, result, images())
