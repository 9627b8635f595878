"""The bias of a MatMul is what the Add behind it adds: found, corrected, and left alone where that would be wrong."""

import numpy as np
import onnx
import pytest
from models import model_of
from onnx import helper, numpy_helper
from quantizing import TARGETS, constants, profile, run_plain, written
from recovering import evidence_of, parsed
from transformers import EncoderShape, encoder_input, exported_encoder

from qcore.graph.io import serialize_model
from qcore.methods.correct_bias import correct_bias, correct_bias_analytically, inputs_of_layers
from qcore.methods.quantize import QuantizeStep, quantize
from qcore.recovery import channel_statistics
from qcore.refinement import refine_layers
from qcore.runtime.nodewise import expose
from qcore.target import load_target

IN, OUT, LENGTH = 6, 5, 4


def linear(bias, *, first=False, extra=(), outputs=()):
    """MatMul -> Add -> Relu -> MatMul, x (N, LENGTH, IN)."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((IN, OUT)).astype(np.float32),
        "w2": rng.standard_normal((OUT, 3)).astype(np.float32),
        "w3": rng.standard_normal((IN, OUT)).astype(np.float32),
    }
    if bias is not None:
        weights["b"] = np.asarray(bias, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="linear"),
        helper.make_node("Add", ["b", "m"] if first else ["m", "b"], ["s"], name="add"),
        helper.make_node("Relu", ["s"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="two"),
        *extra,
    ]
    shapes = {"y": ["N", LENGTH, 3]} | dict(outputs)
    return model_of(nodes, weights, inputs={"x": ["N", LENGTH, IN]}, outputs=shapes)


def samples(n=64, seed=3):
    """Inputs whose means are not zero: an error of the weights shifts the outputs."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, LENGTH, IN)) + np.linspace(0, 3, IN)).astype(np.float32)


def quantized(proto, target, x, **options):
    model, evidence = parsed(proto), evidence_of(x)
    target = load_target(target) if isinstance(target, str) else target
    return model, evidence, quantize(model, QuantizeStep(**options), target, evidence.table(model)).model


def means(model, node, evidence):
    """The mean of every channel that `node` makes; a Relu behind it may be gone, and with it the tensor's name."""
    tensor = next(n.outputs[0].name for n in model.graph if n.name == node)
    predict = expose(model, [tensor])
    return np.mean([predict(b)[tensor].reshape(-1, OUT).mean(axis=0, dtype=np.float64) for b in evidence.fit], axis=0)


def rounding(made, name="b"):
    """The step of the stored bias, 0 where it is float."""
    return constants(written(made)).get(f"{name}_scale", 0)


BIAS = np.linspace(-0.8, 0.9, OUT)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(OUT,), (1, 1, OUT)])
def test_the_means_behind_the_add_are_restored(target, first, shape):
    proto, x = linear(BIAS.reshape(shape), first=first), samples()
    model, evidence, wrong = quantized(proto, target, x, weight_bits=3)
    before = serialize_model(wrong)
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    assert serialize_model(wrong) == before
    assert "linear" in made.changed
    wanted = means(model, "add", evidence)
    # half a step of the stored bias, and what rounding between MatMul and Add leaves in a mean of 192 values
    allowed = 0.51 * rounding(made) + 0.02
    assert (np.abs(means(made.model, "add", evidence) - wanted) <= allowed).all()
    assert np.abs(means(wrong, "add", evidence) - wanted).max() > 2 * allowed


def test_the_analytic_correction_takes_the_means_of_the_last_axis():
    proto, x = linear(BIAS), samples()
    model, evidence, wrong = quantized(proto, "x86-vnni", x, weight_bits=3)
    rows = channel_statistics(model, evidence, dict.fromkeys(inputs_of_layers(model, "MatMul"), -1))
    assert rows["x"].mean.shape == (IN,)
    made = correct_bias_analytically(wrong, model, {}, rows)
    assert made.changed == ("linear",)
    error = [np.abs(means(m, "add", evidence) - means(model, "add", evidence)).max() for m in (wrong, made.model)]
    assert error[1] < 0.3 * error[0]


def other(op_type, inputs, output, name):
    return helper.make_node(op_type, inputs, [output], name=name)


