"""Weight-only quantization: what the file computes is what its integers say, and the file really shrinks."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import conv_net, model_of
from onnx import helper, numpy_helper
from transformers import EncoderShape, encoder, encoder_input, exported_encoder

from qcore.config import check_config
from qcore.errors import ConfigError, ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.weights import QuantizeWeightsStep, quantize_weights
from qcore.numerics.blocks import BlockScheme, dequantize_blocks, quantize_blocks
from qcore.numerics.error import sqnr_db

ALL = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
SHAPE = EncoderShape(layers=1, width=64, heads=4, hidden=128, vocabulary=100)


def run(proto, x):
    raw = proto if isinstance(proto, bytes) else proto.SerializeToString()
    session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def quantized(proto, **options):
    before = proto.SerializeToString()
    model = ir.serde.deserialize_model(proto)
    result = quantize_weights(model, QuantizeWeightsStep(**options))
    assert (
        ir.serde.serialize_model(model).SerializeToString()
        == ir.serde.serialize_model(ir.serde.deserialize_model(onnx.ModelProto.FromString(before))).SerializeToString()
    )
    raw = serialize_model(result.model)
    parse_model(raw, "result")  # the checker
    assert raw == serialize_model(quantize_weights(model, QuantizeWeightsStep(**options)).model)
    return result, raw


def linear(w, op="MatMul", opset=17, **attributes):
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)
    k, n = w.shape[::-1] if attributes.get("transB") else w.shape
    return model_of([node], {"w": w}, inputs={"x": ["N", k]}, outputs={"y": ["N", n]}, opset=opset)


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "transposed"),
    list(itertools.product([4, 8], [16, 32, 128], [True, False], [True, False])),
)
def test_both_forms_compute_with_the_dequantized_weights(bits, size, symmetric, transposed):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 40)).astype(np.float32)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    proto = linear(w.T.copy(), "Gemm", transB=1, alpha=0.5) if transposed else linear(w)
    factor = np.float32(0.5 if transposed else 1)
    for form in ("nbits", "qdq"):
        result, raw = quantized(
            proto, bits=bits, block_size=size, symmetric=symmetric, form=form, accuracy_level=1, operators=ALL
        )
        blocks = quantize_blocks(
            w.T * (factor if form == "nbits" else 1),
            BlockScheme(bits=bits, block_size=size, symmetric=symmetric, signed_scales=form == "nbits"),
        )
        expected = x @ dequantize_blocks(blocks, 200).T * (1 if form == "nbits" else factor)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-3, atol=1e-3)
        assert result.changed == ("layer",)
        assert result.model.opset_imports[""] == (17 if form == "nbits" else 21)


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([4, 8], [True, False])))
def test_blocks_are_at_least_as_close_as_those_of_onnxruntimes_quantizer(bits, symmetric):
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    proto = encoder(0, EncoderShape(layers=1, width=64, heads=4, hidden=128))
    reference = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
    theirs = MatMulNBitsQuantizer(onnx.ModelProto.FromString(proto.SerializeToString()), algo_config=config)
    theirs.process()
    _, raw = quantized(proto, bits=bits, block_size=32, symmetric=symmetric, operators=("MatMul",))

    def errors(model):
        found = {}
        for node in model.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
            identity = np.eye(next(a.i for a in node.attribute if a.name == "K"), dtype=np.float32)
            alone = helper.make_model(
                helper.make_graph(
                    [helper.make_node("MatMulNBits", ["x", *node.input[1:]], ["y"], domain=node.domain)],
                    "g",
                    [helper.make_tensor_value_info("x", 1, identity.shape)],
                    [helper.make_tensor_value_info("y", 1, [len(identity), None])],
                    [numpy_helper.from_array(arrays[n], n) for n in node.input[1:]],
                ),
                opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
                ir_version=9,
            )
            attributes = [a for a in node.attribute if a.name != "accuracy_level"]
            alone.graph.node[0].attribute.extend(attributes)
            name = node.name.removesuffix("_Q4").removesuffix("_Q8")
            found[name.partition("_Q")[0]] = float(np.sum((run(alone, identity) - reference[f"{name}.weight"]) ** 2))
        return found

    ours, peers = errors(onnx.ModelProto.FromString(raw)), errors(theirs.model.model)
    assert set(ours) == {
        f"layer0.{n}" for n in ("attention.q", "attention.k", "attention.v", "attention.out", "up", "down")
    }
    assert len(peers) == len(ours)
    assert all(ours[name] <= peers[name] * 1.001 for name in ours)


@pytest.mark.parametrize("build", [encoder, exported_encoder])
@pytest.mark.parametrize(
    ("options", "least_db", "most_bytes"),
    [
        ({"bits": 8, "form": "qdq", "block_size": None}, 30, 0.40),
        ({"bits": 8, "form": "qdq", "block_size": 32}, 30, 0.45),
        ({"bits": 8, "form": "nbits"}, 30, 0.45),
        ({"bits": 4, "form": "nbits"}, 8, 0.35),
        ({"bits": 4, "form": "nbits", "symmetric": False}, 8, 0.35),
    ],
)
def test_transformers_shrink_and_keep_their_outputs(build, options, least_db, most_bytes):
    proto, x = build(0, SHAPE), encoder_input(SHAPE, n=16)
    result, raw = quantized(proto, operators=ALL, accuracy_level=1, **options)
    assert sqnr_db(run(proto, x), run(raw, x)) > least_db
    assert len(raw) < most_bytes * proto.ByteSize()
    assert {"embedding", "layer0.up", "layer0.attention.q"} <= set(result.changed)
    assert {s.node for s in result.skipped} == {"layer0.attention.scores", "layer0.attention.mix"} | (
        {"head"} - set(result.changed)
    )


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_convolutions_read_dequantized_weights(op, bits, symmetric, group):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((32, 32 // group, 3, 3)).astype(np.float32)
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", group=group, pads=[1] * 4)
    channels = 32
    proto = model_of([node], {"w": w}, inputs={"x": ["N", 32, 6, 6]}, outputs={"y": ["N", channels, 6, 6]})
    _, raw = quantized(proto, bits=bits, block_size=16, symmetric=symmetric)
    model = onnx.ModelProto.FromString(raw)
    dq = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    stored = next(i for i in model.graph.initializer if i.name == dq.input[0])
    wanted = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}[bits, symmetric]
    assert onnx.TensorProto.DataType.Name(stored.data_type) == wanted
    weights_only = model_of(
        [helper.make_node("Identity", ["x"], ["y"])], {}, inputs={"x": [1]}, outputs={"y": [1]}, opset=21
    )
    weights_only.graph.ClearField("node")
    weights_only.graph.node.append(dq)
    weights_only.graph.initializer.extend(i for i in model.graph.initializer if i.name in dq.input)
    weights_only.graph.output[0].CopyFrom(helper.make_tensor_value_info(dq.output[0], 1, w.shape))
    weights_only.ir_version = 10
    restored = run(weights_only, np.zeros(1, np.float32))
    x = rng.standard_normal((2, 32, 6, 6)).astype(np.float32)
    float_again = model_of([node], {"w": restored}, inputs={"x": ["N", 32, 6, 6]}, outputs={"y": ["N", channels, 6, 6]})
    np.testing.assert_allclose(run(raw, x), run(float_again, x), rtol=1e-4, atol=1e-4)
    assert sqnr_db(w, restored) > (35 if bits == 8 else 15)


@pytest.mark.parametrize(("depthwise_bits", "kind"), [(8, "INT8"), (4, "INT4")])
def test_depthwise_convolutions_keep_their_own_bits(depthwise_bits, kind):
    w = np.random.default_rng(0).standard_normal((64, 1, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer", group=64, pads=[1] * 4)
    proto = model_of([node], {"w": w}, inputs={"x": ["N", 64, 5, 5]}, outputs={"y": ["N", 64, 5, 5]})
    result, raw = quantized(proto, bits=4, depthwise_bits=depthwise_bits)
    kinds = {i.name: i.data_type for i in onnx.ModelProto.FromString(raw).graph.initializer}
    assert onnx.TensorProto.DataType.Name(kinds["w_quantized"]) == kind
    assert result.model.opset_imports[""] == (17 if depthwise_bits == 8 else 21)


def test_the_model_behaves_the_same_in_the_raised_opset():
    proto = conv_net()
    result, raw = quantized(proto, bits=4, block_size=None, form="qdq", operators=("Conv",), exclude=("pointwise",))
    assert result.model.opset_imports[""] == 21
    restored = onnx.ModelProto.FromString(raw)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    only_layout = onnx.version_converter.convert_version(proto, 21)
    np.testing.assert_array_equal(run(proto, x), run(only_layout, x))
    assert restored.ir_version >= 10


def test_shared_weights_are_stored_once_and_a_float_reader_keeps_them_float():
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="two"),
    ]
    shared = model_of(nodes, {"w": w}, inputs={"x": ["N", 64]}, outputs={"b": ["N", 64]})
    result, _ = quantized(shared)
    assert result.changed == ("one", "two")
    assert len(result.model.graph.initializers) == 2
    nodes.append(helper.make_node("Add", ["b", "w"], ["c"], name="add"))
    float_too = model_of(nodes, {"w": w}, inputs={"x": [64, 64]}, outputs={"c": [64, 64]})
    with pytest.raises(ModelError, match=r"add reads its weights too and stays float: the file would grow"):
        quantized(float_too)


def test_what_cannot_be_done_is_said():
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for proto, options, reason in [
        (linear(w), {"exclude": ("layer",)}, "excluded by the recipe"),
        (linear(w), {"exclude": ("nobody",)}, "exclude names node 'nobody'"),
        (linear(w * np.float32(np.inf)), {}, "NaN or infinity"),
        (linear(w[:2, :2].copy()), {}, "would not get smaller"),
        (linear(w), {"operators": ("Conv",)}, "it has no Conv"),
    ]:
        with pytest.raises(ModelError, match=reason):
            quantized(proto, **options)
    with pytest.raises(ConfigError, match="form nbits needs a block_size"):
        check_config({"method": "quantize-weights", "block_size": None}, QuantizeWeightsStep, "step")


def test_gemm_keeps_alpha_beta_and_bias():
    rng = np.random.default_rng(0)
    w, c = rng.standard_normal((64, 48)).astype(np.float32), rng.standard_normal((1, 48)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="layer", alpha=-0.5, beta=3.0)
    proto = model_of([node], {"w": w, "c": c}, inputs={"x": ["N", 64]}, outputs={"y": ["N", 48]})
    x = rng.standard_normal((4, 64)).astype(np.float32)
    for form in ("nbits", "qdq"):
        _, raw = quantized(proto, bits=8, form=form, accuracy_level=1)
        assert sqnr_db(run(proto, x), run(raw, x)) > 38
