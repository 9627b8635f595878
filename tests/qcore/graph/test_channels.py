"""Which channels belong together, and which must stay and why."""

import numpy as np
import onnx
import pytest
from channelled import assert_nothing_lost, groups_of, grown
from models import conv_net, model_of
from onnx import TensorProto, helper
from transformers import EncoderShape, encoder

from qcore.graph.channels import channel_groups
from qcore.graph.io import parse_model

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def chain(*between: onnx.NodeProto, weights: dict | None = None, channels: int = 8, out: int | None = None):
    """Return conv `a` -> `between` (from a.out to b.in) -> conv `b`."""
    into = channels if out is None else out
    nodes = [
        helper.make_node("Conv", ["x", "a.w"], ["a.out"], name="a"),
        *between,
        helper.make_node("Conv", ["b.in" if between else "a.out", "b.w"], ["y"], name="b"),
    ]
    constants = {"a.w": normal(channels, 3, 1, 1), "b.w": normal(4, into, 1, 1), **(weights or {})}
    return model_of(nodes, constants, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 4, 4, 4]})


def reasons(proto: onnx.ModelProto) -> dict[str, str]:
    return {s.node: s.reason for s in groups_of(proto).skipped}


def test_a_residual_block_is_one_group_with_batch_norms_or_without():
    channels = groups_of(conv_net())
    (group,) = channels.groups
    assert (group.producers, group.consumers, group.size) == (("conv1", "pointwise"), ("pointwise", "fc"), 6)
    assert reasons(conv_net()) == {"fc": "its outputs reach y: it is a graph output"}
    places = {(a.tensor, a.axis) for a in channels.axes}
    assert {("w1", 0), ("gamma", 0), ("w2", 0), ("b2", 0), ("w3", 0), ("w3", 1), ("b3", 0), ("wf", 1)} <= places
    assert {("w1", 1), ("wf", 0)} & places == set()


def test_channels_are_mapped_to_blocks_of_a_flattened_matrix():
    channels = groups_of(grown(0, [], "Flatten"))
    axis = next(a for a in channels.axes if a.channel.size == 8 * 16)
    assert axis.channel.tolist() == np.repeat(np.arange(8), 16).tolist()


def test_channels_of_a_concat_keep_their_groups():
    channels = groups_of(grown(2, ["joined"], "pooled"))
    assert [g.size for g in channels.groups] == [8, 4]
    joined = next(a for a in channels.axes if set(a.group) == {0, 1} and a.tensor.startswith("concat"))
    assert joined.channel[:12].tolist() == [*range(8), *range(4)]


def test_a_grouped_convolution_loses_whole_groups():
    (group,) = groups_of(grown(0, ["grouped"], "pooled")).groups
    assert (group.size, group.width) == (2, 4)


def test_weights_that_layers_share_are_cut_once():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["p"], name="p"),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "w"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "last"], ["y"], name="last"),
    ]
    for rows in (4, 6):
        first = [helper.make_node("Conv", ["raw", "stem"], ["x"], name="stem")]
        proto = model_of(
            first + nodes,
            {"stem": normal(rows, 3, 1, 1), "w": normal(rows, rows, 1, 1), "last": normal(2, rows, 1, 1)},
            inputs={"raw": ["N", 3, 4, 4]},
            outputs={"y": ["N", 2, 4, 4]},
        )
        assert [g.producers for g in groups_of(proto).groups] == [("stem", "p", "r")]
        assert_nothing_lost(proto, rows)


def test_a_constant_that_something_else_reads_stays():
    nodes = [helper.make_node("Einsum", ["a.out", "s"], ["b.in"], name="e", equation="nchw,c->nchw")]
    assert reasons(chain(*nodes, weights={"s": normal(8)}))["a"].startswith("its outputs reach e: channels are not")
    scale = [helper.make_node("Mul", ["a.out", "s"], ["b.in"], name="m")]
    proto = chain(*scale, weights={"s": normal(8, 1, 1)})
    assert [g.size for g in groups_of(proto).groups] == [8]
    proto.graph.node.append(helper.make_node("Softmax", ["s"], ["z"], name="reads"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [8, 1, 1]))
    assert groups_of(proto).groups == ()
    assert reasons(proto)["a"] == "its outputs reach reads: it reads a constant, or its axis is computed"


