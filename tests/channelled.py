"""Nets whose channels can be removed, masks to remove them by, and channels made dead so that nothing should change."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from recovering import Net

from qcore.graph.channels import Channels, channel_groups
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.slicing import remove_channels

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def into_axis(node: onnx.NodeProto) -> int:
    """Return the axis of the weights of a layer along which its inputs are."""
    flipped = any(a.name == "transB" and a.i for a in node.attribute)
    return 1 if node.op_type == "Conv" or flipped else 0


def is_grouped(node: onnx.NodeProto) -> bool:
    return any(a.name == "group" and a.i != 1 for a in node.attribute)


def readers(proto: onnx.ModelProto) -> set[tuple[str, int]]:
    """Return the axes of weights that read channels."""
    return {(n.input[1], into_axis(n)) for n in proto.graph.node if n.op_type in LAYERS and not is_grouped(n)}


def random_keep(channels: Channels, seed: int, share: float = 0.5) -> dict[str, NDArray]:
    """Return masks that leave out about `share` of the free channels, and keep a channel on every axis."""
    rng = np.random.default_rng(seed)
    keep = {g.name: ~(g.free & (rng.random(g.size) < share)) for g in channels.groups}
    for _ in range(8):
        for axis in channels.axes:
            if not channels.kept(axis, keep).any():
                keep[channels.groups[axis.group.max()].name][axis.channel[axis.group == axis.group.max()][0]] = True
    return keep


def with_dead(
    proto: onnx.ModelProto, channels: Channels, keep: dict, chosen: Callable[[tuple[str, int]], bool]
) -> onnx.ModelProto:
    """Return `proto` with zeros for removed channels along the `chosen` axes of constants."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    constants = {i.name: i for i in out.graph.initializer}
    for axis in channels.axes:
        if axis.tensor in constants and chosen((axis.tensor, axis.axis)):
            array = numpy_helper.to_array(constants[axis.tensor]).copy()
            np.moveaxis(array, axis.axis, 0)[~channels.kept(axis, keep)] = 0
            constants[axis.tensor].CopyFrom(numpy_helper.from_array(array, axis.tensor))
    return out


def run_all(data: bytes, fed: dict[str, NDArray]) -> list[NDArray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, fed)


def pruned(proto: onnx.ModelProto, keep: dict[str, NDArray]) -> bytes:
    model = parse_model(proto.SerializeToString(), "m")
    before = serialize_model(model)
    data = serialize_model(remove_channels(model, channel_groups(model), keep).model)
    assert serialize_model(model) == before
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    return data


def groups_of(proto: onnx.ModelProto) -> Channels:
    return channel_groups(parse_model(proto.SerializeToString(), "m"))


def assert_nothing_lost(proto: onnx.ModelProto, seed: int, *, producers_dead: bool = False) -> Channels:
    """Remove channels that are dead, and see that the outputs stay what they were; return the groups."""
    channels = groups_of(proto)
    keep = random_keep(channels, seed)
    reading = readers(proto)
    dead = with_dead(proto, channels, keep, lambda place: (place in reading) != producers_dead)
    dims = [[d.dim_value or 3 for d in i.type.tensor_type.shape.dim] for i in proto.graph.input]
    rng = np.random.default_rng(seed)
    fed = {i.name: rng.standard_normal(d).astype(np.float32) for i, d in zip(proto.graph.input, dims, strict=True)}
    want, got = run_all(dead.SerializeToString(), fed), run_all(pruned(dead, keep), fed)
    for w, g in zip(want, got, strict=True):
        assert w.shape == g.shape
        scale = np.abs(w).max() if w.size else 0
        assert np.allclose(w, g, rtol=1e-4, atol=1e-5 * max(scale, 1e-3)), np.abs(w - g).max()
    return channels


