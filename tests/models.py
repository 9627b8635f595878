"""Small real models for tests: graphs written with onnx.helper, weights from a seed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, NDArray],
    *,
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    opset: int = 17,
) -> onnx.ModelProto:
    """Return a float32 model of `nodes`."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def conv_net(seed: int = 0, batch: int | str = "N") -> onnx.ModelProto:
    """Return conv-bn-relu, depthwise conv with Clip, a residual add, pooling and a Gemm: (N,3,8,8) -> (N,4)."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.4) -> NDArray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    weights = {
        "w1": normal(6, 3, 3, 3),
        "gamma": rng.uniform(0.5, 1.5, 6).astype(np.float32),
        "beta": normal(6),
        "mean": normal(6),
        "var": rng.uniform(0.5, 2, 6).astype(np.float32),
        "w2": normal(6, 1, 3, 3),
        "b2": normal(6),
        "low": np.float32(0.0).reshape(()),
        "high": np.float32(6.0).reshape(()),
        "w3": normal(6, 6, 1, 1),
        "b3": normal(6),
        "wf": normal(4, 6, scale=1.0),
        "bf": normal(4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["n1"], name="bn1"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="depthwise", group=6, pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["c2", "low", "high"], ["k2"], name="clip"),
        helper.make_node("Conv", ["k2", "w3", "b3"], ["c3"], name="pointwise"),
        helper.make_node("Add", ["c3", "r1"], ["s"], name="add"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf", "bf"], ["y"], name="fc", transB=1),
    ]
    return model_of(nodes, weights, inputs={"x": [batch, 3, 8, 8]}, outputs={"y": [batch, 4]})


def conv_head_net(seed: int = 0) -> onnx.ModelProto:
    """Return a net that ends as MobileNets do: pool, 1x1 convolution, flatten: (N,3,6,6) -> (N,5)."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32) * 0.4,
        "w2": rng.standard_normal((5, 8, 1, 1)).astype(np.float32),
        "b2": rng.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Conv", ["p", "w2", "b2"], ["h"], name="head"),
        helper.make_node("Flatten", ["h"], ["y"], name="flatten"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 3, 6, 6]}, outputs={"y": ["N", 5]})


def save(proto: onnx.ModelProto, path: Path) -> Path:
    """Write `proto` to `path` and return it."""
    path.write_bytes(proto.SerializeToString())
    return path


CARD = """\
name: tiny
path: tiny.npz
layout: NCHW
splits:
  calibration: {range: [0, 40]}
  evaluation: {range: [40, 240]}
"""


def write_data(folder: Path, proto: onnx.ModelProto, *, seed: int = 1, n: int = 240) -> Path:
    """Write inputs for `proto` (first input, NCHW) with the model's own answers as labels; return the card."""
    import onnxruntime as ort

    rng = np.random.default_rng(seed)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {proto.graph.input[0].name: x})[0].argmax(axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tiny.npz", x=x, y=y)
    (folder / "tiny.yaml").write_text(CARD)
    return folder / "tiny.yaml"