@pytest.mark.parametrize(("ir_version", "free"), [(3, True), (8, False)])
def test_a_constant_that_a_caller_may_replace_stays(ir_version, free):
    proto = chain()
    proto.ir_version = ir_version
    names = [i.name for i in proto.graph.initializer] if ir_version == 3 else ["a.w"]
    shapes = {i.name: i.dims for i in proto.graph.initializer}
    proto.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in names)
    assert bool(groups_of(proto).groups) == free
    if not free:
        assert reasons(proto)["a"] == "its outputs reach a.w: a constant of it is also a graph input"


def test_a_channel_shuffle_stays():
    weights = {"apart": np.array([0, 2, 4, 4, 4], np.int64), "together": np.array([0, 8, 4, 4], np.int64)}
    nodes = [
        helper.make_node("Reshape", ["a.out", "apart"], ["s"], name="apart"),
        helper.make_node("Transpose", ["s"], ["t"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["t", "together"], ["b.in"]),
    ]
    assert reasons(chain(*nodes, weights=weights))["a"] == "its outputs reach apart: it takes channels apart"


def test_what_a_subgraph_reads_stays():
    inner = helper.make_graph(
        [helper.make_node("Relu", ["a.out"], ["in"])], "g", [], [helper.make_tensor_value_info("in", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a.out"], ["no"])], "h", [], [helper.make_tensor_value_info("no", 1, None)]
    )
    proto = chain(
        helper.make_node("If", ["c"], ["b.in"], name="if", then_branch=inner, else_branch=other),
        weights={"c": np.array(True)},
    )
    assert groups_of(proto).groups == ()
    assert "it is in a subgraph" in reasons(proto)["a"]


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([helper.make_node("Resize", ["a.out", "", "s"], ["b.in"], name="n")], {"s": [1.0, 1, 1, 1]}),
        ([helper.make_node("Pad", ["a.out", "p"], ["b.in"], name="n")], {"p": [0] * 8}),
        ([helper.make_node("Resize", ["a.out", "", "", "z"], ["b.in"], name="n")], {"z": [1, 8, 4, 4]}),
    ],
)
def test_channels_through_operators_with_numbers_for_every_axis(nodes, weights):
    arrays = {k: np.array(v, np.float32 if k == "s" else np.int64) for k, v in weights.items()}
    proto = chain(*nodes, weights=arrays)
    if "z" in weights:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert [g.size for g in groups_of(proto).groups] == [8]
    assert_nothing_lost(proto, 0)


def test_an_exported_flatten_with_a_computed_batch_is_followed():
    x = [
        helper.make_node("Conv", ["x", "a.w"], ["a.out"], name="a"),
        helper.make_node("Shape", ["a.out"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["a.out", "wanted"], ["flat"], name="reshape"),
        helper.make_node("Gemm", ["flat", "b.w"], ["y"], name="b"),
    ]
    weights = {"a.w": normal(8, 3, 1, 1), "b.w": normal(8 * 16, 4), "zero": np.array(0), "axes": np.array([0])}
    for rest, free in ((-1, True), (128, False)):
        proto = model_of(
            x, {**weights, "rest": np.array([rest])}, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 4]}
        )
        assert bool(groups_of(proto).groups) == free, reasons(proto)
        assert_nothing_lost(proto, 1)


def test_hidden_units_of_a_transformer_go_and_its_stream_stays():
    proto = encoder(0, EncoderShape())
    assert [(g.producers, g.consumers) for g in groups_of(proto).groups] == [(("layer0.up",), ("layer0.down",))]
    assert_nothing_lost(proto, 3)


def test_quantized_models_have_no_free_channels():
    nodes = [
        helper.make_node("QuantizeLinear", ["a.out", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["b.in"]),
    ]
    assert groups_of(chain(*nodes, weights={"s": np.float32(0.1).reshape(())})).groups == ()


def test_groups_of_layers_without_names_can_be_told_apart():
    proto = grown(0, ["plain", "plain"], "pooled")
    for node in proto.graph.node:
        node.name = "same"
    groups = channel_groups(parse_model(proto.SerializeToString(), "m")).groups
    assert len({g.name for g in groups}) == len(groups) > 1
