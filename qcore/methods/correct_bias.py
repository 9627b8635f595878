"""Bias correction: the mean of every output channel is what it was before quantization.

`empirical` takes the inputs that a layer gets in the quantized graph, layer after layer, so earlier errors are
made good too. `analytic` takes the means of the float inputs from statistics: no pass through the quantized graph.

Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.2; Finkelstein et al. 2019 (arXiv 1906.03193).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.graph.edit import editable_copy
from qcore.graph.grid import LAYERS, float_bias, grid_nodes, matrix_of, replace_layer, scale_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name
from qcore.numerics.channels import ChannelStats
from qcore.numerics.refine import GridLayer, LayerMoments, corrected_bias

Array = NDArray[np.float64]


class CorrectBiasStep(Config):
    """Options of the recipe step `correct-bias`.

    `samples` of the calibration split are run and `positions` outputs of each convolution looked at, in `empirical`.
    """

    method: Literal["correct-bias"] = "correct-bias"
    kind: Literal["empirical", "analytic"] = "empirical"
    samples: int = Field(default=128, ge=1)
    positions: int = Field(default=64, ge=1)


def correct_bias(layer: GridLayer, moments: LayerMoments) -> tuple[GridLayer, Array]:
    """Return `layer` as it is, and the bias that restores its means."""
    return layer, corrected_bias(layer.integers, layer.scale, moments)


def inputs_of_layers(model: ir.Model, *op_types: str) -> tuple[str, ...]:
    """Return the names of the activations that layers of some types read, in graph order."""
    nodes = [n for n in editable_copy(model).graph if n.op_type in op_types]
    names = [str(n.inputs[0].name) for n in nodes if n.inputs[0] is not None and constant_array(n.inputs[0]) is None]
    return tuple(dict.fromkeys(names))


def correct_bias_analytically(
    quantized: ir.Model,
    reference: ir.Model,
    maps: Mapping[str, ChannelStats],
    rows: Mapping[str, ChannelStats],
    *,
    float_biases: bool = False,
) -> Rewrite:
    """Return `quantized` with biases that make up for the error of its weights at the mean input.

    Args:
        quantized: QDQ model.
        reference: the float model that it was made from.
        maps: statistics of axis 1 of the float inputs of convolutions, by tensor name; layers without are skipped.
        rows: the same of the last axis of what MatMul and Gemm read.
        float_biases: whether layers without a bias get a float one; else int32.
    """
    out = editable_copy(quantized)
    floats = {node_name(n): n for n in editable_copy(reference).graph if n.op_type in LAYERS}
    layers, skipped = grid_nodes(out.graph, floats, float_biases=float_biases)
    changed: list[str] = []
    for layer in layers:
        node = floats[node_name(layer.node)]
        if not layer.has_bias:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=layer.unbiased))
            continue
        wanted = matrix_of(layer, constant_array(node.inputs[1]))
        mean = _mean_input(node, wanted.shape, maps if node.op_type == "Conv" else rows)
        if mean is None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason="its input was not measured"))
            continue
        integers = matrix_of(layer, constant_array(layer.weight)) - layer.zero
        error = integers * scale_of(layer, wanted.shape)[:, :, None] - wanted
        before = float_bias(layer, node, wanted.shape[:2])
        same = GridLayer(wanted=wanted, integers=integers, scale=scale_of(layer, wanted.shape))
        new = replace_layer(layer, same, before - (error @ mean[:, :, None])[:, :, 0])
        changed += [node_name(layer.node)] if new else []
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _mean_input(node: ir.Node, shape: tuple[int, ...], channels: Mapping[str, ChannelStats]) -> Array | None:
    """Return the mean input of a layer whose weights have `shape` (groups, outputs, inputs), as (groups, inputs)."""
    stats = channels.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    groups, _, inputs = shape
    if stats is None or inputs * groups % stats.mean.size or stats.mean.size % groups:
        return None
    return np.repeat(stats.mean.reshape(groups, -1), inputs * groups // stats.mean.size, axis=1)
