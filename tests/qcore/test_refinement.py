"""Layer by layer: the means, and with second-order rounding the outputs, are those of the float model."""

from dataclasses import replace

import numpy as np
import pytest
from models import model_of
from onnx import helper
from quantizing import constants, written
from recovering import Net, evidence_of, images, parsed

from qcore.graph.io import serialize_model
from qcore.methods.correct_bias import correct_bias
from qcore.methods.quantize import QuantizeStep, quantize
from qcore.refinement import refine_layers
from qcore.runtime.nodewise import expose
from qcore.target import load_target

EVERY = 36  # positions of a 6x6 map


def net():
    grown = Net(0)
    grown.conv(6)
    grown.relu()
    grown.depthwise()
    grown.relu()
    grown.conv(8, group=2, bias=False)
    return grown.head(transposed=False)


def quantized_net(target, bits=3):
    model, evidence = parsed(net()), evidence_of(images())
    return model, evidence, quantize(model, QuantizeStep(weight_bits=bits), load_target(target), evidence.table(model))


LAYERS = ("Conv", "Gemm")


def layer_means(model, evidence):
    """The mean of every channel of every layer over the samples that were fitted to."""
    tensors = {n.name: n.outputs[0].name for n in model.graph if n.op_type in LAYERS}
    predict = expose(model, list(tensors.values()))
    made = [predict(b) for b in evidence.fit]
    means = {}
    for name, tensor in tensors.items():
        y = np.concatenate([m[tensor] for m in made])
        means[name] = y.mean(axis=tuple(i for i in range(y.ndim) if i != 1), dtype=np.float64)
    return means


def bias_steps(rewrite):
    """How finely each layer can be shifted: the scale of its int32 bias, 0 where that is float."""
    makers = {o: n for n in written(rewrite).graph.node for o in n.output}
    values = constants(written(rewrite))
    layers = [n for n in makers.values() if n.op_type in LAYERS]
    return {n.name: values[makers[n.input[2]].input[1]] if n.input[2] in makers else 0 for n in layers}


@pytest.mark.parametrize("target", ["tensorrt", "npu-int8-symmetric", "x86-avx2"])
def test_the_corrected_biases_restore_the_means_of_every_layer(target):
    model, evidence, rewrite = quantized_net(target)
    before = serialize_model(rewrite.model)
    made = refine_layers(rewrite.model, model, evidence.fit, correct_bias, EVERY)
    assert serialize_model(rewrite.model) == before
    assert len(made.changed) == 4
    written(made)
    wanted, steps = layer_means(model, evidence), bias_steps(made)
    for name, ours in layer_means(made.model, evidence).items():
        assert (np.abs(ours - wanted[name]) <= 0.51 * steps[name] + 1e-4).all()
    wrong = layer_means(rewrite.model, evidence)
    assert any((np.abs(wrong[name] - wanted[name]) > 2 * steps[name] + 0.01).any() for name in wanted)


def test_a_refinement_that_changes_nothing_names_nothing():
    model, evidence, rewrite = quantized_net("tensorrt")
    once = refine_layers(rewrite.model, model, evidence.fit, correct_bias, EVERY)

    def keep(layer, moments):
        _, bias = correct_bias(layer, moments)
        return layer, bias

    again = refine_layers(once.model, model, evidence.fit, keep, EVERY)
    assert serialize_model(again.model) == serialize_model(once.model)
    assert again.changed == ()


def test_layers_come_in_graph_order_and_each_sees_the_ones_before_it_changed():
    model, evidence, rewrite = quantized_net("npu-int8-symmetric")
    seen = []

    def silence(layer, moments):
        seen.append(moments)
        return replace(layer, integers=0 * layer.integers), 0 * moments.mean_out

    refine_layers(rewrite.model, model, evidence.fit, silence, EVERY)
    assert len(seen) == 4
    assert seen[0].mean_in.any()
    assert all(not m.mean_in.any() and not m.covariance.any() for m in seen[1:])
    assert all(m.mean_out.any() for m in seen)  # what is wanted is still the float model's


FORMS = [
    {"size": (9,), "kernel": (3,), "pads": [1, 2]},
    {"size": (9,), "kernel": (4,), "strides": [2], "auto_pad": "SAME_UPPER"},
    {"size": (6, 7), "kernel": (3, 2), "auto_pad": "NOTSET", "pads": [1, 0, 2, 1]},
    {"size": (6, 7), "kernel": (3, 2), "auto_pad": "VALID"},
    {"size": (6, 7), "kernel": (4, 2), "strides": [2, 3], "auto_pad": "SAME_UPPER"},
    {"size": (6, 7), "kernel": (4, 2), "strides": [2, 1], "auto_pad": "SAME_LOWER"},
    {"size": (8,), "kernel": (3,), "dilations": [2], "pads": [0, 2]},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_convolutions_of_every_form_see_the_inputs_they_get(form):
    """With the windows that a layer really sees, the corrected bias restores its means; with others it would not."""
    attributes = {k: v for k, v in form.items() if k not in ("size", "kernel")}
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 2, *form["kernel"])) + 0.5, "b": rng.standard_normal(6)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", group=2, **attributes),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], name="pool"),
    ]
    shape = ["N", 4, *form["size"]]
    proto = model_of(
        nodes,
        {k: v.astype(np.float32) for k, v in weights.items()},
        inputs={"x": shape},
        outputs={"y": ["N", 6, *(1 for _ in form["size"])]},
    )
    x = (rng.standard_normal((32, 4, *form["size"])) + 1).astype(np.float32)
    model, evidence = parsed(proto), evidence_of(x)
    rewrite = quantize(model, QuantizeStep(weight_bits=3), load_target("tensorrt"), evidence.table(model))
    made = refine_layers(rewrite.model, model, evidence.fit, correct_bias, 100)
    assert made.changed == ("conv",)
    assert made.skipped == ()
    wanted, ours, wrong = (layer_means(m, evidence)["conv"] for m in (model, made.model, rewrite.model))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert np.abs(wrong - wanted).max() > 0.05


def test_convolutions_in_three_dimensions_are_left_alone_and_named():
    w = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 2)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 1, 3, 3, 3]}, outputs={"y": ["N", 2, 2, 2, 2]})
    model = parsed(proto)
    evidence = evidence_of(np.random.default_rng(1).standard_normal((16, 1, 3, 3, 3)).astype(np.float32))
    rewrite = quantize(model, QuantizeStep(), load_target("x86-vnni"), evidence.table(model))
    made = refine_layers(rewrite.model, model, evidence.fit, correct_bias, 8)
    assert [(s.node, s.reason) for s in made.skipped] == [("conv", "it is not a convolution in one or two dimensions")]
