"""The executor as a torch module: gradients, names, transforms, dynamic shapes, write-back, refusals."""

import copy
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from models import conv_net, model_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import encoder

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.errors import ModelError  # noqa: E402
from qcore.graph.io import serialize_model  # noqa: E402
from qcore.training.executor import Executor, ExecutorOptions, build_executor, write_back  # noqa: E402
from qcore.training.ops.quantization import round_straight_through  # noqa: E402
from qcore.training.weights import trainable_names  # noqa: E402

make = helper.make_node


def load(proto: onnx.ModelProto) -> ir.Model:
    return ir.serde.deserialize_model(proto)


def images(n: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, 8, 8)).astype(np.float32))


def runtime(proto: onnx.ModelProto, x: NDArray) -> NDArray:
    return ort.InferenceSession(proto.SerializeToString()).run(None, {proto.graph.input[0].name: x})[0]


def train(executor: Executor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([w for w in executor.weights.values() if w.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        executor({"x": images()})["y"].square().mean().backward()
        optimizer.step()


def test_weights_are_found_and_trained_and_bounds_and_statistics_are_not() -> None:
    model = load(conv_net())
    assert trainable_names(model) == ("w1", "gamma", "beta", "w2", "b2", "w3", "b3", "wf", "bf")
    executor = build_executor(model)
    executor({"x": images()})["y"].square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in executor.weights.values())
    assert "low" not in executor.values
    assert "mean" in executor.values
    assert "mean" not in executor.weights


def test_training_changes_only_the_named_initializers() -> None:
    proto = conv_net()
    model = load(proto)
    executor = build_executor(model, ExecutorOptions(trainable=("w3", "bf")))
    train(executor)
    trained = onnx.ModelProto.FromString(serialize_model(write_back(model, executor)))
    before = {t.name: t.SerializeToString() for t in proto.graph.initializer}
    after = {t.name: t.SerializeToString() for t in trained.graph.initializer}
    assert {name for name in before if before[name] != after[name]} == {"w3", "bf"}
    x = images(5, seed=1)
    with torch.no_grad():
        got = executor.eval()({"x": x})["y"].numpy()
    np.testing.assert_allclose(runtime(trained, x.numpy()), got, rtol=1e-4, atol=1e-5)
    assert serialize_model(model) == serialize_model(load(proto))


def test_write_back_without_training_changes_no_byte() -> None:
    for proto in (conv_net(), encoder()):
        model = load(proto)
        assert serialize_model(write_back(model, build_executor(model))) == serialize_model(model)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_element_types_stay(kind: type[np.floating]) -> None:
    w = np.eye(3, dtype=kind)
    graph = helper.make_graph(
        [make("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), ["n", 3])],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), ["n", 3])],
        [numpy_helper.from_array(w, "w")],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    executor = build_executor(model)
    with torch.no_grad():
        executor.weights["w"].mul_(2)
    found = write_back(model, executor).graph.initializers["w"].const_value
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), 2 * w)
    assert found.numpy().dtype == kind


def test_weights_in_constant_nodes_are_trained_too() -> None:
    w = np.ones((3, 2), np.float32)
    nodes = [make("Constant", [], ["w"], value=numpy_helper.from_array(w)), make("MatMul", ["x", "w"], ["y"])]
    model = load(model_of(nodes, {}, inputs={"x": ["n", 3]}, outputs={"y": ["n", 2]}))
    executor = build_executor(model)
    with torch.no_grad():
        executor.weights["w"].add_(1)
    trained = ir.serde.serialize_model(write_back(model, executor))
    np.testing.assert_array_equal(runtime(trained, np.ones((1, 3), np.float32)), [[6, 6]])


@pytest.mark.parametrize("batch", [1, 4])
def test_shapes_are_computed_from_the_batch(batch: int) -> None:
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "zero"], ["n"]),
        make("Unsqueeze", ["n", "axis"], ["n1"]),
        make("Concat", ["n1", "rest"], ["target"], axis=0),
        make("Reshape", ["x", "target"], ["r"]),
        make("Concat", ["n1", "six"], ["wide"], axis=0),
        make("Expand", ["bias", "wide"], ["e"]),
        make("Mul", ["n", "two"], ["n2"]),
        make("Cast", ["n2"], ["f"], to=TensorProto.FLOAT),
        make("Add", ["r", "e"], ["a"]),
        make("Mul", ["a", "f"], ["y"]),
    ]
    weights = {
        "zero": np.array(0),
        "axis": np.array([0]),
        "rest": np.array([-1]),
        "six": np.array([6]),
        "two": np.array(2),
        "bias": np.arange(6, dtype=np.float32),
    }
    proto = model_of(nodes, weights, inputs={"x": ["n", 2, 3]}, outputs={"y": ["n", 6]})
    x = np.random.default_rng(0).standard_normal((batch, 2, 3)).astype(np.float32)
    executor = build_executor(load(proto))
    np.testing.assert_allclose(executor({"x": torch.from_numpy(x)})["y"].detach().numpy(), runtime(proto, x), rtol=1e-5)
    assert list(executor.weights) == ["bias"]


