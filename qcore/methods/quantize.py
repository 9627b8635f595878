"""Static quantization: integer weights, integer activations, int32 biases, written as QDQ.

Which tensors get a Q/DQ pair follows from which nodes the target runs on integers: their inputs and outputs, except
where a Relu or Clip behind a node is absorbed by the saturation of its Q. Ranges come from a calibration table;
nothing here runs the model.

Source: Jacob et al. 2018 (arXiv 1712.05877); Krishnamoorthi 2018 (arXiv 1806.08342) section 3 for per-channel
weights; ONNX QuantizeLinear-13 and DequantizeLinear-13.
"""

from collections.abc import Mapping
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
from qcore.graph.qdq import dequantized_initializer, insert_activation_qdq
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import (
    constant_array,
    float_attribute,
    int_attribute,
    is_vector,
    node_name,
    only_consumer,
)
from qcore.numerics.affine import TINY_SCALE, Float, QParams, QScheme, channel_range, qparams_from_range, quantize_array
from qcore.numerics.stats import RangeRule, RuleKind, range_from_stats
from qcore.target import TargetProfile

TARGET_KEY = "qcore.target"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ABSORBED = ("Relu", "Clip")
FLOAT_TAIL = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Softmax", "LogSoftmax")
_INT32 = np.iinfo(np.int32)
_DEAD_CHANNEL_LEVELS = 1 << 20  # how finely the bias of a channel without weights is kept


class QuantizeStep(Config):
    """Options of the recipe step `quantize`.

    `ranges` and `percentile` choose how activation ranges are read from the table; `weight_bits` overrides the
    target's; `exclude` names nodes that stay float.
    """

    method: Literal["quantize"] = "quantize"
    ranges: RuleKind = "min-max"
    percentile: float = Field(default=99.99, gt=50, le=100)
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    exclude: tuple[str, ...] = ()


def quantize(model: ir.Model, step: QuantizeStep, target: TargetProfile, table: CalibrationTable) -> Rewrite:
    """Return `model` with integer weights and Q/DQ pairs for `target`; `changed` names the quantized nodes.

    The profile's name is kept in the model's metadata (`TARGET_KEY`): it is part of the bytes that are measured.

    Raises:
        ModelError: the model is already quantized, or no node of it can be quantized for the target.
        CalibrationError: `exclude` names a node that does not exist.
    """
    out = editable_copy(model)
    _check_quantizable(out, step)
    plan = _plan(out.graph, step, target, table)
    if not plan.nodes:
        reasons = sorted({s.reason for s in plan.skipped}) or ["it has no nodes"]
        raise ModelError(f"no node can be quantized for {target.name}: {'; '.join(reasons[:3])}")
    params = _activation_params(out.graph, plan, step, target, table)
    for node in plan.nodes:
        if node.op_type in WEIGHTED:
            _quantize_weights(out.graph, node, params, target, step.weight_bits)
        _quantize_constant_operands(out.graph, node, target)
    for value in plan.tensors:
        q = params[str(value.name)]
        insert_activation_qdq(out.graph, _without_absorbed(value, q), q)
    drop_unused_initializers(out.graph)
    out.metadata_props[TARGET_KEY] = target.name
    return Rewrite(model=out, changed=tuple(node_name(n) for n in plan.nodes), skipped=tuple(plan.skipped))


