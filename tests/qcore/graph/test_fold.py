import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import conv_head_net, conv_net, model_of
from onnx import helper

from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.io import parse_model, serialize_model


def run(data: bytes, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def ops(data: bytes) -> list[str]:
    return [n.op_type for n in onnx.ModelProto.FromString(data).graph.node]


@pytest.mark.parametrize("seed", range(4))
def test_folding_keeps_the_function_and_removes_the_node(seed):
    raw = conv_net(seed).SerializeToString()
    model = parse_model(raw, "m")
    before = serialize_model(model)
    rewrite = fold_batchnorm(model)
    folded = serialize_model(rewrite.model)
    assert rewrite.changed == ("bn1",)
    assert rewrite.skipped == ()
    assert "BatchNormalization" not in ops(folded)
    onnx.checker.check_model(onnx.ModelProto.FromString(folded), full_check=True)
    x = np.random.default_rng(seed).standard_normal((5, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(folded, x), run(raw, x), rtol=1e-4, atol=1e-5)
    assert serialize_model(model) == before  # the argument is not changed


def test_the_folded_layer_takes_over_the_name_of_the_batch_norm_output():
    folded = onnx.ModelProto.FromString(
        serialize_model(fold_batchnorm(parse_model(conv_net().SerializeToString(), "m")).model)
    )
    conv = next(n for n in folded.graph.node if n.name == "conv1")
    assert conv.output[0] == "n1"


def batchnorm_after(nodes, weights, extra_outputs=()):
    rng = np.random.default_rng(0)
    parameters = {
        "g": rng.uniform(0.5, 1.5, 4).astype(np.float32),
        "be": rng.standard_normal(4).astype(np.float32),
        "mu": rng.standard_normal(4).astype(np.float32),
        "va": rng.uniform(0.5, 2, 4).astype(np.float32),
    }
    outputs = {"y": ["N", 4, 6, 6], **{key: ["N", 4, 6, 6] for key in extra_outputs}}
    return model_of(
        [*nodes, helper.make_node("BatchNormalization", ["c", "g", "be", "mu", "va"], ["y"], name="bn")],
        {**weights, **parameters},
        inputs={"x": ["N", 4, 6, 6]},
        outputs=outputs,
    )


W = np.random.default_rng(1).standard_normal((4, 4, 1, 1)).astype(np.float32)


def test_two_layers_that_share_weights_are_folded_apart():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["d"], name="a"),
        helper.make_node("Conv", ["d", "w"], ["c"], name="b"),
    ]
    raw = batchnorm_after(nodes, {"w": W}).SerializeToString()
    rewrite = fold_batchnorm(parse_model(raw, "m"))
    x = np.random.default_rng(2).standard_normal((2, 4, 6, 6)).astype(np.float32)
    assert rewrite.changed == ("bn",)
    np.testing.assert_allclose(run(serialize_model(rewrite.model), x), run(raw, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ([helper.make_node("Relu", ["x"], ["c"], name="r")], (), "follows Relu"),
        ([helper.make_node("Conv", ["x", "w"], ["c"], name="a")], ("c",), "other readers"),
        (
            [helper.make_node("Conv", ["x", "w"], ["c"], name="a"), helper.make_node("Relu", ["c"], ["z"], name="r")],
            ("z",),
            "other readers",
        ),
    ],
)
def test_what_cannot_be_folded_is_left_alone_with_the_reason(nodes, outputs, reason):
    raw = batchnorm_after(nodes, {"w": W}, outputs).SerializeToString()
    rewrite = fold_batchnorm(parse_model(raw, "m"))
    assert rewrite.changed == ()
    assert [s.node for s in rewrite.skipped] == ["bn"]
    assert reason in rewrite.skipped[0].reason
    x = np.random.default_rng(2).standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(serialize_model(rewrite.model), x), run(raw, x))


def test_a_negative_variance_is_left_alone():
    proto = batchnorm_after([helper.make_node("Conv", ["x", "w"], ["c"], name="a")], {"w": W})
    variance = next(i for i in proto.graph.initializer if i.name == "va")
    variance.CopyFrom(onnx.numpy_helper.from_array(np.array([1, -1, 1, 1], np.float32), "va"))
    rewrite = fold_batchnorm(parse_model(proto.SerializeToString(), "m"))
    assert [s.reason for s in rewrite.skipped] == ["its variance is not positive"]


def test_gemm_and_transposed_convolution_fold_too():
    rng = np.random.default_rng(3)
    deconv = [helper.make_node("ConvTranspose", ["x", "w"], ["c"], name="a")]
    raw = batchnorm_after(deconv, {"w": rng.standard_normal((4, 4, 1, 1)).astype(np.float32)}).SerializeToString()
    rewrite = fold_batchnorm(parse_model(raw, "m"))
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    assert rewrite.changed == ("bn",)
    np.testing.assert_allclose(run(serialize_model(rewrite.model), x), run(raw, x), rtol=1e-4, atol=1e-5)


def test_a_pooled_one_by_one_head_becomes_gemm_and_computes_the_same():
    raw = conv_head_net().SerializeToString()
    rewrite = conv_head_to_gemm(parse_model(raw, "m"))
    data = serialize_model(rewrite.model)
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    assert rewrite.changed == ("head",)
    assert ops(data) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    np.testing.assert_allclose(run(data, x), run(raw, x), rtol=1e-4, atol=1e-5)
    assert onnx.ModelProto.FromString(data).graph.output[0].name == "y"


def test_other_convolutions_are_not_heads():
    rewrite = conv_head_to_gemm(parse_model(conv_net().SerializeToString(), "m"))
    assert rewrite.changed == ()
    assert rewrite.skipped == ()
