"""Which channels matter, and biases that make up for the means of those that go."""

import numpy as np
import pytest
from channelled import grown, run_all
from models import conv_net
from recovering import Net, evidence_of, images, parsed

from qcore.graph.channels import channel_groups
from qcore.graph.cost import model_macs
from qcore.graph.io import serialize_model
from qcore.graph.slicing import remove_channels
from qcore.methods.prune_channels import (
    PruneChannelsStep,
    axes_to_measure,
    cost_terms,
    counts_to_try,
    importances,
    masks,
    without_channels,
)
from qcore.recovery import channel_statistics


def measured(proto, x):
    model = parsed(proto)
    channels = channel_groups(model)
    return model, channels, channel_statistics(model, evidence_of(x), axes_to_measure(channels))


def constant_channels(seed: int = 0, bias: bool = True):
    """A net whose hidden channels 1 and 3 do not depend on the input: a bias alone makes them."""
    net = Net(seed)
    net.conv(8, 1)
    w, b = net.weights["k0"], net.weights["k1"]
    w[[1, 3]], b[[1, 3]] = 0, [0.7, 1.5]
    net.relu()
    net.conv(6, 1, bias=bias)
    net.relu()
    return net.head()


@pytest.mark.parametrize("bias", [True, False])
def test_a_channel_that_is_constant_goes_without_a_trace(bias):
    proto, x = constant_channels(bias=bias), images()
    model, channels, stats = measured(proto, x)
    scores = importances(model, channels, "response", stats)
    assert set(np.argsort(scores["conv0"])[:2]) == {1, 3}
    keep = masks(channels, scores, {"conv0": 6})
    assert np.flatnonzero(~keep["conv0"]).tolist() == [1, 3]
    want = run_all(proto.SerializeToString(), {"x": x})[0]
    got, bare = (
        run_all(serialize_model(m), {"x": x})[0]
        for m in (without_channels(model, channels, keep, stats).model, remove_channels(model, channels, keep).model)
    )
    scale = np.abs(want).max()
    assert np.abs(want - got).max() < 1e-4 * scale < 1e-2 * scale < np.abs(want - bare).max()


@pytest.mark.parametrize("head", ["literal", "pooled"])
def test_means_reach_flattened_matrices_and_adds_behind_a_matmul(head):
    proto, x = grown(4, ["plain"], head), images(size=4)
    model, channels, stats = measured(proto, x)
    scores = importances(model, channels, "response", stats)
    want, lost = run_all(proto.SerializeToString(), {"x": x})[0].mean(axis=0), np.zeros(2)
    for group in channels.groups:
        keep = masks(channels, scores, {group.name: group.size // 2})
        made = [without_channels(model, channels, keep, known).model for known in (stats, {})]
        means = [run_all(serialize_model(m), {"x": x})[0].mean(axis=0) for m in made]
        lost += [np.abs(mean - want).sum() for mean in means]
    assert lost[0] < 0.7 * lost[1]


def test_magnitudes_are_those_of_the_filters():
    proto = conv_net()
    model, channels, _ = measured(proto, images(size=8))
    weights = {i.name: i for i in proto.graph.initializer}
    import onnx

    power = [
        np.square(onnx.numpy_helper.to_array(weights[n]).astype(np.float64)).sum(axis=(1, 2, 3)) for n in ("w1", "w3")
    ]
    want = np.sqrt(sum(p / p.mean() for p in power))
    assert np.allclose(importances(model, channels, "magnitude", {})["conv1"], want)
    assert np.allclose(importances(model, channels, "response", {})["conv1"], want)


def test_counts_are_multiples_that_respect_every_limit():
    (group,) = channel_groups(parsed(constant_channels())).groups[:1]
    assert counts_to_try(group, PruneChannelsStep(multiple=4, min_channels=1)) == (8, 4)
    assert counts_to_try(group, PruneChannelsStep(multiple=2, min_channels=3)) == (8, 6, 4)
    assert counts_to_try(group, PruneChannelsStep(multiple=1, min_channels=1)) == (8, 7, 6, 5, 4, 3, 2, 1)
    assert counts_to_try(group, PruneChannelsStep()) == (8, 4)
    wide = channel_groups(parsed(grown(0, ["grouped"], "pooled"))).groups[0]
    assert counts_to_try(wide, PruneChannelsStep(multiple=4, min_channels=4)) == (2, 1)


def test_a_part_of_a_split_keeps_a_channel():
    channels = channel_groups(parsed(grown(0, ["halves"], "pooled")))
    group = next(g for g in channels.groups if g.name == "conv1")
    keep = masks(channels, {"conv1": np.arange(8.0)}, {"conv1": 4})
    assert keep["conv1"].tolist() == [False] * 3 + [True] * 5
    assert group.size == 8


@pytest.mark.parametrize("what", ["macs", "size"])
@pytest.mark.parametrize("blocks", [["separable", "joined"], ["grouped", "residual"], ["gate", "halves"]])
def test_costs_that_are_foreseen_are_those_of_the_smaller_model(blocks, what):
    model = parsed(grown(1, blocks, "literal"))
    channels = channel_groups(model)
    terms = cost_terms(model, channels, [g.name for g in channels.groups], what)
    full = model_macs(model) if what == "macs" else len(serialize_model(model))
    assert terms.at(np.ones(len(channels.groups))) == pytest.approx(full)
    half = {g.name: np.arange(g.size) % 2 == 0 for g in channels.groups}
    smaller = remove_channels(model, channels, half).model
    left = model_macs(smaller) if what == "macs" else len(serialize_model(smaller))
    shares = np.array([half[g.name].mean() for g in channels.groups])
    assert terms.at(shares) == pytest.approx(left, rel=1e-9 if what == "macs" else 0.05)


def test_what_is_limited():
    assert PruneChannelsStep().budgets == {"macs": 0.6, "latency": 0.75}
    assert PruneChannelsStep(size=0.3).budgets == {"size": 0.3}
    assert PruneChannelsStep(macs=0.6, latency=0.75).budgets == {"macs": 0.6, "latency": 0.75}
