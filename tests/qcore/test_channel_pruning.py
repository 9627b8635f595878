"""The recipe step prune-channels: budgets hold, what is lost is measured, refusals are in words."""

import numpy as np
import onnx
import pytest
from channelled import run_all
from models import conv_net
from quantizing import quantized
from recovering import Net, evidence_of, images, parsed

from qcore import channel_pruning
from qcore.channel_pruning import prune_channels
from qcore.config import check_config
from qcore.errors import ModelError
from qcore.graph.channels import channel_groups
from qcore.graph.cost import model_macs
from qcore.graph.io import serialize_model
from qcore.methods.prune_channels import PruneChannelsStep
from qcore.recipe import Recipe
from qcore.recovery import output_distance

SMALL = {"multiple": 2, "min_channels": 2}


def wide_net(seed: int = 0, channels: int = 16) -> onnx.ModelProto:
    net = Net(seed, size=8)
    net.conv(channels)
    net.relu()
    start = net.at
    net.conv(channels)
    net.relu()
    net.conv(channels)
    net.add(start)
    net.depthwise()
    net.clip()
    net.conv(channels, 1)
    net.gate()
    return net.head()


def evidence(n: int = 128):
    return evidence_of(images(n, size=8))


def cost(rewrite, what):
    return next(r for r in rewrite.resized if r.what == what and not r.of)


def recipe(*given) -> Recipe:
    return check_config({"name": "t", "steps": list(given)}, Recipe, "t")


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"macs": 0.3}, {"size": 0.6}])
@pytest.mark.parametrize("criterion", ["response", "magnitude"])
def test_the_budget_holds_and_the_file_is_valid(budget, criterion):
    model = parsed(wide_net())
    before = serialize_model(model)
    rewrite = prune_channels(model, PruneChannelsStep(**SMALL, **budget, criterion=criterion), evidence())
    assert serialize_model(model) == before
    data = serialize_model(rewrite.model)
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    assert run_all(data, {"x": images(2, size=8)})[0].shape == (2, 5)
    ((what, share),) = budget.items()
    name = {"macs": "macs", "size": "size_bytes"}[what]
    assert cost(rewrite, name).after <= share * cost(rewrite, name).before * (1.05 if what == "size" else 1)
    assert cost(rewrite, name).after > 0.8 * share * cost(rewrite, name).before
    assert cost(rewrite, "macs").after == model_macs(rewrite.model) < model_macs(model)
    assert cost(rewrite, "size_bytes").after == len(data)
    left = {r.of: (r.before, r.after) for r in rewrite.resized if r.what == "channels"}
    assert tuple(left) == rewrite.changed
    assert all(after % 2 == 0 and after >= 2 for _, after in left.values())
    assert ("gemm17", "its outputs reach y: it is a graph output") in [(s.node, s.reason) for s in rewrite.skipped]


def test_a_latency_budget_is_measured(monkeypatch):
    model, asked = parsed(wide_net()), []

    def by_macs(models, evidence):
        asked.append(len(models))
        return tuple(float(model_macs(m)) for m in models)

    monkeypatch.setattr(channel_pruning, "latencies", by_macs)  # a clock that does not depend on who else runs here
    rewrite = prune_channels(model, PruneChannelsStep(**SMALL, latency=0.5, reconstruct=False), evidence())
    assert cost(rewrite, "latency_ms").after <= 0.5 * cost(rewrite, "latency_ms").before
    assert len(asked) > 3


def test_several_budgets_hold_at_once(monkeypatch):
    model = parsed(wide_net())

    def by_size(models, evidence):
        return tuple(float(len(serialize_model(m))) for m in models)

    monkeypatch.setattr(channel_pruning, "latencies", by_size)  # another measure than macs, and no clock
    rewrite = prune_channels(model, PruneChannelsStep(**SMALL, latency=0.5, macs=0.6, reconstruct=False), evidence())
    assert cost(rewrite, "latency_ms").after <= 0.5 * cost(rewrite, "latency_ms").before
    assert cost(rewrite, "macs").after <= 0.6 * cost(rewrite, "macs").before
    with pytest.raises(ModelError, match=r"of latency is left, wanted 0.01; raise latency"):
        prune_channels(model, PruneChannelsStep(**SMALL, latency=0.01, macs=0.6), evidence())


def test_latencies_are_those_of_the_runtime():
    ms = channel_pruning.latencies((parsed(wide_net(channels=64)), parsed(wide_net(channels=4))), evidence(64))
    assert ms[0] > ms[1] > 0


def test_fitting_the_layers_loses_less_and_is_judged_on_held_out_samples():
    model, known = parsed(wide_net(1)), evidence(256)
    plain, fitted = (
        prune_channels(model, PruneChannelsStep(**SMALL, macs=0.6, reconstruct=r), known).model for r in (False, True)
    )
    assert output_distance(fitted, model, known) < output_distance(plain, model, known)


def test_scores_from_outside_decide_which_channels_go():
    model = parsed(wide_net())
    scores = {g.name: np.arange(float(g.size))[::-1] for g in channel_groups(model).groups}
    rewrite = prune_channels(model, PruneChannelsStep(**SMALL, macs=0.4, reconstruct=False), evidence(), scores)
    whole, left = (
        {
            i.name: onnx.numpy_helper.to_array(i)
            for i in onnx.ModelProto.FromString(serialize_model(m)).graph.initializer
        }
        for m in (model, rewrite.model)
    )
    assert len(rewrite.changed) > 1
    for name, array in left.items():
        corner = whole[name][tuple(slice(n) for n in array.shape)]
        assert array.ndim == 1 or np.array_equal(array, corner)  # biases have taken up means
    group = channel_groups(model).groups[1]
    with pytest.raises(ModelError, match=r"have shape \(3,\); allowed: \(16,\), finite"):
        prune_channels(model, PruneChannelsStep(**SMALL), evidence(), {group.name: np.ones(3)})
    with pytest.raises(ModelError, match="'nobody' have shape"):
        prune_channels(model, PruneChannelsStep(**SMALL), evidence(), {"nobody": np.ones(3)})


def test_what_is_excluded_or_small_is_left_alone_with_the_reason():
    model = parsed(wide_net())
    rewrite = prune_channels(model, PruneChannelsStep(**SMALL, macs=0.8, exclude=("conv2",)), evidence())
    reasons = {s.node: s.reason for s in rewrite.skipped}
    assert reasons["conv2"] == "excluded by the recipe"
    assert "conv2" not in rewrite.changed
    assert "multiple = 2" in reasons["conv10"]


def test_refusals():
    model = parsed(wide_net())
    with pytest.raises(ModelError, match=r"no channel can be removed: 4 groups, .* lower them"):
        prune_channels(model, PruneChannelsStep(multiple=16, min_channels=16), evidence())
    with pytest.raises(ModelError, match=r"the budget cannot be reached: .* of macs is left, wanted 0.05; raise macs"):
        prune_channels(model, PruneChannelsStep(macs=0.05), evidence())
    with pytest.raises(ModelError, match=r"is quantized; allowed: float models; prune channels first"):
        prune_channels(quantized(conv_net(), "x86-avx2").model, PruneChannelsStep(), evidence())
