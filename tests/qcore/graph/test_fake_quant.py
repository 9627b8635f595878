"""A QDQ graph, opened for training and closed again, is the graph that it was; what moves, moves alone."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from models import conv_net, model_of
from onnx import helper
from quantizing import TARGETS, quantized, run, samples

from qcore.graph.fake_quant import fake_quantized, with_trained
from qcore.graph.fold import fold_batchnorm
from qcore.graph.grid import LAYERS
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.target import load_target


def opened(proto, target):
    profile = load_target(target)
    model = quantized(proto, target).model
    folded = fold_batchnorm(parse_model(proto.SerializeToString(), "m")).model
    floats = {node_name(n): constant_array(n.inputs[1]) for n in folded.graph if n.op_type in LAYERS}

    def scheme(node):
        depthwise = node.op_type == "Conv" and int_attribute(node, "group", 1) > 1
        return profile.weight_scheme(0, depthwise=depthwise)

    tied = (*profile.same_scale, *profile.one_scale)
    return model, fake_quantized(model, floats, scheme, tied), floats


@pytest.mark.parametrize("target", TARGETS)
def test_opened_and_closed_without_training_every_integer_is_what_it_was(target):
    model, fake, _ = opened(conv_net(), target)
    layers = [node_name(n) for n in model.graph if n.op_type in LAYERS]
    assert [layer.node for layer in fake.layers] == layers
    assert not fake.skipped
    assert serialize_model(with_trained(model, fake, {})) == serialize_model(model)
    same = {name: constant_array(v) for name, v in fake.model.graph.initializers.items() if v.dtype.name == "FLOAT"}
    closed = with_trained(model, fake, {**same, **fake.scales})
    for name, value in model.graph.initializers.items():
        before, after = constant_array(value), constant_array(closed.graph.initializers[name])
        assert before.dtype == after.dtype
        assert np.array_equal(before, after), name


@pytest.mark.parametrize("target", TARGETS)
def test_weights_start_where_the_float_model_has_them_inside_their_level(target):
    _, fake, floats = opened(conv_net(), target)
    for layer in fake.layers:
        start = constant_array(fake.model.graph.initializers[layer.weight.value])
        q = layer.weight.q
        axis = [1] * start.ndim
        if q.axis is not None:
            axis[q.axis] = -1
        step = q.scale.reshape(axis) if q.axis is not None else q.scale
        # Rounding to nearest moves nothing but what lies on the very edge of a level.
        assert np.allclose(start, floats[layer.node], atol=float(np.max(step)) * 0.01)


def test_a_weight_that_moves_by_one_level_moves_one_integer():
    model, fake, _ = opened(conv_net(), "arm-dotprod")
    layer = next(la for la in fake.layers if la.bias is not None)
    start = constant_array(fake.model.graph.initializers[layer.weight.value]).copy()
    at = np.unravel_index(np.argmin(np.abs(start)), start.shape)
    step = float(layer.weight.q.scale.reshape(-1)[at[layer.weight.q.axis or 0] if layer.weight.q.scale.ndim else 0])
    start[at] += step
    closed = with_trained(model, fake, {layer.weight.value: start})
    before = constant_array(model.graph.initializers[layer.stored]).astype(int)
    after = constant_array(closed.graph.initializers[layer.stored]).astype(int)
    changed = np.argwhere(before != after)
    assert changed.tolist() == [list(at)]
    assert (after - before)[at] == 1


def test_a_scale_that_moves_is_written_to_all_its_copies_and_the_biases_behind_it_follow():
    model, fake, _ = opened(conv_net(), "arm-dotprod")
    layer = next(la for la in fake.layers if la.bias is not None)
    name = layer.bias.input_scale
    closed = with_trained(model, fake, {name: fake.scales[name] * 2})
    for copy in fake.copies[name]:
        assert constant_array(closed.graph.initializers[copy]) == fake.scales[name] * 2
    stored, scale = (
        [constant_array(m.graph.initializers[n]).astype(np.float64) for m in (model, closed)]
        for n in (layer.bias.stored, layer.bias.stored_scale)
    )
    assert np.allclose(scale[1], scale[0] * 2)
    assert np.allclose(stored[0] * scale[0], stored[1] * scale[1], atol=float(scale[1].max()))


def pooled():
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((4, 4, 3, 3)).astype(np.float32) for k in (1, 2)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["a"], ["b"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="two"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 4, 8, 8]}, outputs={"y": ["N", 4, 2, 2]})


def test_what_a_pool_reads_and_gives_has_one_scale():
    model, fake, _ = opened(pooled(), "x86-vnni")
    assert len(fake.activations) == 4  # x, a, b, y
    assert len({a.scale for a in fake.activations}) == 3
    shared = next(names for names in fake.copies.values() if len(names) == 2)
    name = next(k for k, v in fake.copies.items() if v == shared)
    closed = with_trained(model, fake, {name: fake.scales[name] * 2})
    assert len({float(constant_array(closed.graph.initializers[n])) for n in shared}) == 1
    ort.InferenceSession(serialize_model(closed), providers=["CPUExecutionProvider"])


def test_layers_that_the_float_model_lacks_stay_as_they_are():
    model, fake, floats = opened(conv_net(), "x86-vnni")
    del floats["conv1"]
    scheme = lambda node: replace(load_target("x86-vnni").weight_scheme(0))  # noqa: E731
    again = fake_quantized(model, floats, scheme, ())
    assert [s.reason for s in again.skipped] == ["the float model has no such layer"]
    assert len(again.layers) == len(fake.layers) - 1
    x = samples(conv_net(), seed=3)
    assert run(serialize_model(with_trained(model, again, {})), x) is not None
