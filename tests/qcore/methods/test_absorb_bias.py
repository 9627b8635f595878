"""Bias absorption: the same outputs on the calibration data, and activations that come down to zero."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import model_of
from onnx import helper
from recovering import Net, evidence_of, images, parsed, recipe_with

from qcore.compression import compress
from qcore.graph.io import serialize_model
from qcore.methods.absorb_bias import AbsorbBiasStep, absorb_bias, activations_to_absorb
from qcore.recovery import channel_statistics
from qcore.runtime.nodewise import expose
from qcore.target import load_target

HIGH = 30.0


def run(raw, x):
    return ort.InferenceSession(raw, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def measured(model, x):
    return channel_statistics(model, evidence_of(x), activations_to_absorb(model))


def absorbed(proto, x, **options):
    """The result, which leaves its argument alone and is a valid model."""
    model = parsed(proto)
    before = serialize_model(model)
    result = absorb_bias(model, AbsorbBiasStep(**options), measured(model, x))
    assert serialize_model(model) == before
    onnx.checker.check_model(onnx.ModelProto.FromString(serialize_model(result.model)), full_check=True)
    return result


def fitted(x):
    return np.concatenate([b["x"] for b in evidence_of(x).fit])


def assert_same(proto, result, x):
    """Equal on the samples that were measured, up to float32 rounding of numbers that are as large as the biases."""
    for ours, theirs in zip(
        run(serialize_model(result.model), x), run(proto.SerializeToString(), x), strict=True
    ):  # fmt: skip
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(np.abs(theirs).max(), HIGH))


def lift(net, by=HIGH, channels=1):
    """Give the last layer of `net` some channels that a Relu always lets through."""
    weight, bias = (net.weights[name] for name in net.nodes[-1].input[1:3])
    bias[:channels] = by * np.abs(weight).reshape(len(bias), -1).sum(axis=1)[:channels]


def lows(model, names, x):
    made = expose(model, names)({"x": x})
    return [made[n].min(axis=tuple(i for i in range(made[n].ndim) if i != 1)) for n in names]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    group=st.sampled_from([1, 2]),
    clip=st.booleans(),
    pool=st.sampled_from(["", "MaxPool", "AveragePool"]),
    transposed=st.booleans(),
)
def test_the_outputs_stay_the_same_and_the_channels_come_down(seed, group, clip, pool, transposed):
    net = Net(seed)
    net.conv(6)
    lift(net, channels=2)
    net.clip(1e6) if clip else net.relu()
    activation = net.at
    if pool:
        net.op(pool, [net.at], kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    net.conv(4, 1, group=group, bias=seed % 2 == 0)
    lift(net) if seed % 2 == 0 else None
    net.relu()
    proto, x = net.head(transposed=transposed), images()
    result = absorbed(proto, x)
    convs = [n.name for n in proto.graph.node if n.op_type == "Conv"]
    assert set(convs) <= set(result.changed)
    assert_same(proto, result, fitted(x))
    before, after = (lows(m, [activation], fitted(x))[0] for m in (parsed(proto), result.model))
    assert (before[:2] > 1).all()
    assert (after[:2] < 0.5 * before[:2]).all()
    assert (after[:2] > 0).all()  # the margin: others may go lower


def linear_chain(second_bias=True):
    """MatMul + Add -> Relu -> MatMul + Add, on (N, 3, 6), the first Add with its constant in front."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((6, 5)),
        "b1": np.array([[40.0, 0, 50, 0, 0]]),
        "w2": rng.standard_normal((5, 4)),
        "b2": rng.standard_normal(4),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="one"),
        helper.make_node("Add", ["b1", "m1"], ["s1"], name="add1"),
        helper.make_node("Relu", ["s1"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["m2"] if second_bias else ["y"], name="two"),
    ]
    if second_bias:
        nodes.append(helper.make_node("Add", ["m2", "b2"], ["y"], name="add2"))
    constants = {k: v.astype(np.float32) for k, v in weights.items() if second_bias or k != "b2"}
    return model_of(nodes, constants, inputs={"x": ["N", 3, 6]}, outputs={"y": ["N", 3, 4]})


