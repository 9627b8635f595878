"""Recipes with recovery: steps are kept only where the held-out error falls, and the same run gives the same bytes."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from models import conv_net, save, write_data
from quantizing import profile, samples
from recovering import Net, evidence_of, images, outlier_net, parsed, recipe_with
from transformers import EncoderShape, encoder, encoder_input, exported_encoder, with_outliers

from qcore.compression import compress
from qcore.config import check_config
from qcore.errors import ConfigError
from qcore.graph.io import serialize_model
from qcore.lint import lint
from qcore.methods.correct_bias import correct_bias
from qcore.recipe import Recipe, check_order, load_recipe
from qcore.recovery import output_distance
from qcore.refinement import refine_layers
from qcore.target import load_target

MENDING = [
    {"method": "correct-bias"},
    {"method": "correct-bias", "kind": "analytic"},
    {"method": "round-weights"},
    {"method": "round-weights", "pull": 0.1},
]
TARGETS = ["npu-int8-symmetric", "x86-avx2", "tensorrt", "fixed-point-pow2"]


def read(model):
    proto = onnx.ModelProto.FromString(serialize_model(model))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def step_of(made, method):
    return next(s for s in made.steps if s.method == method)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["int8-equalized", "int8-rounded", "int4-rounded"])
def test_recovery_never_takes_a_model_further_from_float(recipe, target):
    proto = outlier_net()
    model, evidence, loaded = parsed(proto), evidence_of(images()), load_recipe(recipe)
    plain = loaded.model_copy(update={"steps": tuple(s for s in loaded.steps if s.method in
                              ("fold-batchnorm", "gemm-head", "quantize"))})  # fmt: skip
    before = serialize_model(model)
    made = compress(model, loaded, load_target(target), evidence)
    assert serialize_model(model) == before
    bare = compress(model, plain, load_target(target), evidence).model
    assert made.error < output_distance(bare, model, evidence)
    fresh = replace(evidence, held_out=({"x": images(64, seed=6)},))
    assert output_distance(made.model, model, fresh) < output_distance(bare, model, fresh)
    read(made.model)
    for step in made.steps:
        if step.error_after is not None:
            assert step.kept == (step.error_after < step.error_before)
            assert bool(step.changed) == step.kept


def test_what_is_kept_is_made_again_from_all_samples():
    model, evidence, target = parsed(outlier_net()), evidence_of(images()), load_target("x86-vnni")
    made = compress(model, recipe_with({"method": "correct-bias"}, weight_bits=4), target, evidence)
    assert step_of(made, "correct-bias").kept
    bare = compress(model, recipe_with(weight_bits=4), target, evidence)
    again = refine_layers(bare.model, made.reference, evidence.fit + evidence.held_out, correct_bias, 64)
    assert serialize_model(made.model) == serialize_model(again.model)
    few = recipe_with({"method": "correct-bias", "samples": 8}, weight_bits=4)
    asked = refine_layers(bare.model, made.reference, evidence.fit[:1], correct_bias, 64)
    assert serialize_model(compress(model, few, target, evidence).model) == serialize_model(asked.model)


@pytest.mark.parametrize("step", MENDING[:3])
def test_layers_without_a_bias_get_one_that_the_target_knows(step):
    model, target = parsed(outlier_net(bias=False)), load_target("tensorrt")
    made = compress(model, recipe_with(step, weight_bits=4), target, evidence_of(images()))
    assert step_of(made, step["method"]).error_after > 0
    found = {f.rule for f in lint(made.model, target)}
    assert "bias" not in found


def test_powers_of_two_stay_powers_of_two():
    made = compress(parsed(outlier_net()), load_recipe("int4-rounded"), load_target("fixed-point-pow2"),
                    evidence_of(images()))  # fmt: skip
    assert step_of(made, "round-weights").kept
    scales = [onnx.numpy_helper.to_array(i) for i in read(made.model).graph.initializer if i.name.endswith("_scale")]
    assert scales
    assert all((np.frexp(s)[0] == 0.5).all() for s in scales)


def test_four_bits_need_second_order_rounding():
    """Behind the first layers channels move together, as in every trained net."""
    proto = outlier_net()
    mix = np.random.default_rng(1).standard_normal((3, 3))[:, :1] * np.ones((3, 3)) + 0.2 * np.eye(3)
    x = np.einsum("oc,nchw->nohw", mix, images(96)).astype(np.float32)
    made = compress(parsed(proto), load_recipe("int4-rounded"), load_target("x86-avx2"), evidence_of(x))
    step = step_of(made, "round-weights")
    assert step.kept
    assert step.error_after < 0.5 * step.error_before


@pytest.mark.parametrize("step", MENDING)
def test_the_same_run_gives_the_same_bytes(step):
    recipe, target = recipe_with({"method": "equalize"}, step, weight_bits=4), load_target("npu-int8-symmetric")
    one, two = (compress(parsed(conv_net()), recipe, target, evidence_of(samples(conv_net()))) for _ in range(2))
    assert serialize_model(one.model) == serialize_model(two.model)
    assert one.steps == two.steps


SCRIPT = """
import sys
from pathlib import Path
from qcore import steps
steps.compress(model=Path(sys.argv[1]), data=Path(sys.argv[2]), out=Path(sys.argv[3]), recipe="int8-rounded",
               target="npu-int8-symmetric")
