"""Static quantization: integer weights, integer activations, int32 biases, written as QDQ or as integer operators.

Which tensors get a Q/DQ pair follows from which nodes the target runs on integers (`placement.py`): their inputs and
outputs, except where a Relu or Clip behind a node is absorbed by the saturation of its Q. Ranges come from a
calibration table; nothing here runs the model.

Source: Jacob et al. 2018 (arXiv 1712.05877); Krishnamoorthi 2018 (arXiv 1806.08342) section 3 for per-channel
weights; ONNX QuantizeLinear-13 and DequantizeLinear-13.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from qcore.calibration import CalibrationTable
from qcore.config import Config
from qcore.errors import CalibrationError, ModelError
from qcore.graph.edit import drop_unused_initializers, editable_copy, remove_in_favour_of
from qcore.graph.half import compute_in_half
from qcore.graph.integer_io import to_integer_io
from qcore.graph.io import convert_opset
from qcore.graph.qdq import dequantized_initializer, insert_activation_qdq
from qcore.graph.qoperator import to_qoperator
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.numerics.affine import (
    TINY_SCALE,
    Float,
    QParams,
    QScheme,
    channel_range,
    container_bits,
    qparams_from_range,
    quantize_array,
)
from qcore.numerics.cover import covering_scale, least_error_scale
from qcore.numerics.stats import RangeRule, RuleKind, range_from_stats
from qcore.placement import (
    ABSORBED,
    Choice,
    Placement,
    absorbing,
    bias_of,
    carrier,
    channel_axis,
    data_inputs,
    data_outputs,
    place,
    root,
    weight_index,
)
from qcore.target import TARGET_KEY, TargetProfile

MAX_OPSET = 27  # QuantizeLinear-28 is unknown to onnxruntime 1.32
_INT32 = np.iinfo(np.int32)
_DEAD_CHANNEL_LEVELS = 1 << 20  # how finely the bias of a channel without weights is kept


class QuantizeStep(Config):
    """Options of the recipe step `quantize`.

    `ranges` and `percentile` choose how activation ranges are read from the table; `weight_bits` overrides the
    target's; `exclude` names nodes that stay float. `precision` says of single nodes, by name, what they run in
    instead: "int16" (16-bit activations in and out, converted between), "float16" (computed between Casts) or
    "float". `form` is how integers are written: "qdq", or "qoperator" for runtimes that want QLinearConv and the like.
    `per_channel: false` gives weights one scale per tensor though the target could use one per channel.
    `weight_ranges: mse` takes the scales of least square error of the weights, which may cut the largest.
    """

    method: Literal["quantize"] = "quantize"
    ranges: RuleKind = "min-max"
    percentile: float = Field(default=99.99, gt=50, le=100)
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    exclude: tuple[str, ...] = ()
    precision: dict[str, Literal["int16", "float16", "float"]] = Field(default_factory=dict)
    form: Literal["qdq", "qoperator"] = "qdq"
    per_channel: bool | None = None
    weight_ranges: Literal["min-max", "mse"] = "min-max"

    def nodes_in(self, precision: Literal["int16", "float16", "float"]) -> frozenset[str]:
        """Return the names of the nodes that run in `precision`; "float" includes `exclude`."""
        named = frozenset(name for name, kind in self.precision.items() if kind == precision)
        return named | frozenset(self.exclude) if precision == "float" else named


def quantize(model: ir.Model, step: QuantizeStep, target: TargetProfile, table: CalibrationTable) -> Rewrite:
    """Return `model` with integer weights and activations for `target`; `changed` names the quantized nodes.

    The profile's name is kept in the model's metadata (`TARGET_KEY`): it is part of the bytes that are measured.

    Raises:
        ModelError: the model is already quantized, no node of it can be quantized for the target, or the target's
            opset or the form cannot hold it.
        CalibrationError: `exclude` or `precision` names a node that does not exist.
    """
    if step.form == "qoperator" and target.bias != "int32":
        raise ModelError(f"form qoperator has int32 biases, {target.name} wants float ones; use form qdq")
    out = editable_copy(model if target.opset is None else convert_opset(model, target.opset))
    _check_quantizable(out, step)
    choice = Choice(floating=step.nodes_in("float") | step.nodes_in("float16"), wide=step.nodes_in("int16"))
    placement = place(out.graph, target, choice, table.stats.keys())
    if not placement.nodes:
        reasons = sorted({s.reason for s in placement.skipped}) or ["it has no nodes"]
        raise ModelError(f"no node can be quantized for {target.name}: {'; '.join(reasons[:3])}")
    scales = _scales(placement, choice, step, target, table)
    changed, skipped = tuple(node_name(n) for n in placement.nodes), list(placement.skipped)
    _quantize_constants(out.graph, placement, scales, target, step)
    _insert_pairs(out.graph, placement, scales)
    skipped = [s for s in skipped if s.node not in step.nodes_in("float16")] + _halve(out.graph, step)
    if target.integer_io:
        to_integer_io(out)
    drop_unused_initializers(out.graph)
    out.metadata_props[TARGET_KEY] = target.name
    if step.form == "qoperator":
        written = to_qoperator(out)
        out, skipped = written.model, [*skipped, *written.skipped]
    return Rewrite(model=out, changed=changed, skipped=tuple(skipped))


def tensors_to_calibrate(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the activations of a folded model whose ranges any target may need, in graph order.

    Left out are the outputs that a Relu or Clip behind them absorbs. Integer tensors may be among the names.
    """
    graph = editable_copy(model).graph
    names = [str(v.name) for v in graph.inputs]
    for node in graph:
        absorbed = [o for o in node.outputs if absorbing(o) is not None]
        names += [str(o.name) for o in node.outputs if o.name and o not in absorbed]
    return tuple(dict.fromkeys(names))