def tensors_to_calibrate(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the activations of a folded model whose ranges any target may need, in graph order.

    Left out are the outputs that a Relu or Clip behind them absorbs. Integer tensors may be among the names.
    """
    graph = editable_copy(model).graph
    names = [str(v.name) for v in graph.inputs]
    for node in graph:
        absorbed = [o for o in node.outputs if _absorbing(o) is not None]
        names += [str(o.name) for o in node.outputs if o.name and o not in absorbed]
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The nodes that run on integers, the tensors between them in graph order, and what was left out."""

    nodes: list[ir.Node]
    tensors: list[ir.Value]
    skipped: list[Skipped]


def _check_quantizable(model: ir.Model, step: QuantizeStep) -> None:
    names = {node_name(n) for n in model.graph}
    for name in step.exclude:
        if name not in names:
            raise CalibrationError(
                f"exclude names node {name!r}, which does not exist; names are those of the model file"
            )
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise ModelError(f"the model is already quantized (node {node_name(node)}); pass the float model")


def _plan(graph: ir.Graph, step: QuantizeStep, target: TargetProfile, table: CalibrationTable) -> _Plan:
    nodes: list[ir.Node] = []
    skipped: list[Skipped] = []
    wanted: set[ir.Value] = set()
    for node in graph:
        if node.op_type in (*ABSORBED, *target.same_scale, "Constant"):
            continue
        reason = _refusal(node, step, target, table)
        if reason is not None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
            continue
        nodes.append(node)
        wanted.update(v for v in node.inputs if v is not None and _is_activation(v))
        if not _keeps_float_output(node, target):
            wanted.add(_carrier(node.outputs[0]))
    _reach_back(graph, wanted, target, table)
    order = [*graph.inputs, *(o for node in graph for o in node.outputs)]
    return _Plan(nodes=nodes, tensors=[v for v in order if v in wanted], skipped=skipped)


def _refusal(node: ir.Node, step: QuantizeStep, target: TargetProfile, table: CalibrationTable) -> str | None:
    """Return why `node` stays float, or None."""
    if node.op_type not in target.quantize or node.domain != "":
        return f"{target.name} has no integer kernel for {node.op_type}"
    if node_name(node) in step.exclude:
        return "excluded by the recipe"
    if any(a is not None and not _is_finite(a) for a in map(constant_array, node.inputs)):
        return "a constant of it holds NaN or infinity"
    if node.op_type in WEIGHTED and (reason := _weight_refusal(node)) is not None:
        return reason
    needed = [v for v in node.inputs if _is_activation(v)]
    if not _keeps_float_output(node, target):
        needed.append(_carrier(node.outputs[0]))
    missing = [v.name for v in needed if v is not None and _measured(v, target).name not in table.stats]
    return f"the calibration table has no float tensor {missing[0]}" if missing else None


def _measured(value: ir.Value, target: TargetProfile) -> ir.Value:
    """Return the tensor whose statistics hold for `value`: same-scale nodes only move values."""
    node = value.producer()
    while node is not None and node.op_type in target.same_scale and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _weight_refusal(node: ir.Node) -> str | None:
    if not _is_activation(node.inputs[0]):
        return "its first input is a constant"
    weight, bias = constant_array(node.inputs[1]), _bias(node)
    if node.op_type == "MatMul" and weight is None:
        return None  # two activations
    if weight is None or weight.dtype != np.float32:
        return "its weights are not float32 constants"
    if bias is not None and (array := constant_array(bias)) is None:
        return "its bias is not a constant"
    if bias is not None and array is not None and not is_vector(array, weight.shape[_channel_axis(node, weight.ndim)]):
        return "its bias is not one value per output channel"
    plain = float_attribute(node, "alpha", 1.0) == 1.0 and float_attribute(node, "beta", 1.0) == 1.0
    if node.op_type == "Gemm" and not (plain and int_attribute(node, "transA", 0) == 0):
        return "Gemm with alpha, beta or transA"
    return None


def _is_finite(array: NDArray[np.generic]) -> bool:
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())


def _is_activation(value: ir.Value | None) -> bool:
    return value is not None and constant_array(value) is None


def _absorbing(value: ir.Value) -> ir.Node | None:
    """Return the Relu or Clip that alone reads `value` as its data, or None."""
    reader = only_consumer(value)
    if reader is None or reader.op_type not in ABSORBED or reader.inputs[0] is not value or reader.domain != "":
        return None
    return reader if all(constant_array(v) is not None for v in reader.inputs[1:] if v is not None) else None


def _carrier(value: ir.Value) -> ir.Value:
    """Return the tensor whose Q/DQ pair stands for `value`: behind an absorbed Relu or Clip, else itself."""
    reader = _absorbing(value)
    return value if reader is None else reader.outputs[0]


def _without_absorbed(value: ir.Value, q: QParams) -> ir.Value:
    """Remove the Relu or Clip that makes `value` if the saturation of `q` gives the same integers without it.

    That is so when the bounds themselves saturate: Q(low) = qmin and Q(high) = qmax. Return the value that then
    carries the name.
    """
    node = value.producer()
    if node is None or node.op_type not in ABSORBED or node.inputs[0] is None:
        return value
    source = node.inputs[0]
    if _absorbing(source) is not node or source.producer() is None:
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


