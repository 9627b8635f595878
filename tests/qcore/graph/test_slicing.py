"""Removing channels: what is dead goes without a trace, the rest is refused."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from channelled import BLOCKS, WAYS, assert_nothing_lost, groups_of, grown, pruned
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_net

from qcore.errors import ModelError
from qcore.graph.channels import channel_groups
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.slicing import remove_channels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=5),
    head=st.sampled_from(("pooled", *WAYS)),
)
def test_removing_what_nobody_reads_changes_nothing(seed, blocks, head):
    channels = assert_nothing_lost(grown(seed, blocks, head), seed)
    assert channels.groups


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    blocks=st.lists(
        st.sampled_from(["plain", "residual", "separable", "joined", "halves", "moved", "gate"]), max_size=4
    ),
    head=st.sampled_from(("pooled", *WAYS)),
)
def test_removing_what_is_always_zero_changes_nothing(seed, blocks, head):
    assert_nothing_lost(grown(seed, blocks, head), seed, producers_dead=True)


def test_the_smaller_file_has_the_smaller_shapes_and_the_old_names():
    grew = onnx.shape_inference.infer_shapes(grown(1, ["separable", "residual"], "literal"))
    proto = onnx.ModelProto.FromString(serialize_model(parse_model(grew.SerializeToString(), "m")))
    channels = groups_of(proto)
    keep = {g.name: np.arange(g.size) % 2 == 0 for g in channels.groups}
    out = onnx.ModelProto.FromString(pruned(proto, keep))
    assert [n.name for n in out.graph.node] == [n.name for n in proto.graph.node]
    inner = {o for n in out.graph.node for o in n.output}
    shown = [v for v in out.graph.value_info if v.name in inner]
    assert {v.name for v in shown} == {v.name for v in proto.graph.value_info if v.name in inner}
    assert len(out.SerializeToString()) < 0.5 * len(proto.SerializeToString())
    again = {v.name: v for v in onnx.shape_inference.infer_shapes(out, strict_mode=True).graph.value_info}
    assert [v.type for v in shown] == [again[v.name].type for v in shown]
    assert groups_of(out).groups[0].size == channels.groups[0].size // 2


def test_what_cannot_be_removed_is_refused_in_words():
    model = parse_model(grown(0, ["halves"], "pooled").SerializeToString(), "m")
    channels = channel_groups(model)
    first = channels.groups[0]
    with pytest.raises(ModelError, match="'nothing' is not there; allowed: conv0"):
        remove_channels(model, channels, {"nothing": np.ones(3, bool)})
    with pytest.raises(ModelError, match="has 8 channels, the mask"):
        remove_channels(model, channels, {first.name: np.ones(3, bool)})
    with pytest.raises(ModelError, match="would lose all its channels"):
        remove_channels(model, channels, {first.name: np.zeros(8, bool)})
    split = next(g for g in channels.groups if g.name == "conv1")
    with pytest.raises(ModelError, match=r"split2.b would lose all its channels"):
        remove_channels(model, channels, {split.name: np.arange(8) < 4})
    half_fixed = replace(channels, groups=tuple(replace(g, free=np.arange(g.size) > 0) for g in channels.groups))
    with pytest.raises(ModelError, match="must stay"):
        remove_channels(model, half_fixed, {first.name: np.arange(8) > 0})


def test_nothing_to_remove_gives_the_same_model():
    model = parse_model(conv_net().SerializeToString(), "m")
    rewrite = remove_channels(model, channel_groups(model), {})
    assert rewrite.changed == ()
    assert serialize_model(rewrite.model) == serialize_model(model)