def _check_quantizable(model: ir.Model, step: QuantizeStep) -> None:
    names = {node_name(n) for n in model.graph}
    for option, named in (("exclude", step.exclude), ("precision", step.precision)):
        for name in named:
            if name not in names:
                raise CalibrationError(
                    f"{option} names node {name!r}, which does not exist; names are those of the model file"
                )
    opset = model.opset_imports.get("", 0)
    if opset > MAX_OPSET:
        raise ModelError(
            f"the model uses opset {opset}, whose QuantizeLinear onnxruntime does not have; allowed: at most "
            f"{MAX_OPSET}; export the model with an older opset"
        )
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise ModelError(f"the model is already quantized (node {node_name(node)}); pass the float model")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Formats:
    """The parameters of the tensors of one group, and which are used where the tensor is made."""

    narrow: QParams
    wide: QParams
    made_wide: bool

    def of(self, wide: bool) -> QParams:
        return self.wide if wide else self.narrow


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scales:
    """The formats of every planned tensor, and which nodes want 16 bits."""

    formats: Mapping[ir.Value, _Formats]
    wide: frozenset[ir.Node]

    def where_made(self, value: ir.Value) -> QParams:
        found = self.formats[value]
        return found.of(found.made_wide)

    def read_by(self, node: ir.Node, value: ir.Value) -> QParams:
        return self.formats[value].of(node in self.wide)


def _scales(
    placement: Placement, choice: Choice, step: QuantizeStep, target: TargetProfile, table: CalibrationTable
) -> _Scales:
    """Return the parameters of every planned tensor, one set for all tensors of a group.

    A tensor has 16 bits where the node that makes it has, or, where no planned node makes it, if all its planned
    readers want 16.
    """
    wide = frozenset(n for n in placement.nodes if node_name(n) in choice.wide)
    made_wide: dict[ir.Value, list[bool]] = {}
    read_wide: dict[ir.Value, list[bool]] = {}
    for node in placement.nodes:
        for output in map(carrier, data_outputs(node)):
            made_wide.setdefault(placement.group.get(output, output), []).append(node in wide)
        for value in (node.inputs[i] for i in data_inputs(node)):
            if value is not None:
                read_wide.setdefault(placement.group.get(value, value), []).append(node in wide)
    members: dict[ir.Value, list[ir.Value]] = {}
    for value, first in placement.group.items():
        members.setdefault(first, []).append(value)
    by_group = {}
    for first, values in members.items():
        low, high = _range(values, step, target, table)
        is_wide = any(made_wide[first]) if first in made_wide else all(read_wide.get(first, [False]))
        by_group[first] = _Formats(
            narrow=qparams_from_range(low, high, target.activation_scheme()),
            wide=qparams_from_range(low, high, target.wide_scheme()),
            made_wide=is_wide,
        )
    return _Scales(formats={value: by_group[first] for value, first in placement.group.items()}, wide=wide)


