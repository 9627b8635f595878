"""Batch-norm folding: BatchNormalization after Conv, ConvTranspose or Gemm becomes part of the weights."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, remove_in_favour_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import (
    constant_array,
    float_attribute,
    int_attribute,
    is_vector,
    node_name,
    only_consumer,
)


def fold_batchnorm(model: ir.Model) -> Rewrite:
    r"""Return the model with every foldable BatchNormalization merged into the layer before it.

    With `f = gamma / sqrt(variance + epsilon)` per output channel: `w' = w * f`, `b' = (b - mean) * f + beta`,
    computed in float64. The layer's output takes over the name of the BatchNormalization's output, so statistics
    taken on the unfolded model fit the folded one.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 3.2, eq. 14; ONNX BatchNormalization-15 (epsilon 1e-5).
    """
    out = editable_copy(model)
    changed: list[str] = []
    skipped: list[Skipped] = []
    for bn in [n for n in out.graph if n.op_type == "BatchNormalization" and n.domain == ""]:
        reason = _fold_one(bn)
        if reason is None:
            changed.append(node_name(bn))
        else:
            skipped.append(Skipped(node=node_name(bn), op_type=bn.op_type, reason=reason))
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _fold_one(bn: ir.Node) -> str | None:
    """Fold `bn` into its producer, or return why not."""
    source = bn.inputs[0]
    layer = source.producer() if source is not None else None
    if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or layer.domain != "":
        return f"it follows {layer.op_type if layer else 'a graph input'}, not Conv, ConvTranspose or Gemm"
    if only_consumer(layer.outputs[0]) is not bn:
        return f"the output of {node_name(layer)} has other readers"
    if int_attribute(bn, "training_mode", 0) or len([o for o in bn.outputs if o.uses() or o.is_graph_output()]) > 1:
        return "it is in training mode"
    axis = _output_channel_axis(layer)
    if axis is None:
        return f"{node_name(layer)} mixes output channels over its groups, alpha or beta"
    gamma, beta, mean, variance = (constant_array(v) for v in bn.inputs[1:5])
    weight = constant_array(layer.inputs[1])
    bias = constant_array(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] is not None else None
    has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
    if weight is None or gamma is None or beta is None or mean is None or variance is None:
        return "weights or statistics are not constants"
    if has_bias and (bias is None or not is_vector(bias, gamma.size)):
        return "the bias is not a constant vector"
    if not (variance.astype(np.float64) + float_attribute(bn, "epsilon", 1e-5) > 0).all():
        return "its variance is not positive"
    factor = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + float_attribute(bn, "epsilon", 1e-5))
    shape = [1] * weight.ndim
    shape[axis] = -1  # below, + 0.0 makes zeros of -0.0
    offset = (0.0 if bias is None else bias.astype(np.float64).reshape(-1)) - mean
    _set_parameters(layer, weight * factor.reshape(shape) + 0.0, offset * factor + beta, weight.dtype)
    remove_in_favour_of(bn, layer.outputs[0])
    return None


def _output_channel_axis(layer: ir.Node) -> int | None:
    match layer.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1 if int_attribute(layer, "group", 1) == 1 else None
        case _:
            plain = float_attribute(layer, "alpha", 1.0) == 1.0 and float_attribute(layer, "beta", 1.0) == 1.0
            return (0 if int_attribute(layer, "transB", 0) else 1) if plain else None


def _set_parameters(
    layer: ir.Node, weight: NDArray[np.floating], bias: NDArray[np.floating], dtype: np.dtype[np.generic]
) -> None:
    """Give `layer` new weights and bias under new names, so that layers that share the old ones keep them."""
    graph = layer.graph
    assert isinstance(graph, ir.Graph)  # noqa: S101 - only nodes of the main graph are folded
    name = node_name(layer)
    layer.resize_inputs(3)
    layer.replace_input_with(1, add_initializer(graph, f"{name}.weight_folded", weight.astype(dtype)))
    layer.replace_input_with(2, add_initializer(graph, f"{name}.bias_folded", bias.astype(dtype)))