REFUSED = {
    "two readers": (linear(BIAS, extra=[other("Neg", ["m"], "z", "neg")], outputs={"z": ["N", LENGTH, OUT]}),
                    "no Add behind it holds a bias"),
    "an output": (linear(BIAS, outputs={"m": ["N", LENGTH, OUT]}), "no Add behind it holds a bias"),
    "one value": (linear(0.5), "what is added to it is not one float value per output channel"),
    "per position": (linear(np.ones((LENGTH, OUT))), "what is added to it is not one float value per output channel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_bias_is_left_alone_and_named(case):
    proto, reason = REFUSED[case]
    model, evidence, wrong = quantized(proto, "x86-vnni", samples(), weight_bits=3)
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    assert made.changed == ()
    assert {s.node: s.reason for s in made.skipped} == {"linear": reason, "two": "no Add behind it holds a bias"}
    assert serialize_model(made.model) == serialize_model(wrong)


def test_a_residual_is_no_bias():
    proto = linear(BIAS)
    proto.graph.node[1].input[1] = "x"
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((IN, IN), np.float32), "w"))
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((IN, 3), np.float32), "w2"))
    model, evidence, wrong = quantized(proto, "x86-vnni", samples())
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    assert {s.reason for s in made.skipped} == {
        "what is added to it is not a constant",
        "no Add behind it holds a bias",
    }


def test_a_constant_that_two_layers_add_is_corrected_for_each_by_itself():
    proto = linear(BIAS, extra=[
        other("MatMul", ["x", "w3"], "m3", "three"), other("Add", ["m3", "b"], "z", "add3"),
    ], outputs={"z": ["N", LENGTH, OUT]})  # fmt: skip
    for options in ({}, {"exclude": ["add", "add3"]}):  # integers; one float initializer for both
        model, evidence, wrong = quantized(proto, "x86-vnni", samples(), weight_bits=3, **options)
        made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
        assert set(made.changed) == {"linear", "three"}
        for node in ("add", "add3"):
            np.testing.assert_allclose(means(made.model, node, evidence), means(model, node, evidence), atol=0.05)
        assert np.abs(means(wrong, "add3", evidence) - means(model, "add3", evidence)).max() > 0.1


@pytest.mark.parametrize("target", ["npu-int8-symmetric", "fixed-point-pow2", "x86-vnni"])
def test_a_bias_that_outgrows_its_parameters_gets_new_ones_of_the_same_form(target):
    proto, x = linear(np.full(OUT, 1e-3)), samples()
    model, evidence, wrong = quantized(proto, target, x, weight_bits=3)
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    old, new = constants(written_of(wrong)), constants(written(made))
    assert new["b_scale"] > 2 * old["b_scale"]
    if target != "x86-vnni":
        assert new["b_zero_point"] == 0
    if target == "fixed-point-pow2":
        assert np.frexp(new["b_scale"])[0] == 0.5
    assert (
        np.abs(means(made.model, "add", evidence) - means(model, "add", evidence)) <= 0.51 * new["b_scale"] + 0.02
    ).all()


def written_of(model):
    return onnx.ModelProto.FromString(serialize_model(model))


def test_a_device_that_wants_one_scale_for_all_tensors_of_an_add_keeps_it():
    target = profile("npu-int8-symmetric", one_scale=["Concat", "Add"])
    model, evidence, wrong = quantized(linear(BIAS), target, samples(), weight_bits=3)
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    old, new = constants(written_of(wrong)), constants(written(made))
    assert old["b_scale"] == new["b_scale"] == new["r_scale"]
    assert "linear" in made.changed  # the range of the sum holds the bias


def test_transformers_have_all_their_biases_corrected():
    shape = EncoderShape(layers=2)
    proto, x = exported_encoder(0, shape), encoder_input(shape, n=32)
    model, evidence, wrong = quantized(proto, "tensorrt", x, weight_bits=4)
    made = refine_layers(wrong, model, evidence.fit, correct_bias, 1)
    assert len(made.changed) == 13
    assert {s.reason for s in made.skipped} == {"both its inputs are activations"}
    assert np.isfinite(run_plain(written(made), x)).all()