def test_the_adds_of_matmuls_hold_their_biases():
    proto, x = linear_chain(), np.random.default_rng(1).standard_normal((64, 3, 6)).astype(np.float32)
    result = absorbed(proto, x)
    assert result.changed == ("one", "two")
    assert_same(proto, result, fitted(x))
    bias = result.model.graph.node("add1").inputs[0].const_value.numpy()
    assert bias.shape == (1, 5)
    assert (bias[0, [0, 2]] < 20).all()
    np.testing.assert_array_equal(bias[0, [1, 3, 4]], 0)


def test_a_matmul_without_an_add_cannot_take_it():
    x = np.random.default_rng(1).standard_normal((64, 3, 6)).astype(np.float32)
    result = absorbed(linear_chain(second_bias=False), x)
    assert result.changed == ()
    assert [(s.node, s.reason) for s in result.skipped] == [("relu", "its reader two: no Add behind it holds a bias")]


def chain(behind):
    net = Net(0)
    net.conv(4)
    lift(net)
    net.relu()
    behind(net)
    return net.head() if net.at != "y" else net.model(["N", 4, 6, 6])


def residual(net):
    data = net.at
    net.conv(4, 1)
    net.add(data)


def sigmoid(net):
    net.op("Sigmoid", [net.at])


REFUSED = {
    "padding": (lambda net: net.conv(4, 3), "it pads with zeros, which are not shifted"),
    "residual": (residual, "Add cannot take the correction"),
    "sigmoid": (sigmoid, "Sigmoid cannot take the correction"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_left_alone_and_named(case):
    behind, reason = REFUSED[case]
    proto, x = chain(behind), images()
    result = absorbed(proto, x)
    assert reason in {s.reason.split(": ")[-1] for s in result.skipped if s.node == "relu1"}
    assert "conv0" not in result.changed
    assert_same(proto, result, fitted(x))


@pytest.mark.parametrize(("mode", "kernel", "taken"), [("SAME_UPPER", 1, True), ("SAME_UPPER", 3, False),
                                                       ("VALID", 3, True)])  # fmt: skip
def test_auto_pads_count_where_they_pad(mode, kernel, taken):
    def behind(net):
        net.conv(4, kernel)
        del net.nodes[-1].attribute[:]
        net.nodes[-1].attribute.append(helper.make_attribute("auto_pad", mode))

    proto, x = chain(behind), images()
    result = absorbed(proto, x)
    assert ("conv0" in result.changed) == taken
    assert_same(proto, result, fitted(x))


def test_channels_that_a_clip_cuts_keep_their_bias():
    net = Net(0)
    net.conv(4)
    lift(net, channels=2)
    bias, x = net.weights[net.nodes[-1].input[2]], images()
    bias[1] = 10 * bias[0]
    net.clip(4 * float(bias[0]))
    net.conv(4, 1)
    proto = net.head()
    result = absorbed(proto, x)
    moved = result.model.graph.node("conv0").inputs[2].const_value.numpy()
    assert moved[0] < bias[0]
    np.testing.assert_array_equal(moved[1:], bias[1:])
    assert_same(proto, result, fitted(x))


def test_more_is_absorbed_by_the_rule_of_the_paper():
    proto, x = chain(lambda net: net.conv(4, 1)), images()
    safe, bold = (absorbed(proto, x, **o).model.graph.node("conv0").inputs[2].const_value.numpy() for o in
                  ({}, {"sigmas": 1.0}))  # fmt: skip
    assert bold[0] < safe[0]
    assert_same(proto, absorbed(proto, x, sigmas=50.0), x)  # nothing is that high


def test_a_recipe_keeps_it_where_the_held_out_error_falls():
    """One channel stands far above zero and varies little: its part of the range is wasted on a constant."""
    net = Net(0)
    net.conv(6)
    lift(net, by=8.0)
    net.relu()
    net.conv(4, 1)
    proto, x = net.head(), images()
    made = compress(
        parsed(proto), recipe_with({"method": "absorb-bias"}), load_target("npu-int8-symmetric"), evidence_of(x)
    )
    step = next(s for s in made.steps if s.method == "absorb-bias")
    assert step.kept
    assert step.error_after < 0.7 * step.error_before
    assert step.changed
