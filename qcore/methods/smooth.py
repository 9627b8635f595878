"""SmoothQuant: the outlier channels of activations move into the weights that read them; the function stays the same.

Per input channel j, `X W = (X / s) (s W)` with `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`. The division goes into
what makes X (`graph/scales.py`), or into a copy of it where others read X too and it is a norm. Else a Mul may be
inserted, which helps only where nothing rounds X in front of it (dynamic quantization, weights alone). Activation
maxima arrive as an argument: nothing here runs the model.

Source: Xiao et al. 2022 (arXiv 2211.10438) eq. 3 and 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass
from pydantic import Field

from qcore.config import Config
from qcore.errors import CalibrationError, ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.scales import Edit, Float, absorbed
from qcore.graph.traverse import constant_array, int_attribute, node_name

_CHEAP = ("LayerNormalization", "Mul", "Add", "Sub")
_SMALLEST = 1e-5  # a channel that is almost never used is not blown up by more than this


class SmoothStep(Config):
    """Options of the recipe step `smooth`.

    `alpha` is how much of the difficulty goes to the weights, `exclude` names nodes whose inputs are left alone.
    `copy_norms` gives layers a copy of a norm whose result others read too (BERT adds it to the next sum). `insert`
    puts a Mul in front of layers where nothing can hold the division.
    """

    method: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.5, ge=0, le=1)
    exclude: tuple[str, ...] = ()
    copy_norms: bool = True
    insert: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """An activation and all MatMul and Gemm that multiply it with constant weights, in graph order."""

    source: ir.Value
    readers: tuple[ir.Node, ...]


def tensors_to_smooth(model: ir.Model) -> tuple[str, ...]:
    """Return the activations whose channel maxima `smooth` reads, in graph order; the channel axis is the last."""
    return tuple(str(group.source.name) for group in _groups(editable_copy(model).graph, SmoothStep())[0])


def smooth(model: ir.Model, channel_max: Mapping[str, NDArray[np.floating]], step: SmoothStep) -> Rewrite:
    """Return `model` with smoothed inputs of MatMul and Gemm; `changed` names the nodes whose weights were scaled.

    All readers of one activation (q, k, v) share its scales.

    Args:
        model: float model.
        channel_max: by tensor name, the largest |x| seen per channel, (channels,), over all but the last axis.
        step: options.

    Raises:
        ModelError: `exclude` names no node.
        CalibrationError: the maxima of a tensor have another shape than its channels, or are not finite.
    """
    described = {v.name for node in model.graph for v in node.outputs if v.shape is not None}
    out = editable_copy(ShapeInferencePass()(model.clone()).model)
    missing = set(step.exclude) - {node_name(n) for n in out.graph}
    if missing:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    groups, skipped = _groups(out.graph, step)
    changed: list[str] = []
    for group in groups:
        name = str(group.source.name)
        if name not in channel_max:
            skipped += [_skip(n, f"no channel maxima of {name}") for n in group.readers]
            continue
        s = _scales(group, np.asarray(channel_max[name], np.float64), step.alpha)
        reason = _divide(out.graph, group, s, step)
        if reason is not None:
            skipped += [_skip(n, reason) for n in group.readers]
            continue
        for node in group.readers:
            _scale_weights(out.graph, node, s)
            changed.append(node_name(node))
    drop_unused_initializers(out.graph)
    for value in [o for node in out.graph for o in node.outputs]:
        if value.name not in described and not value.is_graph_output():
            value.type = value.shape = None  # inferred here; in the file it would only take room
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def smoothing_scales(activation_max: Float, weight_max: Float, alpha: float) -> NDArray[np.float64]:
    """Return `s = activation_max^alpha / weight_max^(1 - alpha)` per channel, 1 where either is zero.

    Args:
        activation_max: (channels,) largest |x|, finite.
        weight_max: (channels,) largest |w| of the rows that the channels multiply.
        alpha: 0 leaves the activations as they are up to the weights, 1 gives all activations the same maximum.

    Source: Xiao et al. 2022 (arXiv 2211.10438) eq. 4.
    """
    x, w = np.asarray(activation_max, np.float64), np.asarray(weight_max, np.float64)
    used = (x > 0) & (w > 0)
    x, w = np.where(used, np.maximum(x, _SMALLEST), 1.0), np.where(used, np.maximum(w, _SMALLEST), 1.0)
    return np.where(used, x**alpha / w ** (1 - alpha), 1.0)


def _groups(graph: ir.Graph, step: SmoothStep) -> tuple[list[_Group], list[Skipped]]:
    readers: dict[ir.Value, list[ir.Node]] = {}
    skipped: list[Skipped] = []
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
            continue
        source = node.inputs[0]
        reason = _refusal(node, step)
        if reason is not None or source is None:
            skipped.append(_skip(node, str(reason)))
        else:
            readers.setdefault(source, []).append(node)
    return [_Group(source=v, readers=tuple(nodes)) for v, nodes in readers.items()], skipped


def _refusal(node: ir.Node, step: SmoothStep) -> str | None:
    weight = constant_array(node.inputs[1])
    if node_name(node) in step.exclude:
        return "excluded by the recipe"
    if constant_array(node.inputs[0]) is not None:
        return "its first input is a constant"
    if weight is None or weight.dtype != np.float32 or weight.ndim != 2:
        return "its weights are not a constant float32 matrix"
    if int_attribute(node, "transA", 0):
        return "Gemm with transA"
    return None


def _skip(node: ir.Node, reason: str) -> Skipped:
    return Skipped(node=node_name(node), op_type=node.op_type, reason=reason)


def _rows(node: ir.Node) -> Float:
    """Return the weights as (input channels, output channels)."""
    weight = constant_array(node.inputs[1])
    assert weight is not None  # noqa: S101 - _refusal has looked
    return weight.T if int_attribute(node, "transB", 0) else weight


def _scales(group: _Group, activation_max: Float, alpha: float) -> NDArray[np.float64]:
    weight_max = np.max([np.abs(_rows(n)).max(axis=1) for n in group.readers], axis=0)
    if activation_max.shape != weight_max.shape or not np.isfinite(activation_max).all():
        raise CalibrationError(
            f"the channel maxima of {group.source.name} have shape {activation_max.shape}; allowed: finite, "
            f"{weight_max.shape}; measure this model again"
        )
    return smoothing_scales(activation_max, weight_max, alpha)


def _scale_weights(graph: ir.Graph, node: ir.Node, s: NDArray[np.float64]) -> None:
    scaled = _rows(node) * s[:, None]
    if int_attribute(node, "transB", 0):
        scaled = scaled.T
    name = node.inputs[1].name if node.inputs[1] is not None else ""
    node.replace_input_with(1, add_initializer(graph, f"{name}_smoothed", scaled.astype(np.float32)))


def _divide(graph: ir.Graph, group: _Group, s: NDArray[np.float64], step: SmoothStep) -> str | None:
    """Divide the activation by `s`, in what makes it or by a Mul for the group, or return why that is not done."""
    value = group.source
    alone = not value.is_graph_output() and {n for n, _ in value.uses()} <= set(group.readers)
    edits = absorbed(value, 1 / s)
    if edits is not None and not alone:
        edits = _for_readers(graph, group, edits) if step.copy_norms else None
    if edits is not None:
        for node, index, array in edits:
            old = node.inputs[index]
            name = old.name if old is not None else node_name(node)
            node.replace_input_with(index, add_initializer(graph, f"{name}_smoothed", array.astype(np.float32)))
        return None
    if not step.insert:
        return f"what makes {value.name} cannot be scaled" if alone else f"more than layers read {value.name}"
    factor = add_initializer(graph, f"{value.name}_smoothing", (1 / s).astype(np.float32))
    mul = ir.node("Mul", [value, factor], name=fresh_name(graph, f"{value.name}_smooth"))
    mul.outputs[0].name = fresh_name(graph, f"{value.name}_smoothed")
    mul.outputs[0].type, mul.outputs[0].shape = value.type, value.shape
    graph.insert_before(group.readers[0], mul)
    for node in group.readers:
        node.replace_input_with(0, mul.outputs[0])
    return None


def _for_readers(graph: ir.Graph, group: _Group, edits: list[Edit]) -> list[Edit] | None:
    """Let the group read a copy of what makes its activation, and return the edits of the copy; None if it is dear.

    A norm is copied, and the constants behind a chain of nodes that compute one; a layer is not.
    """
    chain: list[ir.Node] = []
    left, value = {node for node, _, _ in edits}, group.source
    while left:
        node = value.producer()
        if node is None or node.op_type not in _CHEAP or len(node.outputs) > 1:
            return None
        chain.append(node)
        left.discard(node)
        value = next(v for v in node.inputs if v is not None and constant_array(v) is None)
    copies: dict[ir.Node, ir.Node] = {}
    results: dict[ir.Value | None, ir.Value] = {}
    for node in reversed(chain):
        inputs = [results.get(v, v) for v in node.inputs]
        copy = ir.node(node.op_type, inputs, node.attributes, name=fresh_name(graph, f"{node_name(node)}_smooth"))
        copy.outputs[0].name = fresh_name(graph, f"{node.outputs[0].name}_smoothed")
        copies[node], results[node.outputs[0]] = copy, copy.outputs[0]
    graph.insert_after(chain[0], list(copies.values()))
    for node in group.readers:
        node.replace_input_with(0, results[group.source])
    return [(copies[node], index, array) for node, index, array in edits]