class Wide(Net):
    """A net that grows by blocks whose channels are tied in many ways; every channel count is a multiple of 4."""

    def batch_norm(self) -> str:
        c = self.channels
        arrays = [self.rng.uniform(0.5, 1.5, c), self.normal(c), self.normal(c), self.rng.uniform(0.5, 2, c)]
        return self.op("BatchNormalization", [self.at, *(self.constant(a) for a in arrays)])

    def plain(self) -> None:
        self.conv(int(self.rng.choice([4, 8, 12])), int(self.rng.choice([1, 3])), bias=bool(self.rng.integers(2)))
        if self.rng.integers(2):
            self.batch_norm()
        self.relu()

    def residual(self) -> None:
        start, channels = self.at, self.channels
        self.conv(8)
        self.relu()
        self.conv(channels)
        self.op(str(self.rng.choice(["Add", "Sub", "Mul", "Max"])), [self.at, start])
        self.relu()

    def separable(self) -> None:
        """Depthwise, with one or two filters a channel."""
        twice = int(self.rng.integers(1, 3))
        self.conv(self.channels * twice, group=self.channels)
        self.clip()
        self.conv(8, 1)

    def grouped(self) -> None:
        self.conv(8, group=2 if self.channels % 4 == 0 else 1)
        self.relu()

    def joined(self) -> None:
        """Concat of a branch, the input twice, and a constant."""
        start, channels, size = self.at, self.channels, self.size
        self.conv(4)
        del size
        parts = [start, self.at, *([start] if self.rng.integers(2) else [])]
        self.op("Concat", parts, axis=1)
        self.channels = channels * (len(parts) - 1) + 4
        self.batch_norm()

    def halves(self) -> None:
        """Split, a branch on one half, joined again."""
        if self.channels % 2:
            return
        self.conv(8)
        node = helper.make_node("Split", [self.at], ["", ""], name=f"split{len(self.nodes)}", axis=1)
        node.output[:] = [f"{node.name}.a", f"{node.name}.b"]
        self.nodes.append(node)
        self.at, self.channels = node.output[1], 4
        self.conv(4)
        self.op("Concat", [node.output[0], self.at], axis=1)
        self.channels = 8

    def moved(self) -> None:
        """To channels last, scaled there, and back."""
        self.op("Transpose", [self.at], perm=[0, 2, 3, 1])
        self.op("Mul", [self.at, self.constant(self.normal(self.channels))])
        self.op("Transpose", [self.at], perm=[0, 3, 1, 2])

    def scaled(self) -> None:
        self.op("PRelu", [self.at, self.constant(self.normal(self.channels, 1, 1))])
        self.op("Add", [self.at, self.constant(self.normal(1, self.channels, 1, 1))])

    def flat_head(self, way: str = "Flatten") -> onnx.ModelProto:
        """All positions of all channels to a hidden layer, then classes."""
        n = self.channels * self.size * self.size
        if way == "Flatten":
            self.op("Flatten", [self.at])
        else:
            name = f"shape{len(self.weights)}"
            wanted = [0, n] if way == "literal" else [0, -1] if way == "zero" else [-1, n]
            self.weights[name] = np.array(wanted, np.int64)
            self.op("Reshape", [self.at, name])
        self.op("Gemm", [self.at, self.constant(self.normal(8, n, scale=0.1)), self.constant(self.normal(8))], transB=1)
        self.relu()
        self.op("MatMul", [self.at, self.constant(self.normal(8, 6))])
        self.op("Add", [self.at, self.constant(self.normal(6))])
        self.relu()
        self.op("Gemm", [self.at, self.constant(self.normal(6, 5)), self.constant(self.normal(5))])
        return self.model(["N", 5])


BLOCKS = ("plain", "residual", "separable", "grouped", "joined", "halves", "moved", "scaled", "gate")
WAYS = ("Flatten", "literal", "zero", "minus")


def grown(seed: int, blocks: list[str], head: str, width: int = 8) -> onnx.ModelProto:
    """Return a net of `blocks` with a head: pooled, or flattened in one of `WAYS`."""
    net = Wide(seed, size=4)
    net.conv(width)
    for block in blocks:
        getattr(net, block)()
    return net.head() if head == "pooled" else net.flat_head(head)