def _range(
    values: list[ir.Value], step: QuantizeStep, target: TargetProfile, table: CalibrationTable
) -> tuple[Float, Float]:
    """Return the range that holds every tensor of a group; what a node only moved says nothing new."""
    rule, scheme = RangeRule(kind=step.ranges, percentile=step.percentile), target.activation_scheme()
    ranges = []
    for value in values:
        array = constant_array(value)
        if array is not None:
            ranges.append((float(array.min()), float(array.max())))
        elif (source := root(value, target)) is value or source not in values:
            ranges.append(range_from_stats(table.stats[str(source.name)], rule, scheme))
    lows, highs = zip(*ranges, strict=True)
    return np.asarray(min(lows)), np.asarray(max(highs))


def _quantize_constants(
    graph: ir.Graph, placement: Placement, scales: _Scales, target: TargetProfile, step: QuantizeStep
) -> None:
    """Put integers and a DQ in place of every weight, bias and constant operand of the planned nodes."""
    for node in placement.nodes:
        if weight_index(node) is not None and node.inputs[0] is not None:
            input_scale = scales.read_by(node, node.inputs[0]).scale
            _quantize_weights(graph, node, input_scale, target, step)
        for index in data_inputs(node):
            _quantize_operand(graph, node, index, scales, target)
    for node in placement.movers:
        _quantize_operand(graph, node, 0, scales, target)


def _quantize_operand(graph: ir.Graph, node: ir.Node, index: int, scales: _Scales, target: TargetProfile) -> None:
    """Quantize a constant operand of Add, Mul, Concat ... like an activation: one scale, the activation dtype."""
    value = node.inputs[index]
    array = constant_array(value)
    if value is None or array is None:
        return
    if value in scales.formats:
        q = scales.read_by(node, value)
    else:
        scheme = target.wide_scheme() if node in scales.wide else target.activation_scheme()
        q = qparams_from_range(np.asarray(array.min()), np.asarray(array.max()), scheme)
    node.replace_input_with(index, dequantized_initializer(graph, str(value.name), quantize_array(array, q), q))


def _quantize_weights(
    graph: ir.Graph, node: ir.Node, input_scale: NDArray[np.float32], target: TargetProfile, step: QuantizeStep
) -> None:
    weight_value, bias_value = node.inputs[1], bias_of(node)
    weight, bias = constant_array(weight_value), constant_array(bias_value)
    assert weight is not None and weight_value is not None  # noqa: S101, PT018 - the placement has looked
    axis = channel_axis(node, weight.ndim)
    depthwise = node.op_type == "Conv" and int_attribute(node, "group", 1) > 1 and weight.shape[1] == 1
    scheme = target.weight_scheme(axis or 0, depthwise=depthwise, bits=step.weight_bits)
    if axis is None:
        scheme = replace(scheme, axis=None)
    cover = least_error_scale if step.weight_ranges == "mse" else covering_scale
    q = weight_qparams(weight, scheme, None if bias is None else bias.reshape(-1), input_scale, cover)
    node.replace_input_with(1, dequantized_initializer(graph, str(weight_value.name), quantize_array(weight, q), q))
    if bias is None or bias_value is None or target.bias != "int32":
        return
    bias_scale = (q.scale * input_scale).astype(np.float32)
    integers = np.rint(bias.reshape(-1).astype(np.float64) / bias_scale)
    integers = np.clip(integers, _INT32.min, _INT32.max).astype(np.int32)
    q_bias = QParams(
        scale=bias_scale,
        zero_point=np.zeros((), np.int32),
        dtype="int32",
        qmin=_INT32.min,
        qmax=_INT32.max,
        axis=0 if bias_scale.ndim else None,
    )
    node.replace_input_with(2, dequantized_initializer(graph, str(bias_value.name), integers, q_bias))


