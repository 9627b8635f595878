"""Bias absorption: what a Relu always lets through moves into the bias of the layers that read it.

`relu(z - c) = relu(z) - c` where z >= c, so the part c of a channel that is always there need not be quantized: the
layer in front of the Relu gives c less, and those behind it get `W c` from their bias. By default c is what the
activation has never been below on the calibration data, with a margin; on these data the function stays what it was.
Zeros that a convolution pads with are not shifted, so its readers must not pad.

Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.1.3, where c is three standard deviations below the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.graph.added_bias import added_bias
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.sets import POOLS, clip_bound, layer_refusal
from qcore.graph.traverse import auto_pad, constant_array, int_attribute, ints_attribute, node_name, only_consumer
from qcore.numerics.channels import ChannelStats

Array = NDArray[np.float64]
MARGIN = 1.25  # other data go further from the mean than the calibration data did
LAYERS = ("Conv", "Gemm", "MatMul")
_PASSING = ("Identity", "Dropout", "MaxPool", "AveragePool", *POOLS)  # a constant that is added comes out as it is


class AbsorbBiasStep(Config):
    """Options of the recipe step `absorb-bias`.

    `sigmas` takes c so many standard deviations below the mean of each channel, instead of the lowest value seen: more
    is absorbed, and what lies below c is cut.
    """

    method: Literal["absorb-bias"] = "absorb-bias"
    sigmas: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A layer, the Relu or Clip behind it, and all layers that read that."""

    layer: ir.Node
    activation: ir.Node
    readers: tuple[ir.Node, ...]


def activations_to_absorb(model: ir.Model) -> dict[str, int]:
    """Return the activations whose channel statistics `absorb_bias` reads, and the axis of their channels."""
    pairs, _ = _pairs(editable_copy(model).graph)
    return {str(p.activation.outputs[0].name): 1 if p.layer.op_type == "Conv" else -1 for p in pairs}


def absorb_bias(model: ir.Model, step: AbsorbBiasStep, channels: Mapping[str, ChannelStats]) -> Rewrite:
    """Return `model` with high biases absorbed; `changed` names the layers that have another bias.

    Args:
        model: float model, batch norms folded.
        step: options.
        channels: statistics of the activations that `activations_to_absorb` names; others are left alone.
    """
    out = editable_copy(model)
    pairs, skipped = _pairs(out.graph)
    changed: dict[str, None] = {}
    for pair in pairs:
        stats = channels.get(str(pair.activation.outputs[0].name))
        if stats is None or stats.mean.size != _matrix(pair.layer).shape[0]:
            skipped.append(_skip(pair.activation, "its channels were not measured"))
            continue
        c = _always_there(pair.activation, stats, step.sigmas)
        if not c.any():
            skipped.append(_skip(pair.activation, "no channel of it stays above zero"))
            continue
        _shift(out.graph, pair.layer, -c)
        for reader in pair.readers:
            _shift(out.graph, reader, _response(reader, c))
        changed |= dict.fromkeys(node_name(n) for n in (pair.layer, *pair.readers))
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _always_there(activation: ir.Node, stats: ChannelStats, sigmas: float | None) -> Array:
    """Return c >= 0 of every channel; 0 where a Clip may cut the channel from above."""
    below = MARGIN * (stats.mean - stats.low) if sigmas is None else sigmas * np.sqrt(stats.variance)
    c = np.maximum(stats.mean - below, 0.0)
    bound = clip_bound(activation) if activation.op_type == "Clip" else None
    return c if bound is None else np.where(MARGIN * stats.high < bound, c, 0.0)


def _pairs(graph: ir.Graph) -> tuple[list[_Pair], list[Skipped]]:
    pairs: list[_Pair] = []
    skipped: list[Skipped] = []
    for node in graph:
        if node.op_type not in LAYERS or node.domain != "":
            continue
        activation = _activation(node)
        if activation is None:
            continue
        refused = _refusal(node)
        readers = _readers(activation.outputs[0], node.op_type != "Conv") if refused is None else refused
        if isinstance(readers, str):
            skipped.append(_skip(activation, readers))
        else:
            pairs.append(_Pair(layer=node, activation=activation, readers=tuple(readers)))
    return pairs, skipped


def _activation(layer: ir.Node) -> ir.Node | None:
    """Return the Relu, or Clip to [0, constant], that alone reads what `layer` and the Add of its bias make."""
    value = layer.outputs[0]
    if layer.op_type == "MatMul":
        weight = constant_array(layer.inputs[1])
        bias = added_bias(layer, weight.shape[1]) if weight is not None and weight.ndim == 2 else "it has none"
        if isinstance(bias, str):
            return None
        value = bias.node.outputs[0]
    node = only_consumer(value)
    if node is None or node.domain != "" or node.inputs[0] is not value:
        return None
    return node if node.op_type == "Relu" or (node.op_type == "Clip" and clip_bound(node) is not None) else None


