"""Evidence in memory for recovery steps, and small nets whose channels differ in size as those of trained nets do."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from models import model_of
from numpy.typing import NDArray
from onnx import helper

from qcore.calibration import calibrate
from qcore.config import check_config
from qcore.data.dataset import Batch
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.quantize import tensors_to_calibrate
from qcore.recipe import Recipe
from qcore.recovery import Evidence
from qcore.runtime.ort import activations

BATCH = 8


def parsed(proto: onnx.ModelProto) -> ir.Model:
    return parse_model(proto.SerializeToString(), "m")


def evidence_of(x: NDArray, *, name: str = "x", task: str = "none") -> Evidence:
    """Return evidence of the samples `x`: three batches in four to fit, one to judge."""
    parts = [{name: x[k : k + BATCH]} for k in range(0, len(x), BATCH)]

    def table(model: ir.Model):
        batch = Batch(index=np.arange(len(x)), x={name: x}, y=None)
        counted = activations(serialize_model(model), tensors_to_calibrate(model), [batch])
        return calibrate(counted, model_sha256="m" * 64, data_sha256="d" * 64)

    return Evidence(
        table=table,
        fit=tuple(p for k, p in enumerate(parts) if k % 4),
        held_out=tuple(p for k, p in enumerate(parts) if k % 4 == 0),
        batch=BATCH,
        task=task,
    )


def recipe_with(*steps: dict, **quantize: object) -> Recipe:
    """Return fold, gemm-head, the `steps` in front, quantize, and the mending `steps` behind it."""
    mend = [s for s in steps if s["method"] in ("correct-bias", "round-weights")]
    front = [s for s in steps if s not in mend]
    ready = [{"method": "fold-batchnorm"}, {"method": "gemm-head"}]
    value = {"name": "test", "steps": [*ready, *front, {"method": "quantize", **quantize}, *mend]}
    return check_config(value, Recipe, "test recipe")


class Net:
    """A graph that grows: every method appends a layer behind the last tensor; `at` names that tensor."""

    def __init__(self, seed: int, channels: int = 3, size: int = 6) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray] = {}
        self.at, self.channels, self.start, self.size = "x", channels, channels, size

    def op(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}.out"], name=name, **attributes))
        self.at = f"{name}.out"
        return self.at

    def constant(self, array: NDArray) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = np.asarray(array, np.float32)
        return name

    def normal(self, *shape: int, scale: float = 0.4) -> NDArray:
        return self.rng.standard_normal(shape) * scale

    def conv(self, outputs: int, kernel: int = 3, group: int = 1, bias: bool = True) -> str:
        """Channels of the output differ by up to a hundred."""
        size = np.exp(self.rng.uniform(-2.3, 2.3, outputs)).reshape(-1, 1, 1, 1)
        w = self.normal(outputs, self.channels // group, kernel, kernel) * size
        inputs = [self.at, self.constant(w)]
        inputs += [self.constant(self.normal(outputs) * size.reshape(-1))] if bias else []
        self.channels = outputs
        return self.op("Conv", inputs, group=group, pads=[kernel // 2] * 4)

    def depthwise(self) -> str:
        return self.conv(self.channels, group=self.channels)

    def relu(self) -> str:
        return self.op("Relu", [self.at])

    def clip(self, high: float = 6.0) -> str:
        return self.op("Clip", [self.at, self.constant(np.float32(0)), self.constant(np.float32(high))])

    def add(self, other: str) -> str:
        return self.op("Add", [self.at, other])

    def gate(self) -> str:
        """Squeeze and excitation."""
        data, channels = self.at, self.channels
        self.op("GlobalAveragePool", [data])
        self.conv(2, 1)
        self.relu()
        self.conv(channels, 1)
        return self.op("Mul", [data, self.op("Sigmoid", [self.at])])

    def head(self, classes: int = 5, transposed: bool = True) -> onnx.ModelProto:
        self.op("GlobalAveragePool", [self.at])
        self.op("Flatten", [self.at])
        w = self.normal(classes, self.channels)
        inputs = [self.at, self.constant(w if transposed else w.T), self.constant(self.normal(classes))]
        self.op("Gemm", inputs, transB=int(transposed))
        return self.model(["N", classes])

    def model(self, shape: Sequence[int | str]) -> onnx.ModelProto:
        self.nodes[-1].output[0] = "y"
        inputs = {"x": ["N", self.start, self.size, self.size]}
        return model_of(self.nodes, self.weights, inputs=inputs, outputs={"y": shape})


def images(n: int = 64, *, seed: int = 5, channels: int = 3, size: int = 6) -> NDArray:
    return np.random.default_rng(seed).standard_normal((n, channels, size, size)).astype(np.float32)


def outlier_net(bias: bool = True) -> onnx.ModelProto:
    """Return a net with one channel of 300 times the size of the others behind each layer; the next one undoes it."""
    net = Net(3)
    tall, previous = 300.0, None
    for k in range(3):
        w, b = net.normal(8, net.channels, 3, 3, scale=0.3), net.normal(8)
        if previous is not None:
            w[:, previous] /= tall
        w[k] *= tall
        b[k] *= tall
        inputs = [net.at, net.constant(w)] + ([net.constant(b)] if bias else [])
        net.op("Conv", inputs, pads=[1] * 4)
        net.relu()
        net.channels, previous = 8, k
    last = net.normal(5, 8)
    last[:, previous] /= tall
    net.op("GlobalAveragePool", [net.at])
    net.op("Flatten", [net.at])
    net.op("Gemm", [net.at, net.constant(last), net.constant(net.normal(5))], transB=1)
    return net.model(["N", 5])