def _insert_pairs(graph: ir.Graph, placement: Placement, scales: _Scales) -> None:
    """Put a Q/DQ pair behind every planned tensor, and a second one for readers of the other width."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in placement.nodes:
        for value in (node.inputs[i] for i in data_inputs(node)):
            if value is not None:
                readers.setdefault(value, []).append(node)
    for value in placement.tensors:
        q = scales.where_made(value)
        others = [n for n in readers.get(value, []) if scales.read_by(n, value) is not q]
        result = insert_activation_qdq(graph, _without_absorbed(value, q), q)
        if others and container_bits(scales.formats[value].narrow.dtype) == 8:
            insert_activation_qdq(graph, result, scales.read_by(others[0], value), others)


def _without_absorbed(value: ir.Value, q: QParams) -> ir.Value:
    """Remove the Relu or Clip that makes `value` if the saturation of `q` gives the same integers without it.

    That is so when the bounds themselves saturate: Q(low) = qmin and Q(high) = qmax. Return the value that then
    carries the name.
    """
    node = value.producer()
    if node is None or node.op_type not in ABSORBED or node.inputs[0] is None:
        return value
    source = node.inputs[0]
    if absorbing(source) is not node or source.producer() is None:
        return value
    low, high = _bounds(node)
    ends = quantize_array(np.array([low, high], np.float32), q)
    if ends[0] != q.qmin or ends[1] != q.qmax:
        return value
    remove_in_favour_of(node, source)
    return source


def _bounds(node: ir.Node) -> tuple[float, float]:
    """Return what a Relu or Clip cuts its input to."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    arrays = [constant_array(v) for v in node.inputs[1:3]]
    low, high = [*arrays, None, None][:2]
    return (
        -float("inf") if low is None else float(low.reshape(-1)[0]),
        float("inf") if high is None else float(high.reshape(-1)[0]),
    )


def _halve(graph: ir.Graph, step: QuantizeStep) -> list[Skipped]:
    """Let the nodes that the recipe names compute in float16; return those that cannot, which stay float32."""
    skipped = []
    for node in [n for n in graph if node_name(n) in step.nodes_in("float16")]:
        reason = compute_in_half(graph, node)
        if reason is not None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
    return skipped


def weight_qparams(
    weight: Float,
    scheme: QScheme,
    bias: Float | None,
    input_scale: NDArray[np.float32],
    cover: Callable[[Float, QScheme], QParams] = covering_scale,
) -> QParams:
    """Return the parameters of `weight`, such that an int32 bias of scale `input_scale * scale` neither saturates
    nor loses a channel whose weights are all zero.

    Args:
        weight: float, channels along `scheme.axis`.
        scheme: symmetric int8.
        bias: (channels,) or None.
        input_scale: () scale of the layer's input.
        cover: how the scale follows from the weights.
    """  # noqa: D205 - the law needs two lines
    w = weight.astype(np.float32)
    low, high = (w.min(), w.max()) if scheme.axis is None else channel_range(w, scheme.axis)
    q = cover(w, scheme)
    if bias is None:
        return q
    magnitude = np.abs(bias.astype(np.float64)) if scheme.axis is not None else np.abs(bias.astype(np.float64)).max()
    dead = np.maximum(np.abs(low), np.abs(high)) == 0
    smallest = (
        np.maximum(magnitude / (_INT32.max // 2), TINY_SCALE) / input_scale
    )  # the bias scale stays a normal float
    kept = magnitude / input_scale / _DEAD_CHANNEL_LEVELS
    scale = np.where(dead & (magnitude > 0), kept, np.maximum(q.scale, smallest))
    if scheme.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    return replace(q, scale=np.asarray(scale, np.float32))
