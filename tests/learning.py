"""Tiny nets with something to learn, and what training them needs."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from models import model_of
from numpy.typing import NDArray
from onnx import helper

from qcore.graph.io import parse_model

CARD = """\
name: blobs
path: blobs.npz
layout: NCHW
splits:
  calibration: {range: [0, 32]}
  train: {range: [32, 192]}
  validation: {range: [192, 256]}
"""


def small_net(seed: int = 0, *, channels: int = 4, batch: int | str = "N", softmax: bool = False) -> onnx.ModelProto:
    """Return conv, relu, pool, gemm: (N,1,6,6) -> (N,3)."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": (rng.standard_normal((channels, 1, 3, 3)) * 0.5).astype(np.float32),
        "b": (rng.standard_normal(channels) * 0.1).astype(np.float32),
        "wf": (rng.standard_normal((3, channels)) * 0.5).astype(np.float32),
        "bf": np.zeros(3, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf", "bf"], ["z" if softmax else "y"], name="fc", transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["z"], ["y"], name="softmax", axis=1))
    return model_of(nodes, weights, inputs={"x": [batch, 1, 6, 6]}, outputs={"y": [batch, 3]})


def parsed(proto: onnx.ModelProto) -> ir.Model:
    return parse_model(proto.SerializeToString(), "m")


def blobs(n: int = 256, seed: int = 3) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images of three kinds: stripes across, stripes down, and noise alone."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 1, 6, 6)).astype(np.float32) * 0.5
    y = rng.integers(0, 3, n)
    x[y == 0] += np.array([1, -1] * 3, np.float32)[:, None]
    x[y == 1] += np.array([1, -1] * 3, np.float32)
    return x, y


def write_blobs(folder: Path, card: str = CARD, *, n: int = 256, labels: bool = True) -> Path:
    """Write the blobs and their card, and return the card."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = blobs(n)
    np.savez(folder / "blobs.npz", x=x, **({"y": y} if labels else {}))
    path = folder / "blobs.yaml"
    path.write_text(card if labels else card.replace("name: blobs\n", "name: blobs\ntask: none\n"))
    return path