def _keeps_float_output(node: ir.Node, target: TargetProfile) -> bool:
    """Say whether `node` hands float logits to the caller: Gemm and MatMul kernels can do so for free."""
    if not target.float_output or node.op_type not in ("Gemm", "MatMul"):
        return False
    value = node.outputs[0]
    while not value.is_graph_output():
        reader = only_consumer(value)
        if reader is None or reader.op_type not in FLOAT_TAIL:
            return False
        value = reader.outputs[0]
    return not value.uses()


def _reach_back(graph: ir.Graph, wanted: set[ir.Value], target: TargetProfile, table: CalibrationTable) -> None:
    """Add the inputs of same-scale nodes whose outputs are wanted, so that the data stay integers through them."""
    for node in reversed(list(graph)):
        if node.op_type in target.same_scale and node.outputs[0] in wanted:
            source = node.inputs[0]
            if source is not None and _is_activation(source) and _measured(source, target).name in table.stats:
                wanted.add(source)


def _activation_params(
    graph: ir.Graph, plan: _Plan, step: QuantizeStep, target: TargetProfile, table: CalibrationTable
) -> dict[str, QParams]:
    """Return the parameters of every planned tensor; a same-scale node hands those of its input on."""
    rule, scheme = RangeRule(kind=step.ranges, percentile=step.percentile), target.activation_scheme()
    params: dict[str, QParams] = {}
    producers = {node.outputs[0]: node for node in graph if node.op_type in target.same_scale}
    for value in plan.tensors:
        node = producers.get(value)
        source = str(node.inputs[0].name) if node is not None and node.inputs[0] is not None else ""
        name = str(value.name)
        if source in params:
            params[name] = params[source]
        else:
            low, high = range_from_stats(table.stats[str(_measured(value, target).name)], rule, scheme)
            params[name] = qparams_from_range(np.asarray(low), np.asarray(high), scheme)
    return params


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None


def _channel_axis(node: ir.Node, ndim: int) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if int_attribute(node, "transB", 0) else 1
        case _:
            return ndim - 1


def _quantize_weights(
    graph: ir.Graph, node: ir.Node, params: Mapping[str, QParams], target: TargetProfile, bits: int | None
) -> None:
    weight_value, source = node.inputs[1], node.inputs[0]
    weight = constant_array(weight_value)
    if weight is None or weight_value is None or source is None:
        return  # MatMul of two activations
    bias_value = _bias(node)
    bias = constant_array(bias_value)
    depthwise = int_attribute(node, "group", 1) > 1 and weight.shape[1] == 1
    scheme = target.weight_scheme(_channel_axis(node, weight.ndim), depthwise=depthwise, bits=bits)
    if node.op_type == "MatMul" and weight.ndim != 2:
        scheme = replace(scheme, axis=None)
    input_scale = params[str(source.name)].scale
    q = weight_qparams(weight, scheme, None if bias is None else bias.reshape(-1), input_scale)
    node.replace_input_with(1, dequantized_initializer(graph, str(weight_value.name), quantize_array(weight, q), q))
    if bias is not None and bias_value is not None and target.bias == "int32":
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


def weight_qparams(weight: Float, scheme: QScheme, bias: Float | None, input_scale: NDArray[np.float32]) -> QParams:
    """Return the parameters of `weight`, such that an int32 bias of scale `input_scale * scale` neither saturates
    nor loses a channel whose weights are all zero.

    Args:
        weight: float, channels along `scheme.axis`.
        scheme: symmetric int8.
        bias: (channels,) or None.
        input_scale: () scale of the layer's input.
    """  # noqa: D205 - the law needs two lines
    w = weight.astype(np.float32)
    low, high = (w.min(), w.max()) if scheme.axis is None else channel_range(w, scheme.axis)
    q = qparams_from_range(np.asarray(low), np.asarray(high), scheme)
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


def _quantize_constant_operands(graph: ir.Graph, node: ir.Node, target: TargetProfile) -> None:
    """Quantize the constant operands of Add, Mul, Concat ... like activations: one scale, the activation dtype."""
    if node.op_type in WEIGHTED:
        return
    for index, value in enumerate(node.inputs):
        array = constant_array(value)
        if value is not None and array is not None and array.dtype == np.float32 and array.size:
            q = qparams_from_range(np.asarray(array.min()), np.asarray(array.max()), target.activation_scheme())
            result = dequantized_initializer(graph, str(value.name), quantize_array(array, q), q)
            node.replace_input_with(index, result)
