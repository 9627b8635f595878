"""Layers fitted to what they should make."""

import numpy as np
import onnx
import pytest
from channelled import grown, run_all
from models import model_of
from onnx import helper
from recovering import Net, evidence_of, images, parsed
from transformers import EncoderShape, encoder, encoder_input

from qcore.graph.channels import channel_groups
from qcore.graph.io import serialize_model
from qcore.graph.slicing import remove_channels
from qcore.methods.prune_channels import axes_to_measure, importances, masks, without_channels
from qcore.numerics.error import normalised_mse
from qcore.reconstruction import refit_layers
from qcore.recovery import channel_statistics


def copied_channels(seed: int = 0):
    """A net whose hidden channel 5 is twice channel 2."""
    net = Net(seed)
    net.conv(8, 1)
    net.weights["k0"][5], net.weights["k1"][5] = 2 * net.weights["k0"][2], 2 * net.weights["k1"][2]
    net.relu()
    net.conv(6, 3)
    net.relu()
    return net.head()


def output(model, x):
    return run_all(serialize_model(model), {"x": x})[0]


def test_a_channel_that_another_one_can_stand_for_goes_without_a_trace():
    model, x = parsed(copied_channels()), images(128)
    channels = channel_groups(model)
    keep = {"conv0": np.arange(8) != 5}
    pruned = remove_channels(model, channels, keep).model
    rows = {a.tensor: channels.kept(a, keep) for a in channels.axes}
    before = serialize_model(pruned)
    rewrite = refit_layers(pruned, model, rows, evidence_of(x).fit, 36)
    assert serialize_model(pruned) == before
    onnx.checker.check_model(onnx.ModelProto.FromString(serialize_model(rewrite.model)), full_check=True)
    want, new = output(model, images(32, seed=9)), images(32, seed=9)
    assert normalised_mse(want, output(rewrite.model, new)) < 0.05 * normalised_mse(want, output(pruned, new))
    assert "conv2" in rewrite.changed


@pytest.mark.parametrize(
    ("blocks", "head"), [(["separable"], "pooled"), (["residual"], "literal"), (["joined"], "pooled")]
)
def test_layers_come_nearer_on_samples_that_they_were_not_fitted_to(blocks, head):
    model, evidence = parsed(grown(3, blocks, head)), evidence_of(images(256, size=4))
    channels = channel_groups(model)
    stats = channel_statistics(model, evidence, axes_to_measure(channels))
    scores = importances(model, channels, "response", stats)
    keep = masks(channels, scores, {g.name: max(1, g.size * 3 // 4) for g in channels.groups})
    pruned = without_channels(model, channels, keep, stats).model
    rows = {a.tensor: channels.kept(a, keep) for a in channels.axes}
    fitted = refit_layers(pruned, model, rows, evidence.fit, 16).model
    new = images(128, seed=11, size=4)
    want = output(model, new)
    assert normalised_mse(want, output(fitted, new)) < normalised_mse(want, output(pruned, new))
    again = refit_layers(pruned, model, rows, evidence.fit, 16).model
    assert serialize_model(again) == serialize_model(fitted)


def test_hidden_layers_of_a_transformer_are_fitted_with_the_bias_of_their_add():
    shape = EncoderShape()
    model, x = parsed(encoder(0, shape)), encoder_input(shape, n=128)
    channels = channel_groups(model)
    keep = {"layer0.up": np.arange(channels.groups[0].size) % 4 > 0}
    pruned = remove_channels(model, channels, keep).model
    rows = {a.tensor: channels.kept(a, keep) for a in channels.axes}
    fitted = refit_layers(pruned, model, rows, evidence_of(x).fit, 16)
    assert {"layer0.up", "layer0.down"} & set(fitted.changed) >= {"layer0.down"}
    assert normalised_mse(output(model, x), output(fitted.model, x)) < normalised_mse(
        output(model, x), output(pruned, x)
    )


def test_weights_that_are_shared_or_odd_are_left_alone_with_the_reason():
    w = np.eye(3, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="two"),
        helper.make_node("Gemm", ["b", "v"], ["y"], name="scaled", alpha=2.0),
    ]
    model = parsed(model_of(nodes, {"w": w, "v": w + 1}, inputs={"x": ["N", 3]}, outputs={"y": ["N", 3]}))
    samples = [{"x": np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)}]
    rewrite = refit_layers(model, model, {}, samples, 4)
    assert rewrite.changed == ()
    assert [(s.node, s.reason) for s in rewrite.skipped] == [
        ("one", "its weights are not float32 constants of its own"),
        ("two", "its weights are not float32 constants of its own"),
        ("scaled", "Gemm with alpha, beta or transA"),
    ]
