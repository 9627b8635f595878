"""The walk gives every layer what the whole graph would give it."""

import numpy as np
import onnx
import pytest
from models import conv_net
from quantizing import TARGETS, quantized, samples, written
from recovering import evidence_of
from transformers import EncoderShape, encoder, encoder_input

from qcore.errors import ModelError
from qcore.graph.edit import editable_copy
from qcore.graph.io import parse_model
from qcore.methods.quantize import QuantizeStep, quantize
from qcore.runtime.nodewise import expose, inputs_of, start_walk
from qcore.runtime.ort import load_as_written
from qcore.target import load_target

LAYERS = ("Conv", "Gemm", "MatMul")


def exposed(proto, tensor, batch):
    """What onnxruntime computes for one tensor when it runs the whole file, nothing optimized."""
    if tensor == proto.graph.input[0].name:
        return batch[tensor]
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    copy.graph.ClearField("output")
    copy.graph.output.append(onnx.ValueInfoProto(name=tensor))
    return load_as_written(copy.SerializeToString()).predict(batch)[tensor]


def batches_of(x, name="x"):
    return [{name: x[:5]}, {name: x[5:10]}, {name: x[10:12]}]


@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_gets_what_the_whole_graph_gives_it(target):
    proto = written(quantized(conv_net(), target, ranges="min-max"))
    batches = batches_of(samples(conv_net()))
    walk = start_walk(proto, batches)
    layers = [n for n in proto.graph.node if n.op_type in LAYERS]
    assert len(layers) == 4
    for layer in layers:
        made = list(inputs_of(walk, layer.name))
        assert len(made) == len(batches)
        for ours, batch in zip(made, batches, strict=True):
            np.testing.assert_array_equal(ours, exposed(proto, layer.input[0], batch))


@pytest.mark.parametrize("target", ["npu-int8-symmetric", "x86-vnni"])
def test_transformers_too(target):
    shape = EncoderShape()
    float_proto, x = encoder(0, shape), encoder_input(shape, n=12)
    model = parse_model(float_proto.SerializeToString(), "m")
    evidence = evidence_of(x)
    proto = written(quantize(model, QuantizeStep(), load_target(target), evidence.table(model)))
    batches = batches_of(x)
    walk = start_walk(proto, batches)
    stored = [n for n in proto.graph.node if n.op_type in LAYERS]
    assert len(stored) > 5
    for layer in stored:
        for ours, batch in zip(inputs_of(walk, layer.name), batches, strict=True):
            np.testing.assert_allclose(ours, exposed(proto, layer.input[0], batch), rtol=1e-6, atol=1e-6)


def test_a_weight_that_was_replaced_changes_what_follows_and_nothing_before():
    proto = written(quantized(conv_net(), "npu-int8-symmetric", ranges="min-max"))
    batches = batches_of(samples(conv_net()))
    layers = {n.name: n for n in proto.graph.node}
    plain, edited = start_walk(proto, batches), start_walk(proto, batches)

    def both(layer):
        return [np.concatenate(list(inputs_of(w, layer))) for w in (plain, edited)]

    np.testing.assert_array_equal(*both("depthwise"))
    stored = next(n for n in proto.graph.node if layers["depthwise"].input[1] in n.output).input[0]
    edited.constants[stored] = -edited.constants[stored]
    a, b = both("pointwise")
    assert (a != b).any()
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    for initializer in changed.graph.initializer:
        if initializer.name == stored:
            initializer.CopyFrom(onnx.numpy_helper.from_array(edited.constants[stored], stored))
    theirs = [exposed(changed, layers["pointwise"].input[0], batch) for batch in batches]
    np.testing.assert_array_equal(b, np.concatenate(theirs))


def test_what_nobody_needs_any_more_is_dropped():
    proto = written(quantized(conv_net(), "npu-int8-symmetric", ranges="min-max"))
    walk = start_walk(proto, batches_of(samples(conv_net())))
    list(inputs_of(walk, "fc"))
    assert "x" not in walk.tensors
    assert len(walk.tensors) == 1


@pytest.mark.parametrize("layer", ["nobody", "conv1"])
def test_a_layer_that_is_not_ahead_is_refused(layer):
    proto = written(quantized(conv_net(), "npu-int8-symmetric", ranges="min-max"))
    walk = start_walk(proto, batches_of(samples(conv_net())))
    list(inputs_of(walk, "fc"))
    with pytest.raises(ModelError, match=f"node '{layer}' does not come up; allowed: nodes of the quantized graph"):
        list(inputs_of(walk, layer))


def test_exposed_tensors_come_beside_the_outputs():
    model = editable_copy(parse_model(conv_net().SerializeToString(), "m"))
    batch = {"x": samples(conv_net(), 3)}
    made = expose(model, ["r1", "y"])(batch)
    assert set(made) == {"y", "r1"}
    np.testing.assert_allclose(made["r1"], exposed(conv_net(), "r1", batch), atol=1e-5)
    assert len(model.graph.outputs) == 1
