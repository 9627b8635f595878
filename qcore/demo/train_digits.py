"""The script that made `digits_cnn.onnx`: train a small residual network on the digits and write its graph by hand.

Run `python -m qcore.demo.train_digits` (needs torch, extra `train`; half a minute on one core). The package never
imports this file. The graph is written with onnx.helper, so that node names are clean and BatchNormalization stays
visible for folding. Torch gives the same weights for the same seed, version and kind of CPU only: the committed file is
the truth.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from qcore.demo.make_data import EVALUATION, PIXEL_MAX, TRAIN, digits
from qcore.files import write_atomic

logger = logging.getLogger(__name__)

OUT = Path(__file__).with_name("digits_cnn.onnx")
SEED = 0
EPOCHS = 60
BATCH = 50
PEAK_RATE = 0.01
BN_EPSILON = 1e-5

Weights = dict[str, torch.Tensor]

CONVS = {
    # name: (weight shape (out, in / groups, h, w), groups, stride)
    "stem": ((32, 1, 3, 3), 1, 1),
    "block1": ((32, 32, 3, 3), 1, 1),
    "block2": ((32, 32, 3, 3), 1, 1),
    "depthwise": ((32, 1, 3, 3), 32, 2),
    "pointwise": ((64, 32, 1, 1), 1, 1),
}


def initial_weights() -> tuple[Weights, Weights]:
    """Return (trained, running): He-initialised weights, and batch-norm running mean 0 and variance 1."""
    trained: Weights = {}
    running: Weights = {}
    for name, (shape, _, _) in CONVS.items():
        fan_in = shape[1] * shape[2] * shape[3]
        trained[f"{name}.conv.weight"] = torch.randn(shape) * (2 / fan_in) ** 0.5
        trained[f"{name}.bn.scale"] = torch.ones(shape[0])
        trained[f"{name}.bn.bias"] = torch.zeros(shape[0])
        running[f"{name}.bn.mean"] = torch.zeros(shape[0])
        running[f"{name}.bn.var"] = torch.ones(shape[0])
    trained["head.weight"] = torch.randn(10, 64) * (1 / 64) ** 0.5
    trained["head.bias"] = torch.zeros(10)
    for tensor in trained.values():
        tensor.requires_grad_()
    return trained, running


def forward(x: torch.Tensor, trained: Weights, running: Weights, *, training: bool) -> torch.Tensor:
    """Return the logits (n, 10) of images (n, 1, 8, 8); with `training`, also move the running batch-norm values."""

    def conv_bn(name: str, x: torch.Tensor) -> torch.Tensor:
        (_, _, height, _), groups, stride = CONVS[name]
        y = functional.conv2d(x, trained[f"{name}.conv.weight"], stride=stride, padding=height // 2, groups=groups)
        mean, var = running[f"{name}.bn.mean"], running[f"{name}.bn.var"]
        scale, bias = trained[f"{name}.bn.scale"], trained[f"{name}.bn.bias"]
        return functional.batch_norm(y, mean, var, scale, bias, training=training, momentum=0.1, eps=BN_EPSILON)

    stem = torch.relu(conv_bn("stem", x))
    block = conv_bn("block2", torch.relu(conv_bn("block1", stem)))
    y = torch.relu(stem + block)
    y = torch.relu(conv_bn("depthwise", y))
    y = torch.relu(conv_bn("pointwise", y))
    return functional.linear(y.mean(dim=(2, 3)), trained["head.weight"], trained["head.bias"])


def train(x: torch.Tensor, y: torch.Tensor) -> tuple[Weights, Weights]:
    """Return (trained, running) after `EPOCHS` passes with random shifts of up to one pixel and a one-cycle rate."""
    trained, running = initial_weights()
    optimizer = torch.optim.AdamW(list(trained.values()), lr=PEAK_RATE, weight_decay=0.01)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            down, right = (int(s) for s in torch.randint(0, 3, (2,)))
            shifted = functional.pad(x[batch], (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
            loss = functional.cross_entropy(forward(shifted, trained, running, training=True), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            logger.info("epoch %d of %d: loss %.4f", epoch + 1, EPOCHS, loss.item())
    return trained, running


def build_model(weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Return the ONNX model (opset 17, symbolic batch `N`) that computes `forward` in evaluation mode.

    Args:
        weights: trained and running tensors by name, float32.
    """
    nodes: list[onnx.NodeProto] = []

    def add(op: str, name: str, inputs: Iterable[str], **attributes: Any) -> str:
        output = f"{name}.out"
        nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def conv_bn(name: str, x: str) -> str:
        (_, _, height, width), groups, stride = CONVS[name]
        shape = {"kernel_shape": [height, width], "pads": [height // 2, width // 2] * 2, "strides": [stride, stride]}
        y = add("Conv", f"{name}.conv", [x, f"{name}.conv.weight"], group=groups, **shape)
        parameters = [f"{name}.bn.{p}" for p in ("scale", "bias", "mean", "var")]
        return add("BatchNormalization", f"{name}.bn", [y, *parameters], epsilon=BN_EPSILON)

    stem = add("Relu", "stem.relu", [conv_bn("stem", "image")])
    block = conv_bn("block2", add("Relu", "block1.relu", [conv_bn("block1", stem)]))
    y = add("Relu", "residual.relu", [add("Add", "residual.add", [stem, block])])
    y = add("Relu", "depthwise.relu", [conv_bn("depthwise", y)])
    y = add("Relu", "pointwise.relu", [conv_bn("pointwise", y)])
    y = add("Flatten", "flatten", [add("GlobalAveragePool", "pool", [y])])
    nodes.append(helper.make_node("Gemm", [y, "head.weight", "head.bias"], ["logits"], name="head", transB=1))
    graph = helper.make_graph(
        nodes,
        "digits_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="qcore.demo")
    model.ir_version = 8  # the IR that came with opset 17
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Train, log the accuracy on the evaluation split, and write `digits_cnn.onnx` beside this file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    images, labels = digits()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / PIXEL_MAX)
    y = torch.from_numpy(labels)
    trained, running = train(x[TRAIN.start : TRAIN.stop], y[TRAIN.start : TRAIN.stop])
    part = slice(EVALUATION.start, EVALUATION.stop)
    with torch.no_grad():
        right = forward(x[part], trained, running, training=False).argmax(dim=1) == y[part]
    data = build_model({k: v.detach().numpy() for k, v in (trained | running).items()}).SerializeToString()
    write_atomic(OUT, data)
    logger.info("%s: %d bytes, %d of %d right", OUT.name, len(data), int(right.sum()), len(right))


if __name__ == "__main__":
    main()