def _readers(value: ir.Value, rows: bool) -> list[ir.Node] | str:
    """Return all layers that read `value`, directly or through nodes that hand a constant on, or why one cannot.

    Args:
        value: an activation.
        rows: its channels are the last axis, else the second.
    """
    if value.is_graph_output() or not value.uses():
        return f"{value.name} leaves the model"
    found: list[ir.Node] = []
    for node, index in value.uses():
        passed = _passed(node, rows)
        if index == 0 and passed is not None:
            behind = _readers(node.outputs[0], passed)
            if isinstance(behind, str):
                return behind
            found += behind
            continue
        reason = _reader_refusal(node, rows)
        if reason is None and index != 0:
            reason = "it is read as something else than data"
        if reason is not None:
            return f"its reader {node_name(node)}: {reason}"
        found.append(node)
    return found


def _passed(node: ir.Node, rows: bool) -> bool | None:
    """Return whether the channels behind `node` are the last axis, or None where it does not hand a constant on."""
    if node.domain != "":
        return None
    if node.op_type in ("Identity", "Dropout"):
        return rows
    if rows:
        return None
    if node.op_type == "AveragePool" and int_attribute(node, "count_include_pad", 0):
        return None if _pads(node) or int_attribute(node, "ceil_mode", 0) else False
    if node.op_type in _PASSING:
        return False
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    pooled = before is not None and before.op_type in POOLS
    return True if node.op_type == "Flatten" and int_attribute(node, "axis", 1) == 1 and pooled else None


def _reader_refusal(node: ir.Node, rows: bool) -> str | None:
    if node.op_type not in LAYERS or node.domain != "":
        return f"{node.op_type} cannot take the correction"
    if rows == (node.op_type == "Conv"):
        return "its channels are on another axis"
    if node.op_type == "Conv" and _pads(node):
        return "it pads with zeros, which are not shifted"
    return _refusal(node)


def _pads(node: ir.Node) -> bool:
    """Say whether a convolution or pooling may pad; SAME does not where the kernel is one value wide."""
    mode = auto_pad(node)
    if mode == "NOTSET":
        return any(ints_attribute(node, "pads"))
    weight = constant_array(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = ints_attribute(node, "kernel_shape") if weight is None else weight.shape[2:]
    return mode != "VALID" and any(k != 1 for k in kernel)


def _refusal(node: ir.Node) -> str | None:
    """Return why the bias of a layer cannot be changed, or None."""
    if node.op_type != "MatMul":
        return layer_refusal(node)
    weight = constant_array(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim != 2:
        return "its weights are not a constant float32 matrix"
    bias = added_bias(node, weight.shape[1])
    return bias if isinstance(bias, str) else None


def _matrix(node: ir.Node) -> Array:
    """Return the weights of a layer as (outputs, inputs per group, taps)."""
    weight = constant_array(node.inputs[1])
    assert weight is not None  # noqa: S101 - _refusal has looked
    w = weight.astype(np.float64)
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not int_attribute(node, "transB", 0)):
        w = w.T
    return w.reshape(*w.shape[:2], -1)


def _response(node: ir.Node, c: Array) -> Array:
    """Return what the layer makes of the constant input `c` (inputs,): (outputs,)."""
    w = _matrix(node).sum(axis=2)
    groups = int_attribute(node, "group", 1) if node.op_type == "Conv" else 1
    by_group = w.reshape(groups, -1, w.shape[1]) @ c.reshape(groups, -1, 1)
    return np.asarray(by_group.reshape(-1))


def _shift(graph: ir.Graph, node: ir.Node, by: Array) -> None:
    """Add `by` (outputs,) to the bias of a layer; a layer without one gets it."""
    if node.op_type == "MatMul":
        found = added_bias(node, by.size)
        assert not isinstance(found, str)  # noqa: S101 - _refusal has looked
        holder, index = found.node, found.index
    else:
        holder, index = node, 2
        node.resize_inputs(max(3, len(node.inputs)))
    old = constant_array(holder.inputs[index])
    before = np.zeros(by.size) if old is None else old.astype(np.float64)
    moved = (before + by.reshape(before.shape)).astype(np.float32)
    holder.replace_input_with(index, add_initializer(graph, f"{node_name(node)}.bias_absorbed", moved))


def _skip(node: ir.Node, reason: str) -> Skipped:
    return Skipped(node=node_name(node), op_type=node.op_type, reason=reason)
