"""A chain of full rank computes what the layer did, whatever the layer's attributes, and is a valid graph."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import model_of
from onnx import helper

from qcore.graph.chain import PARTS, layer_refusal, weight_of
from qcore.graph.cost import node_macs
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.shapes import single_sample
from qcore.graph.traverse import node_name
from qcore.methods.decompose import DecomposeStep, NewLayer, decompose, layers_to_decompose
from qcore.numerics.factors import Factors, factorize, full_ranks, reconstruct
from qcore.numerics.ranks import chain_macs

RNG = np.random.default_rng(0)
EXACT = ("svd", "spatial", "tucker2")


def dims(rank):
    return [f"d{k}" for k in range(rank)]


def array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def conv(shape, size, *, bias=True, **attributes):
    weights = {"w": array(*shape)} | ({"b": array(shape[0])} if bias else {})
    node = helper.make_node("Conv", ["x", *weights], ["y"], name="layer", **attributes)
    groups = attributes.get("group", 1)
    return model_of([node], weights, inputs={"x": ["N", shape[1] * groups, *size]}, outputs={"y": dims(len(shape))})


def run(proto_or_raw, x):
    raw = proto_or_raw if isinstance(proto_or_raw, bytes) else proto_or_raw.SerializeToString()
    return ort.InferenceSession(raw, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def input_of(proto, n=3):
    shape = [d.dim_value or n for d in proto.graph.input[0].type.tensor_type.shape.dim]
    return array(*shape)


def chained(proto, kind, ranks=None):
    model = parse_model(proto.SerializeToString(), "m")
    before = serialize_model(model)
    layers, _ = layers_to_decompose(model, DecomposeStep())
    new = {node_name(la.node): NewLayer(factors=factorize(kind, la.weight, ranks or full_ranks(kind, la.weight.shape)))
           for la in layers}  # fmt: skip
    result = decompose(model, new)
    assert serialize_model(model) == before
    raw = serialize_model(result.model)
    onnx.checker.check_model(onnx.ModelProto.FromString(raw), full_check=True)
    return result, raw, layers


CONVOLUTIONS = [
    conv((6, 5, 3, 3), (9, 8)),
    conv((6, 5, 3, 3), (9, 8), bias=False, pads=[1, 0, 2, 1]),
    conv((6, 5, 3, 3), (9, 8), strides=[2, 3], pads=[0, 0, 1, 1]),
    conv((6, 5, 3, 2), (11, 12), dilations=[2, 3], pads=[2, 1, 2, 2], kernel_shape=[3, 2]),
    conv((6, 5, 3, 3), (9, 8), auto_pad="SAME_UPPER", strides=[2, 2]),
    conv((6, 5, 3, 3), (9, 8), auto_pad="SAME_LOWER", strides=[2, 1]),
    conv((6, 5, 3, 3), (9, 8), auto_pad="VALID"),
    conv((6, 5, 1, 1), (9, 8), strides=[2, 2]),
    conv((6, 5, 1, 3), (9, 8), pads=[0, 1, 0, 1]),
    conv((6, 5, 5), (12,), strides=[2], pads=[1, 2], dilations=[2]),
    conv((6, 5, 4), (12,), auto_pad="SAME_UPPER"),
]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("k", range(len(CONVOLUTIONS)))
def test_convolutions(kind, k):
    proto = CONVOLUTIONS[k]
    result, raw, _ = chained(proto, kind)
    x = input_of(proto)
    want = run(proto, x)
    np.testing.assert_allclose(run(raw, x), want, atol=2e-5 * np.abs(want).max())
    nodes = onnx.ModelProto.FromString(raw).graph.node
    assert [n.name for n in nodes] == [f"layer.{part}" for part in PARTS[kind]]
    assert [len(n.input) for n in nodes[:-1]] == [2] * (len(nodes) - 1)
    assert len(nodes[-1].input) == len(proto.graph.node[0].input)
    assert result.changed == ("layer",)


@pytest.mark.parametrize("kind", ["cp", "depthwise"])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6, 9, 10])
def test_chains_with_kernels_per_channel_are_the_weights_that_they_amount_to(kind, k):
    proto = CONVOLUTIONS[k]
    _, raw, layers = chained(proto, kind, (4,))
    factors = factorize(kind, layers[0].weight, (4,))
    named = onnx.ModelProto.FromString(proto.SerializeToString())
    shape = tuple(named.graph.initializer[0].dims)
    same = reconstruct(factors).astype(np.float32).reshape(shape)
    named.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(same, "w"))
    x = input_of(proto)
    want = run(named, x)
    np.testing.assert_allclose(run(raw, x), want, atol=2e-5 * np.abs(want).max())
    groups = [
        next((a.i for a in n.attribute if a.name == "group"), 1) for n in onnx.ModelProto.FromString(raw).graph.node
    ]
    assert groups == [1, *[4] * (len(groups) - 2), 1]


@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker2", "cp", "depthwise"])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 9])
def test_costs_on_paper_are_those_of_the_graph(kind, k):
    proto = CONVOLUTIONS[k]
    ranks = (2, 3) if kind == "tucker2" else (3,)
    result, _, (layer,) = chained(proto, kind, ranks)
    assert sum(node_macs(result.model).values()) == chain_macs(kind, ranks, layer.shape)
    assert layer.shape.macs == node_macs(parse_model(proto.SerializeToString(), "m"))["layer"]


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (7,), (1, 7), (3, 1), ()])
def test_gemm(turned, trans_b, bias):
    weights = {"w": array(7, 5) if trans_b else array(5, 7)} | ({} if bias is None else {"b": array(*bias)})
    node = helper.make_node(
        "Gemm", ["x", *weights], ["y"], name="layer", transA=turned, transB=trans_b, alpha=0.5, beta=-2.0
    )
    proto = model_of([node], weights, inputs={"x": [5, 3] if turned else [3, 5]}, outputs={"y": [3, 7]})
    _, raw, (layer,) = chained(proto, "svd")
    assert layer.shape.weight == (7, 5, 1, 1)
    x = input_of(proto)
    np.testing.assert_allclose(run(raw, x), run(proto, x), atol=1e-5)
    assert [n.name for n in onnx.ModelProto.FromString(raw).graph.node] == ["layer.reduce", "layer.expand"]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_matmul(shape):
    weights = {"w": array(5, 7)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    proto = model_of([node], weights, inputs={"x": list(shape)}, outputs={"y": [*shape[:-1], 7]})
    _, raw, _ = chained(proto, "svd")
    x = input_of(proto)
    np.testing.assert_allclose(run(raw, x), run(proto, x), atol=1e-5)


def test_layers_that_share_weights_part():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="second"),
    ]
    proto = model_of(nodes, {"w": array(5, 5)}, inputs={"x": [2, 5]}, outputs={"y": [2, 5]})
    model = parse_model(proto.SerializeToString(), "m")
    factors = factorize("svd", weight_of(next(iter(model.graph))), (5,))
    raw = serialize_model(decompose(model, {"first": NewLayer(factors=factors)}).model)
    x = input_of(proto)
    np.testing.assert_allclose(run(raw, x), run(proto, x), atol=1e-5)
    assert [n.name for n in onnx.ModelProto.FromString(raw).graph.node] == ["first.reduce", "first.expand", "second"]
    _, skipped = layers_to_decompose(model, DecomposeStep(size=0.5))
    assert {s.reason for s in skipped} == {"it shares its weights, so factors of its own would make the file larger"}


def test_names_that_are_taken_get_a_number():
    weights = {"w": array(6, 5, 3, 3), "layer.reduce.weight": array(5, 5, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "layer.reduce.weight"], ["layer.reduce"], name="before"),
        helper.make_node("Conv", ["layer.reduce", "w"], ["y"], name="layer"),
    ]
    proto = model_of(nodes, weights, inputs={"x": [1, 5, 6, 6]}, outputs={"y": dims(4)})
    model = parse_model(proto.SerializeToString(), "m")
    factors = factorize("svd", weight_of(list(model.graph)[1]), (6,))
    raw = serialize_model(decompose(model, {"layer": NewLayer(factors=factors)}).model)
    names = [n.name for n in onnx.ModelProto.FromString(raw).graph.node]
    assert names == ["before", "layer.reduce_1", "layer.expand"]
    x = input_of(proto)
    np.testing.assert_allclose(run(raw, x), run(proto, x), atol=1e-4)


@pytest.mark.parametrize(
    ("node", "weight", "size", "reason"),
    [
        ({"op_type": "Conv", "group": 2}, (4, 2, 3, 3), [4, 5, 5], "its channels are in groups"),
        ({"op_type": "Conv"}, (4, 4, 3, 3, 3), [4, 5, 5, 5], "it convolves in three dimensions"),
        ({"op_type": "MatMul"}, (2, 5, 3), [2, 4, 5], "its weights are not one matrix"),
    ],
)
def test_refusals_are_data(node, weight, size, reason):
    made = helper.make_node(inputs=["x", "w"], outputs=["y"], name="layer", **node)
    proto = model_of([made], {"w": array(*weight)}, inputs={"x": [1, *size]}, outputs={"y": dims(1 + len(size))})
    model = parse_model(proto.SerializeToString(), "m")
    layers, skipped = layers_to_decompose(model, DecomposeStep())
    assert layers == ()
    assert [(s.node, s.reason) for s in skipped] == [("layer", reason)]
    assert layer_refusal(next(iter(single_sample(model).graph))) == reason


def test_products_of_activations_and_unknown_shapes_are_left_alone():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="tokens"),
        helper.make_node("MatMul", ["a", "a"], ["y"], name="square"),
    ]
    proto = model_of(nodes, {"w": array(5, 5)}, inputs={"x": ["N", "T", 5]}, outputs={"y": dims(3)})
    _, skipped = layers_to_decompose(parse_model(proto.SerializeToString(), "m"), DecomposeStep())
    assert {s.node: s.reason for s in skipped} == {
        "tokens": "its shape is not known for one sample",
        "square": "its weights are not float32 constants",
    }


def test_factors_say_what_they_are():
    factors = Factors(kind="tucker2", arrays=(array(2, 5), array(3, 2, 3, 3), array(6, 3)))
    assert factors.ranks == (2, 3)
    assert factors.parameters == 10 + 54 + 18