"""


@pytest.mark.slow
def test_the_same_bytes_whatever_the_hash_seed(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.onnx"
        command = [sys.executable, "-P", "-c", SCRIPT, *map(str, (model, card, out))]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("step", MENDING[:3])
def test_what_helps_only_the_samples_it_was_fitted_to_is_not_kept(step):
    x = images()
    evidence = evidence_of(x)
    strange = tuple({"x": np.full_like(b["x"], 9.0)} for b in evidence.fit)
    recipe = recipe_with(step, weight_bits=3)
    made = compress(parsed(outlier_net()), recipe, load_target("x86-avx2"), replace(evidence, fit=strange))
    tried = step_of(made, step["method"])
    assert not tried.kept
    assert tried.changed == ()
    assert tried.error_after > tried.error_before
    assert made.error == tried.error_before
    bare = compress(parsed(outlier_net()), recipe_with(weight_bits=3), load_target("x86-avx2"), evidence)
    assert serialize_model(made.model) == serialize_model(bare.model)


@pytest.mark.parametrize("step", MENDING)
@pytest.mark.parametrize("target", ["npu-int8-symmetric", "x86-vnni"])
def test_transformers_are_mended_too(step, target):
    if step["method"] == "round-weights":
        step = {**step, "gain": 0}  # a LayerNormalization restores what has faded
    shape = EncoderShape()
    proto, x = encoder(0, shape), encoder_input(shape, n=64)
    made = compress(parsed(proto), recipe_with(step, weight_bits=4), load_target(target), evidence_of(x))
    read(made.model)
    mended = step_of(made, step["method"])
    stacks = {s.node for s in mended.skipped if s.reason == "both its inputs are activations"}
    assert stacks == {"layer0.attention.scores", "layer0.attention.mix"}
    if step["method"] == "round-weights":
        assert mended.kept
        assert {"head", "layer0.up", "layer0.down", "layer0.attention.q"} <= set(mended.changed)
    elif mended.kept:  # the Add behind a MatMul holds its bias
        assert {"head", "layer0.up", "layer0.down", "layer0.attention.q"} <= set(mended.changed)


@pytest.mark.parametrize("step", MENDING)
def test_layers_in_more_bits_are_passed_by_or_mended(step):
    convs = [n.name for n in outlier_net().graph.node if n.op_type == "Conv"]
    recipe = recipe_with(step, precision={convs[1]: "int16"}, weight_bits=4)
    made = compress(parsed(outlier_net()), recipe, load_target("npu-int8-symmetric"), evidence_of(images()))
    assert step_of(made, step["method"]).error_after > 0
    read(made.model)
    left = recipe_with(step, exclude=[convs[1]], weight_bits=4)
    made = compress(parsed(outlier_net()), left, load_target("x86-avx2"), evidence_of(images()))
    mended = step_of(made, step["method"])
    assert [(s.node, s.reason) for s in mended.skipped] == [(convs[1], "its weights are not integers")]


@pytest.mark.parametrize("step", MENDING)
def test_integer_inputs_and_outputs_are_judged_as_the_numbers_they_stand_for(step):
    model, evidence = parsed(outlier_net()), evidence_of(images())
    recipe = recipe_with({"method": "equalize"}, step)
    plain = compress(model, recipe, load_target("npu-int8-symmetric"), evidence)
    made = compress(model, recipe, profile("npu-int8-symmetric", integer_io=True), evidence)
    assert made.error == pytest.approx(plain.error, rel=0.2)


def test_float_models_of_a_recipe_say_what_was_quantized():
    made = compress(parsed(outlier_net()), load_recipe("int8-equalized"), load_target("npu-int8-symmetric"),
                    evidence_of(images()))  # fmt: skip
    assert step_of(made, "equalize").kept
    names = set(made.reference.graph.initializers)
    assert any(n.endswith(".weight_equalized") for n in names)
    assert output_distance(made.reference, parsed(outlier_net()), evidence_of(images())) < 1e-8


def net_without_biases():
    net = Net(0)
    net.conv(6, bias=False)
    net.relu()
    net.conv(6, group=2, bias=False)
    net.relu()
    net.op("GlobalAveragePool", [net.at])
    net.op("Flatten", [net.at])
    net.op("Gemm", [net.at, net.constant(net.normal(6, 5))])
    return net.model(["N", 5])


@pytest.mark.parametrize("target", ["npu-int8-symmetric", "x86-vnni"])
def test_layers_without_a_bias_get_one(target):
    recipe = recipe_with({"method": "correct-bias"}, weight_bits=3)
    made = compress(parsed(net_without_biases()), recipe, load_target(target), evidence_of(images()))
    layers = [n for n in read(made.model).graph.node if n.op_type in ("Conv", "Gemm")]
    assert step_of(made, "correct-bias").kept
    assert [len(n.input) for n in layers] == [3, 3, 3]


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_four_bits_take_half_a_byte_only_where_the_target_stores_them_so(weights, bits):
    recipe = load_recipe("int4-rounded")
    assert "A weight still takes one byte" in recipe.description
    target = profile("npu-int8-symmetric", weights=weights)
    graph = read(compress(parsed(outlier_net()), recipe, target, evidence_of(images())).model).graph
    stored = [i for i in graph.initializer if len(i.dims) > 1]
    assert stored
    assert {8 * len(i.raw_data) // np.prod(i.dims) for i in stored} == {bits}


def steps_of(*methods):
    value = {"name": "wrong", "steps": [m if isinstance(m, dict) else {"method": m} for m in methods]}
    return check_config(value, Recipe, "recipe")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("quantize", "equalize"), "step equalize follows quantize; allowed behind it: correct-bias, round-weights"),
        (("quantize", "quantize"), "step quantize follows quantize"),
        (("quantize", "fold-batchnorm"), "step fold-batchnorm follows quantize"),
        (("correct-bias", "quantize"), "step correct-bias mends a quantized model; put it behind quantize"),
        (("round-weights",), "step round-weights mends a quantized model; put it behind quantize"),
        (("fold-batchnorm", "equalize"), "step equalize prepares for quantize, which is missing; add it"),
        (("smooth", "quantize-dynamic"), "step smooth prepares for quantize, which is missing; add it"),
        (("absorb-bias",), "step absorb-bias prepares for quantize, which is missing; add it"),
        (
            ({"method": "quantize", "form": "qoperator"}, "correct-bias"),
            "step correct-bias mends QDQ models; allowed: form: qdq",
        ),
    ],
)
def test_orders_that_make_no_sense_are_refused(methods, message):
    with pytest.raises(ConfigError, match=f"recipe wrong: {message}"):
        check_order(steps_of(*methods))
    with pytest.raises(ConfigError, match=message):
        compress(parsed(conv_net()), steps_of(*methods), load_target("x86-vnni"), None)


def test_a_scale_per_channel_where_the_device_has_one_is_refused():
    with pytest.raises(ConfigError, match="asks for a scale per channel, which npu-int8-symmetric cannot use"):
        compress(parsed(conv_net()), recipe_with(per_channel=True), load_target("npu-int8-symmetric"),
                 evidence_of(samples(conv_net())))  # fmt: skip


def test_one_scale_per_tensor_may_be_asked_of_any_device():
    made = compress(parsed(conv_net()), recipe_with(per_channel=False), load_target("x86-vnni"),
                    evidence_of(samples(conv_net())))  # fmt: skip
    scales = [i for i in read(made.model).graph.initializer if i.name.endswith("_scale")]
    assert scales
    assert all(list(i.dims) in ([], [1]) for i in scales)


@pytest.mark.parametrize("recipe", ["int8", "int8-equalized", "int8-rounded", "int8-smoothed"])
def test_without_data_nothing_is_quantized(recipe):
    with pytest.raises(ConfigError, match=f"recipe {recipe} needs calibration data; run `qcore compress` with --data"):
        compress(parsed(conv_net()), load_recipe(recipe), load_target("x86-vnni"), None)


@pytest.mark.parametrize("build", [encoder, exported_encoder])
@pytest.mark.parametrize("target", ["x86-vnni", "npu-int8-symmetric", "tensorrt"])
def test_smoothing_brings_transformers_with_outlier_channels_closer_to_float(build, target):
    shape = EncoderShape()
    model, x = parsed(with_outliers(build(0, shape))), encoder_input(shape, n=96)
    made = compress(model, recipe_with({"method": "smooth"}), load_target(target), evidence_of(x))
    step = step_of(made, "smooth")
    assert step.kept
    assert step.error_after < 0.5 * step.error_before
    assert {"layer0.attention.q", "layer0.attention.k", "layer0.attention.v", "layer0.up"} <= set(step.changed)
    assert output_distance(made.reference, model, evidence_of(x)) < 1e-8
    before = [n.op_type for n in model.graph]
    assert [n.op_type for n in made.reference.graph] == before  # no Mul of its own: it would be rounded too
    assert {s.reason for s in step.skipped} > {"its weights are not a constant float32 matrix"}
    read(made.model)


def test_a_net_without_anything_to_smooth_comes_back_as_it_was():
    net = Net(0)
    net.conv(4)
    net.relu()
    proto, target = net.model(["N", 4, 6, 6]), load_target("x86-vnni")
    made = compress(parsed(proto), recipe_with({"method": "smooth"}), target, evidence_of(images()))
    plain = compress(parsed(proto), recipe_with(), target, evidence_of(images()))
    assert not step_of(made, "smooth").kept
    assert serialize_model(made.model) == serialize_model(plain.model)


@pytest.mark.parametrize("target", TARGETS)
def test_the_smoothed_recipe_never_takes_a_transformer_further_from_float(target):
    model, x = parsed(exported_encoder(1, EncoderShape())), encoder_input(EncoderShape(), n=64)
    recipe = load_recipe("int8-smoothed")
    made = compress(model, recipe, load_target(target), evidence_of(x))
    bare = tuple(s for s in recipe.steps if s.method not in ("smooth", "correct-bias"))
    plain = recipe.model_copy(update={"steps": bare})
    unmended = compress(model, plain, load_target(target), evidence_of(x))
    assert made.error <= output_distance(unmended.model, model, evidence_of(x))
    again = compress(model, recipe, load_target(target), evidence_of(x))
    assert serialize_model(again.model) == serialize_model(made.model)
