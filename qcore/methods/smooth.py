"""SmoothQuant: the outlier channels of activations move into the weights that read them; the function stays the same.

Per input channel j, `X W = (X / s) (s W)` with `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`. The division goes into
what makes X, where that is a LayerNormalization, a Mul or Add with a constant, or a linear layer. Else a Mul may be
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
from qcore.graph.traverse import (
    constant_array,
    float_attribute,
    int_attribute,
    ints_attribute,
    node_name,
    only_consumer,
)

Float = NDArray[np.floating]
_Edit = tuple[ir.Node, int, Float]  # this input of this node becomes this constant

_ALONG = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "Gather", "Identity", "Dropout")
_SMALLEST = 1e-5  # a channel that is almost never used is not blown up by more than this


class SmoothStep(Config):
    """Options of the recipe step `smooth`.

    `alpha` is how much of the difficulty goes to the weights, `exclude` names nodes whose inputs are left alone, and
    `insert` puts a Mul in front of layers where nothing can hold the division.
    """

    method: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.5, ge=0, le=1)
    exclude: tuple[str, ...] = ()
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
        reason = _divide(out.graph, group, s, step.insert)
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


def _divide(graph: ir.Graph, group: _Group, s: NDArray[np.float64], insert: bool) -> str | None:
    """Divide the activation by `s`, in what makes it or by a Mul for the group, or return why that is not done."""
    value = group.source
    alone = not value.is_graph_output() and {n for n, _ in value.uses()} <= set(group.readers)
    edits = _absorbed(value, 1 / s) if alone else None
    if edits is not None:
        for node, index, array in edits:
            old = node.inputs[index]
            name = old.name if old is not None else node_name(node)
            node.replace_input_with(index, add_initializer(graph, f"{name}_smoothed", array.astype(np.float32)))
        return None
    if not insert:
        return f"what makes {value.name} cannot be scaled" if alone else f"more than layers read {value.name}"
    factor = add_initializer(graph, f"{value.name}_smoothing", (1 / s).astype(np.float32))
    mul = ir.node("Mul", [value, factor], name=fresh_name(graph, f"{value.name}_smooth"))
    mul.outputs[0].name = fresh_name(graph, f"{value.name}_smoothed")
    mul.outputs[0].type, mul.outputs[0].shape = value.type, value.shape
    graph.insert_before(group.readers[0], mul)
    for node in group.readers:
        node.replace_input_with(0, mul.outputs[0])
    return None


def _absorbed(value: ir.Value, factor: NDArray[np.float64]) -> list[_Edit] | None:
    """Return the edits that multiply `value` by `factor` along its last axis, or None if its maker cannot hold it."""
    node = value.producer()
    if node is None or node.domain != "" or value is not node.outputs[0]:
        return None
    match node.op_type:
        case "LayerNormalization":
            return _into_constants(node, (1, 2), factor)
        case "Mul":
            return _into_either(node, factor)
        case "Add" | "Sub":
            return _into_sum(node, factor)
        case op if op == "Relu" or (op in _ALONG and _keeps_last(node)):  # f(c x) = c f(x) for c > 0
            return _absorbed_before(node.inputs[0], factor)
        case "MatMul" | "Gemm":
            return _into_linear(node, factor)
        case _:
            return None


def _absorbed_before(value: ir.Value | None, factor: NDArray[np.float64]) -> list[_Edit] | None:
    return None if value is None or only_consumer(value) is None else _absorbed(value, factor)


def _keeps_last(node: ir.Node) -> bool:
    """Say whether `node` works on each channel of the last axis by itself, as pooling a sequence or taking one row."""
    if node.op_type in ("Identity", "Dropout"):
        return True
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type == "Gather":
        axes: tuple[int, ...] = (int_attribute(node, "axis", 0),)
    else:
        given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = ints_attribute(node, "axes") if given is None else tuple(int(a) for a in given)
    return shape is not None and bool(axes) and all(a % len(shape) != len(shape) - 1 for a in axes)


def _scaled(value: ir.Value | None, factor: NDArray[np.float64]) -> Float | None:
    """Return the constant `value` times `factor` along its last axis; a scalar becomes a vector."""
    array = constant_array(value)
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    if array.size > 1 and array.shape[-1] not in (1, len(factor)):
        return None
    return np.asarray(array * factor)


def _into_constants(node: ir.Node, indices: tuple[int, ...], factor: NDArray[np.float64]) -> list[_Edit] | None:
    edits: list[_Edit] = []
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] is not None:
            array = _scaled(node.inputs[index], factor)
            if array is None or array.shape != factor.shape:
                return None
            edits.append((node, index, array))
    return edits or None


def _into_either(node: ir.Node, factor: NDArray[np.float64]) -> list[_Edit] | None:
    for index in (1, 0):
        array = _scaled(node.inputs[index], factor)
        if array is not None:
            return [(node, index, array)]
    return None


def _into_sum(node: ir.Node, factor: NDArray[np.float64]) -> list[_Edit] | None:
    for index in (1, 0):
        array = _scaled(node.inputs[index], factor)
        before = _absorbed_before(node.inputs[1 - index], factor) if array is not None else None
        if array is not None and before is not None:
            return [(node, index, array), *before]
    return None


def _into_linear(node: ir.Node, factor: NDArray[np.float64]) -> list[_Edit] | None:
    weight = constant_array(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    transposed = bool(int_attribute(node, "transB", 0))
    edits: list[_Edit] = [(node, 1, weight * (factor[:, None] if transposed else factor))]
    if len(node.inputs) > 2 and node.inputs[2] is not None and float_attribute(node, "beta", 1.0) != 0.0:
        bias = _scaled(node.inputs[2], factor)
        if bias is None:
            return None
        edits.append((node, 2, bias))
    return edits