def test_a_transformer_agrees_with_the_runtime_at_any_batch() -> None:
    proto = encoder()
    executor = build_executor(load(proto)).eval()
    name, shape = proto.graph.input[0].name, [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)
        with torch.no_grad():
            got = next(iter(executor({name: torch.from_numpy(x)}).values())).numpy()
        np.testing.assert_allclose(got, runtime(proto, x), rtol=1e-3, atol=1e-4)


def gradient_check(nodes: Sequence[onnx.NodeProto], weights: dict[str, NDArray], shape: Sequence[int]) -> None:
    """Compare the gradients of every weight and of the input with finite differences, in float64."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    executor = build_executor(load(proto))
    x = torch.from_numpy(np.random.default_rng(3).standard_normal(shape)).requires_grad_()
    trained = [w for w in executor.weights.values() if w.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: executor({"x": x})["y"], (x, *trained))


def normal(*shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.mark.parametrize(
    ("nodes", "weights", "shape"),
    [
        (
            [make("Conv", ["x", "w", "b"], ["y"], pads=[0, 1, 2, 1], strides=[2, 1])],
            {"w": normal(2, 3, 3, 3), "b": normal(2)},
            (1, 3, 5, 5),
        ),
        (
            [make("ConvTranspose", ["x", "w", "b"], ["y"], pads=[0, 1, 1, 1], strides=[2, 2])],
            {"w": normal(3, 2, 3, 3), "b": normal(2)},
            (1, 3, 3, 3),
        ),
        ([make("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0)], {"w": normal(4, 2), "b": normal(2)}, (3, 4)),
        (
            [make("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])],
            {"s": normal(3), "b": normal(3), "m": normal(3), "v": np.ones(3)},
            (2, 3, 2, 2),
        ),
        ([make("LayerNormalization", ["x", "s", "b"], ["y"])], {"s": normal(4), "b": normal(4)}, (2, 4)),
        ([make("RMSNormalization", ["x", "s"], ["y"])], {"s": normal(4)}, (2, 4)),
        (
            [make("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)],
            {"s": normal(4), "b": normal(4)},
            (2, 4, 3),
        ),
        ([make("PRelu", ["x", "s"], ["y"])], {"s": normal(4)}, (2, 4)),
        (
            [make("MatMul", ["x", "w"], ["h"]), make("Softmax", ["h"], ["s"]), make("Log", ["s"], ["y"])],
            {"w": normal(4, 3)},
            (2, 4),
        ),
        ([make("Gelu", ["x"], ["h"]), make("ReduceL2", ["h", "a"], ["y"])], {"a": np.array([1])}, (2, 4)),
        (
            [make("Gather", ["x", "i"], ["h"], axis=1), make("ReduceMean", ["h"], ["y"])],
            {"i": np.array([[0, -1], [2, 0]])},
            (2, 4),
        ),
        (
            [make("Slice", ["x", "s", "e", "a", "t"], ["y"])],
            {"s": np.array([3]), "e": np.array([-9]), "a": np.array([1]), "t": np.array([-2])},
            (2, 4),
        ),
        ([make("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2])], {}, (1, 2, 4, 4)),
        (
            [make("Resize", ["x", "", "s"], ["y"], mode="cubic")],
            {"s": np.array([1, 1, 1.5, 1.5], np.float32)},
            (1, 1, 4, 4),
        ),
        (
            [make("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)],
            {"w": normal(1, 8, 3), "r": normal(1, 8, 2)},
            (3, 2, 3),
        ),
        ([make("Attention", ["x", "x", "x"], ["y"], is_causal=1)], {}, (1, 2, 3, 4)),
        (
            [
                make("Relu", ["x"], ["h"]),
                make("Add", ["h", "b"], ["g"]),
                make("Relu", ["g"], ["f"]),
                make("Mul", ["f", "h"], ["y"]),
            ],
            {"b": normal(4)},
            (2, 4),
        ),
    ],
    ids=lambda value: "-".join(n.op_type for n in value) if isinstance(value, list) else "",
)
def test_gradients(nodes: list[onnx.NodeProto], weights: dict[str, NDArray], shape: tuple[int, ...]) -> None:
    gradient_check(nodes, weights, shape)


def test_rounding_passes_gradients_on_and_saturation_does_not() -> None:
    nodes = [make("QuantizeLinear", ["x", "s", "z"], ["q"]), make("DequantizeLinear", ["q", "s", "z"], ["y"])]
    weights = {"s": np.float32(0.1).reshape(()), "z": np.array(0, np.int8)}
    proto = model_of(nodes, weights, inputs={"x": ["n"]}, outputs={"y": ["n"]})
    executor = build_executor(load(proto), ExecutorOptions(trainable=("s",)))
    x = torch.tensor([0.234, -0.05, 20.0, -20.0], requires_grad=True)
    y = executor({"x": x})["y"]
    np.testing.assert_allclose(y.detach().numpy(), runtime(proto, x.detach().numpy()), rtol=1e-6)
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]
    # Learned step size: round(x/s) - x/s inside, the bounds outside (Esser et al. eq. 3).
    expected = (2 - 2.34) + (0 - -0.5) + 127 - 128
    assert executor.weights["s"].grad.item() == pytest.approx(expected, abs=1e-4)


def test_a_quantized_graph_with_a_layout_change_between_is_trained_through() -> None:
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make("Transpose", ["q"], ["t"]),
        make("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ]
    weights = {"s": np.float32(0.1).reshape(()), "z": np.array(0, np.int8)}
    executor = build_executor(load(model_of(nodes, weights, inputs={"x": [2, 3]}, outputs={"y": [3, 2]})))
    x = torch.ones(2, 3, requires_grad=True)
    executor({"x": x})["y"].sum().backward()
    assert x.grad.sum() == 6


def test_transforms_stand_in_for_values_and_modules_among_them_are_trained() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    model, scale = load(conv_net()), Scale()
    plain = build_executor(model, ExecutorOptions(intermediates=("r1", "w3"))).eval()
    options = ExecutorOptions(
        transforms={"r1": scale, "w3": lambda w: round_straight_through(w * 4) / 4, "x": lambda x: x + 0},
        intermediates=("r1", "w3"),
    )
    changed = build_executor(model, options).eval()
    before, after = plain({"x": images()}), changed({"x": images()})
    assert list(after) == ["y", "r1", "w3"]
    torch.testing.assert_close(after["r1"], before["r1"] * 2)
    assert (after["w3"] * 4).frac().abs().max() == 0
    after["y"].sum().backward()
    assert scale.factor.grad is not None
    assert any(p is scale.factor for p in changed.parameters())
    assert changed.weights["w3"].grad.abs().sum() > 0


def test_values_that_are_returned_are_not_overwritten_in_place() -> None:
    model = load(conv_net())
    kept = build_executor(model, ExecutorOptions(intermediates=("n1", "s", "c2"))).eval()({"x": images()})
    assert kept["n1"].min() < 0
    assert kept["c2"].min() < 0


def test_statistics_are_frozen_unless_asked_for() -> None:
    model = load(conv_net())
    frozen = build_executor(model)
    train(frozen)
    mean = frozen.values["mean"].clone()
    torch.testing.assert_close(mean, torch.tensor(model.graph.initializers["mean"].const_value.numpy()))
    moving = build_executor(model, ExecutorOptions(batch_statistics=True))
    moving({"x": images()})
    back = write_back(model, moving).graph.initializers
    batch = build_executor(model, ExecutorOptions(intermediates=("c1",)))({"x": images()})["c1"].mean((0, 2, 3))
    np.testing.assert_allclose(
        back["mean"].const_value.numpy(), (0.9 * mean + 0.1 * batch).detach().numpy(), rtol=1e-4, atol=1e-6
    )
    y = moving.eval()({"x": images()})["y"].detach().numpy()
    np.testing.assert_allclose(
        y, runtime(ir.serde.serialize_model(write_back(model, moving)), images().numpy()), rtol=1e-4, atol=1e-5
    )


def test_dropout_drops_only_in_training_and_only_if_asked_for() -> None:
    nodes = [make("Dropout", ["x", "ratio"], ["y"])]
    proto = model_of(nodes, {"ratio": np.float32(0.5).reshape(())}, inputs={"x": [1000]}, outputs={"y": [1000]})
    x = torch.ones(1000)
    assert torch.equal(build_executor(load(proto))({"x": x})["y"], x)
    active = build_executor(load(proto), ExecutorOptions(dropout=True))
    torch.manual_seed(0)
    first = active({"x": x})["y"]
    torch.manual_seed(0)
    assert torch.equal(active({"x": x})["y"], first)
    assert set(first.tolist()) == {0.0, 2.0}
    assert torch.equal(active.eval()({"x": x})["y"], x)


def test_nothing_trainable_folds_what_it_can_and_still_computes_the_same() -> None:
    nodes = [make("Transpose", ["w"], ["t"]), make("MatMul", ["x", "t"], ["y"])]
    proto = model_of(
        nodes, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, inputs={"x": ["n", 3]}, outputs={"y": ["n", 2]}
    )
    executor = build_executor(load(proto), ExecutorOptions(trainable=()))
    assert list(executor.values) == ["t"]
    assert not any(w.requires_grad for w in executor.parameters())
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(executor({"x": torch.from_numpy(x)})["y"].numpy(), runtime(proto, x))


def test_same_seed_same_bytes() -> None:
    model = load(conv_net())
    made = []
    for _ in range(2):
        executor = build_executor(model)
        train(executor)
        made.append(serialize_model(write_back(model, executor)))
    assert made[0] == made[1] != serialize_model(model)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_layout_changes_no_value(channels_last: bool) -> None:
    proto = conv_net()
    executor = build_executor(load(proto), ExecutorOptions(channels_last=channels_last)).eval()
    got = executor({"x": images()})["y"].detach().numpy()
    np.testing.assert_allclose(got, runtime(proto, images().numpy()), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains() -> None:
    executor = build_executor(load(conv_net()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = executor({"x": images()})["y"]
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert executor.weights["w1"].grad.dtype == torch.float32
    reference = build_executor(load(conv_net()))({"x": images()})["y"]
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits


def test_state_and_copies() -> None:
    model = load(conv_net())
    executor = build_executor(model)
    teacher = copy.deepcopy(executor)
    train(executor)
    assert not torch.equal(executor.weights["w1"], teacher.weights["w1"])
    teacher.load_state_dict(executor.state_dict())
    torch.testing.assert_close(teacher({"x": images()})["y"], executor({"x": images()})["y"])


def test_distributed_data_parallel(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        executor = build_executor(load(conv_net()))
        parallel = torch.nn.parallel.DistributedDataParallel(executor)
        parallel({"x": images()})["y"].sum().backward()
        assert executor.weights["w1"].grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_not_supported_is_named_before_any_work() -> None:
    nodes = [
        make("Det", ["x"], ["d"], name="determinant"),
        make("Resize", ["x", "roi", "scales"], ["r"], name="crop", coordinate_transformation_mode="tf_crop_and_resize"),
        make("Unsqueeze", ["d", "axes"], ["u"]),
        make("Add", ["r", "u"], ["y"]),
    ]
    weights = {
        "roi": np.array([0, 0, 0, 1, 1, 1], np.float32),
        "scales": np.ones(3, np.float32),
        "axes": np.array([1, 2]),
    }
    proto = model_of(nodes, weights, inputs={"x": ["n", 3, 3]}, outputs={"y": ["n", 3, 3]})
    with pytest.raises(ModelError, match=r"2 parts .* Det 'determinant'.*Resize 'crop'.*tf_crop_and_resize") as found:
        build_executor(load(proto))
    assert "\n" not in str(found.value)


def test_names_that_do_not_exist_are_refused() -> None:
    model = load(conv_net())
    with pytest.raises(ModelError, match="'w9' is no float initializer"):
        build_executor(model, ExecutorOptions(trainable=("w9",)))
    with pytest.raises(ModelError, match="initializer 'high': a shape, bound or axis is never trained"):
        build_executor(model, ExecutorOptions(trainable=("high",)))
    with pytest.raises(ModelError, match="no value called 'nope' to transform"):
        build_executor(model, ExecutorOptions(transforms={"nope": torch.neg}))
    with pytest.raises(ModelError, match="no value called 'nope'"):
        build_executor(model, ExecutorOptions(intermediates=("nope",)))
    with pytest.raises(ModelError, match="input 'x' is missing"):
        build_executor(model)({})
