"""Small transformer encoders for tests and benchmarks: written with onnx.helper, weights from a seed.

Weights are scaled like a trained net's (1 / sqrt(fan-in)), LayerNormalization's gamma differs per channel, and a few
input channels are much larger than the others: that is what makes activations of transformers hard to quantize.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Sizes of an encoder; `vocabulary` None means that the input is (N, sequence, width) float, else int64 ids.

    `post_norm` normalizes behind the residual sums, as BERT does: what a norm gives is also the next sum's.
    """

    layers: int = 1
    width: int = 16
    heads: int = 2
    hidden: int = 32
    classes: int = 5
    sequence: int | str = 6
    vocabulary: int | None = None
    post_norm: bool = False


@dataclass
class _Graph:
    """Nodes and weights while they grow; names are unique by construction."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray] = field(default_factory=dict)

    def op(self, op_type: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def constant(self, name: str, array: NDArray) -> str:
        self.weights[name] = array
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def linear(self, x: str, rows: int, columns: int, name: str) -> str:
        w = (self.rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        b = (self.rng.standard_normal(columns) * 0.1).astype(np.float32)
        product = self.op("MatMul", [x, self.constant(f"{name}.weight", w)], name)
        return self.op("Add", [product, self.constant(f"{name}.bias", b)], f"{name}.add")

    def gamma_beta(self, width: int, name: str) -> tuple[str, str]:
        gamma = self.rng.uniform(0.5, 1.5, width).astype(np.float32)
        gamma[:: max(1, width // 4)] *= 8  # the outlier channels of trained transformers
        beta = (self.rng.standard_normal(width) * 0.1).astype(np.float32)
        return self.constant(f"{name}.gamma", gamma), self.constant(f"{name}.beta", beta)


def encoder(seed: int = 0, shape: EncoderShape | None = None) -> onnx.ModelProto:
    """Return pre-norm encoder blocks with LayerNormalization and Gelu (opset 20): (N,S,width) or ids -> (N,classes)."""
    return _encoder(seed, shape or EncoderShape(), exported=False, opset=20)


def exported_encoder(seed: int = 0, shape: EncoderShape | None = None) -> onnx.ModelProto:
    """Return the same net as an exporter of opset 17 writes it: LayerNorm and Gelu as chains of simple nodes."""
    return _encoder(seed, shape or EncoderShape(), exported=True, opset=17)


def with_outliers(proto: onnx.ModelProto, factor: float = 100.0) -> onnx.ModelProto:
    """Return an encoder of the same function in which two channels behind each norm are `factor` times as large.

    What reads them is divided by as much, as in trained transformers, where outlier channels do not drown the others.
    """
    result = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in result.graph.initializer:
        name, array = tensor.name, numpy_helper.to_array(tensor).copy()
        if name.endswith((".gamma", ".beta")):
            array[[1, 6]] *= factor
        elif name.endswith((".q.weight", ".k.weight", ".v.weight", ".up.weight")):
            array[[1, 6]] /= factor
        elif name == "head.weight":
            array[:, [1, 6]] /= factor
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    return result


def encoder_input(shape: EncoderShape | None = None, *, n: int = 4, seed: int = 1) -> NDArray:
    """Return a seeded input for an encoder of `shape`: (n, sequence, width) float32 or (n, sequence) int64."""
    s = shape or EncoderShape()
    length = s.sequence if isinstance(s.sequence, int) else 6
    rng = np.random.default_rng(seed)
    if s.vocabulary is not None:
        return rng.integers(0, s.vocabulary, (n, length))
    return rng.standard_normal((n, length, s.width)).astype(np.float32)


def _encoder(seed: int, s: EncoderShape, *, exported: bool, opset: int) -> onnx.ModelProto:
    g = _Graph(np.random.default_rng(seed))
    x = "x"
    if s.vocabulary is not None:
        table = (g.rng.standard_normal((s.vocabulary, s.width))).astype(np.float32)
        x = g.op("Gather", [g.constant("embedding.weight", table), "x"], "embedding")
    for k in range(s.layers):
        x = _block(g, x, s, f"layer{k}", exported)
    if not s.post_norm:
        x = _norm(g, x, s.width, "final_norm", exported)
    if opset < 18:
        x = g.op("ReduceMean", [x], "pool", axes=[1], keepdims=0)
    else:
        x = g.op("ReduceMean", [x, g.constant("pool.axes", np.array([1]))], "pool", keepdims=0)
    g.constant("head.weight", (g.rng.standard_normal((s.classes, s.width)) / np.sqrt(s.width)).astype(np.float32))
    g.constant("head.bias", g.rng.standard_normal(s.classes).astype(np.float32) * np.float32(0.1))
    g.nodes.append(helper.make_node("Gemm", [x, "head.weight", "head.bias"], ["y"], name="head", transB=1))
    ids = s.vocabulary is not None
    port = helper.make_tensor_value_info(
        "x", TensorProto.INT64 if ids else TensorProto.FLOAT, ["N", s.sequence] if ids else ["N", s.sequence, s.width]
    )
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", s.classes])
    graph = helper.make_graph(
        g.nodes, "encoder", [port], [out], [numpy_helper.from_array(w, n) for n, w in g.weights.items()]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _block(g: _Graph, x: str, s: EncoderShape, name: str, exported: bool) -> str:
    if s.post_norm:
        x = g.op("Add", [x, _attention(g, x, s, f"{name}.attention")], f"{name}.residual1")
        x = _norm(g, x, s.width, f"{name}.norm1", exported)
        h = _gelu(g, g.linear(x, s.width, s.hidden, f"{name}.up"), f"{name}.gelu", exported)
        x = g.op("Add", [x, g.linear(h, s.hidden, s.width, f"{name}.down")], f"{name}.residual2")
        return _norm(g, x, s.width, f"{name}.norm2", exported)
    normed = _norm(g, x, s.width, f"{name}.norm1", exported)
    x = g.op("Add", [x, _attention(g, normed, s, f"{name}.attention")], f"{name}.residual1")
    h = g.linear(_norm(g, x, s.width, f"{name}.norm2", exported), s.width, s.hidden, f"{name}.up")
    h = _gelu(g, h, f"{name}.gelu", exported)
    return g.op("Add", [x, g.linear(h, s.hidden, s.width, f"{name}.down")], f"{name}.residual2")


def _attention(g: _Graph, x: str, s: EncoderShape, name: str) -> str:
    size = s.width // s.heads
    split = g.constant(f"{name}.split", np.array([0, 0, s.heads, size]))

    def heads(part: str, perm: list[int]) -> str:
        y = g.op("Reshape", [g.linear(x, s.width, s.width, f"{name}.{part}"), split], f"{name}.{part}.split")
        return g.op("Transpose", [y], f"{name}.{part}.heads", perm=perm)

    q, k, v = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    scores = g.op("MatMul", [q, k], f"{name}.scores")
    scores = g.op("Div", [scores, g.scalar(f"{name}.root", float(np.sqrt(size)))], f"{name}.scale")
    mixed = g.op("MatMul", [g.op("Softmax", [scores], f"{name}.softmax", axis=-1), v], f"{name}.mix")
    mixed = g.op("Transpose", [mixed], f"{name}.together", perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", [mixed, g.constant(f"{name}.merge", np.array([0, 0, s.width]))], f"{name}.merged")
    return g.linear(mixed, s.width, s.width, f"{name}.out")


def _norm(g: _Graph, x: str, width: int, name: str, exported: bool) -> str:
    gamma, beta = g.gamma_beta(width, name)
    if not exported:
        return g.op("LayerNormalization", [x, gamma, beta], name, axis=-1, epsilon=1e-5)
    centred = g.op("Sub", [x, g.op("ReduceMean", [x], f"{name}.mean", axes=[-1])], f"{name}.centred")
    square = g.op("Pow", [centred, g.scalar(f"{name}.two", 2.0)], f"{name}.square")
    variance = g.op("ReduceMean", [square], f"{name}.variance", axes=[-1])
    deviation = g.op(
        "Sqrt", [g.op("Add", [variance, g.scalar(f"{name}.epsilon", 1e-5)], f"{name}.stable")], f"{name}.deviation"
    )
    scaled = g.op("Mul", [g.op("Div", [centred, deviation], f"{name}.normal"), gamma], f"{name}.scaled")
    return g.op("Add", [scaled, beta], f"{name}.shifted")


def _gelu(g: _Graph, x: str, name: str, exported: bool) -> str:
    if not exported:
        return g.op("Gelu", [x], name)
    erf = g.op("Erf", [g.op("Div", [x, g.scalar(f"{name}.root2", float(np.sqrt(2)))], f"{name}.scaled")], f"{name}.erf")
    cdf = g.op("Add", [erf, g.scalar(f"{name}.one", 1.0)], f"{name}.cdf")
    return g.op("Mul", [g.op("Mul", [x, cdf], f"{name}.product"), g.scalar(f"{name}.half", 0.5)], name)
