"""Dynamic quantization: fused by the runtime, as close to float as int8 allows, nothing saturates."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import conv_net, model_of
from onnx import helper
from transformers import EncoderShape, encoder, encoder_input, exported_encoder

from qcore.errors import ConfigError, ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.numerics.error import sqnr_db
from qcore.runtime.ort import optimized_ops
from qcore.target import load_target

AVX2 = load_target("x86-avx2")
SHAPE = EncoderShape(layers=2, width=64, heads=4, hidden=256)


def run(raw, x):
    session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def quantized(proto, target=AVX2, **options):
    model = ir.serde.deserialize_model(proto)
    step = QuantizeDynamicStep(**options)
    before = ir.serde.serialize_model(model).SerializeToString()
    result = quantize_dynamic(model, step, target)
    assert ir.serde.serialize_model(model).SerializeToString() == before
    raw = serialize_model(result.model)
    parse_model(raw, "result")
    assert raw == serialize_model(quantize_dynamic(model, step, target).model)
    return result, raw


@pytest.mark.parametrize("build", [encoder, exported_encoder])
def test_every_matrix_product_with_weights_runs_on_integers(build):
    proto, x = build(0, SHAPE), encoder_input(SHAPE, n=8)
    result, raw = quantized(proto)
    ops = optimized_ops(raw)
    assert len(result.changed) == ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == 13
    assert ops["MatMulInteger"] == ops["Gemm"] == 0
    assert {s.op_type for s in result.skipped} == {"MatMul"}
    assert {s.reason for s in result.skipped} == {"its weights are no constants"}
    assert sqnr_db(run(proto.SerializeToString(), x), run(raw, x)) > 20  # outlier channels cost 8-bit activations most
    assert len(raw) < 0.36 * proto.ByteSize()
    assert result.model.metadata_props["qcore.target"] == "x86-avx2"


def test_readers_of_one_tensor_share_its_quantization():
    result, _ = quantized(encoder(0, SHAPE))
    ops = [n.op_type for n in result.model.graph]
    # per layer q, k and v share one; out, up and down have their own; and the head
    assert ops.count("DynamicQuantizeLinear") == 2 * 4 + 1
    assert ops.count("MatMulInteger") == 13


def test_it_is_at_least_as_close_as_onnxruntimes_own_quantizer(tmp_path):
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as peer

    proto, x = encoder(0, SHAPE), encoder_input(SHAPE, n=16)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    reference = run(proto.SerializeToString(), x)
    theirs = []
    for kind in (QuantType.QUInt8, QuantType.QInt8):
        peer(tmp_path / "m.onnx", tmp_path / "q.onnx", weight_type=kind, per_channel=True)
        theirs.append(sqnr_db(reference, run((tmp_path / "q.onnx").read_bytes(), x)))
    _, raw = quantized(proto)
    # dynamic quantization rounds activations too: half a decibel is noise of the rounding
    assert sqnr_db(reference, run(raw, x)) >= max(theirs) - 0.5


@pytest.mark.parametrize("bits", [None, 7])
def test_nothing_saturates_on_x86_without_vnni(bits):
    """The u8s8 kernels of x86 without VNNI saturate: neither uint8 around 128 nor 7 bits may."""
    rng = np.random.default_rng(0)
    w = (rng.uniform(0.9, 1, (512, 32)) * rng.choice([-1, 1], 32)).astype(
        np.float32
    )  # sums of one sign: the worst case
    x = rng.uniform(0.9, 1, (4, 512)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    proto = model_of([node], {"w": w}, inputs={"x": ["N", 512]}, outputs={"y": ["N", 32]})
    _, raw = quantized(proto, weight_bits=bits)
    kinds = {i.name: i.data_type for i in onnx.ModelProto.FromString(raw).graph.initializer}
    assert kinds["w_quantized"] == (onnx.TensorProto.INT8 if bits == 7 else onnx.TensorProto.UINT8)
    assert sqnr_db(x @ w, run(raw, x)) > 40  # saturated sums of 512 products of one sign would be far off


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 2.0), (2.0, 0.0)])
def test_gemm_keeps_alpha_beta_and_orientation(transposed, alpha, beta):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((48, 64) if transposed else (64, 48)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="layer", transB=transposed, alpha=alpha, beta=beta)
    c = rng.standard_normal((48,)).astype(np.float32)
    proto = model_of([node], {"w": w, "c": c}, inputs={"x": ["N", 64]}, outputs={"y": ["N", 48]})
    x = rng.standard_normal((5, 64)).astype(np.float32)
    _, raw = quantized(proto)
    assert sqnr_db(run(proto.SerializeToString(), x), run(raw, x)) > 35


def test_a_batch_of_matrices_has_one_scale():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((3, 16, 8)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    proto = model_of([node], {"w": w}, inputs={"x": [3, "N", 16]}, outputs={"y": [3, "N", 8]})
    result, raw = quantized(proto)
    x = rng.standard_normal((3, 5, 16)).astype(np.float32)
    assert result.model.graph.initializers["w_scale"].shape == ir.Shape([])
    assert sqnr_db(run(proto.SerializeToString(), x), run(raw, x)) > 35


def test_zeros_in_give_finite_values_out():
    proto = encoder(0, SHAPE)
    _, raw = quantized(proto)
    x = np.zeros((1, 6, 64), np.float32)
    assert np.isfinite(run(raw, x)).all()


@pytest.mark.parametrize("target", ["x86-avx2", "x86-vnni"])
def test_convolutions_only_when_asked(target):
    proto = conv_net()
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    plain, _ = quantized(proto, load_target(target))
    assert plain.changed == ("fc",)
    result, raw = quantized(proto, load_target(target), operators=("Conv", "Gemm"))
    assert result.changed == ("conv1", "depthwise", "pointwise", "fc")
    assert sqnr_db(run(proto.SerializeToString(), x), run(raw, x)) > (35 if target == "x86-avx2" else 25)
    kinds = {i.name: i.data_type for i in onnx.ModelProto.FromString(raw).graph.initializer}
    assert kinds["w1_quantized"] == kinds["w2_quantized"] == onnx.TensorProto.UINT8


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigError, match=r"fixed-point-pow2 wants power-of-two scales; .* use step quantize"):
        quantized(conv_net(), load_target("fixed-point-pow2"))
    with pytest.raises(ConfigError, match="npu-int8-symmetric wants symmetric activations"):
        quantized(conv_net(), load_target("npu-int8-symmetric"))
    with pytest.raises(ModelError, match="excluded by the recipe"):
        quantized(conv_net(), exclude=("fc",))
    with pytest.raises(ModelError, match="exclude names node 'nobody'"):
        quantized(conv_net(), exclude=("nobody",))
    w = np.ones((8, 8), np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transA=1)
    proto = model_of([node], {"w": w}, inputs={"x": [8, "N"]}, outputs={"y": ["N", 8]})
    with pytest.raises(ModelError, match="Gemm with transA"):
        quantized(proto)
