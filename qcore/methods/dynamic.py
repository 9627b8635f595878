"""Dynamic quantization: integer weights in the file, activations quantized on the device from each tensor's own range.

No calibration and no data: DynamicQuantizeLinear measures min and max of the whole tensor at run time, so samples of
one batch share a scale. It suits transformers, whose activations have outliers that a fixed scale cannot hold. The
nodes are standard ONNX in the shape that ONNX Runtime fuses (DynamicQuantizeMatMul, MatMulIntegerToFloat).

Source: ONNX DynamicQuantizeLinear-11, MatMulInteger-10, ConvInteger-10; Jacob et al. 2018 (arXiv 1712.05877) eq. 3.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.errors import ConfigError, ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name, replace_node
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, is_vector, node_name
from qcore.numerics.affine import QScheme, channel_range, qparams_from_range, quantize_array
from qcore.target import TARGET_KEY, TargetProfile

Float32 = NDArray[np.float32]
_Weights = tuple[ir.Value, ir.Value, ir.Value]  # integers, zero point, scale as it is multiplied


class QuantizeDynamicStep(Config):
    """Options of the recipe step `quantize-dynamic`.

    `operators` are quantized; Conv only where it is asked for, since ConvInteger is rarely faster than float.
    `per_channel` null is what the target profile says. `weight_bits: 7` uses half of the levels in int8: x86 kernels
    without VNNI cannot saturate then and are faster than with the profile's uint8, at a little less accuracy. `exclude`
    names nodes that stay float.
    """

    method: Literal["quantize-dynamic"] = "quantize-dynamic"
    operators: tuple[Literal["MatMul", "Gemm", "Conv"], ...] = Field(default=("MatMul", "Gemm"), min_length=1)
    per_channel: bool | None = None
    weight_bits: Literal[7, 8] | None = None
    exclude: tuple[str, ...] = ()


@dataclass(slots=True)
class _Shared:
    """What several nodes read and is written once: quantized inputs by tensor, weights by tensor and use."""

    inputs: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]]
    weights: dict[tuple[ir.Value, str, bool, float], _Weights]


def quantize_dynamic(model: ir.Model, step: QuantizeDynamicStep, target: TargetProfile) -> Rewrite:
    """Return `model` with dynamic integer MatMul, Gemm and, if asked for, Conv; `changed` names these nodes.

    Weights have the profile's dtype: u8s8 kernels saturate on x86 without VNNI, where the profile says uint8 (ADR
    0007). ConvInteger weights are always uint8: its int8 kernel is slower by a multiple.

    Raises:
        ConfigError: the profile's devices cannot choose scales at run time, or want symmetric activations.
        ModelError: no node can be quantized, or `exclude` names no node.
    """
    if target.power_of_two_scales or target.activations_symmetric:
        kind = "power-of-two scales" if target.power_of_two_scales else "symmetric activations"
        raise ConfigError(
            f"target {target.name} wants {kind}; dynamic quantization gives asymmetric uint8 with scales found on the "
            "device; use step quantize or quantize-weights"
        )
    out = editable_copy(model)
    missing = set(step.exclude) - {node_name(n) for n in out.graph}
    if missing:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    changed: list[str] = []
    skipped: list[Skipped] = []
    shared = _Shared(inputs={}, weights={})
    for node in [n for n in out.graph if n.op_type in step.operators and n.domain == ""]:
        name = node_name(node)
        reason = _refusal(node, step, target)
        if reason is not None:
            skipped.append(Skipped(node=name, op_type=node.op_type, reason=reason))
            continue
        _rewrite(out.graph, node, _scheme(node, step, target), shared)
        changed.append(name)
    if not changed:
        reasons = sorted({s.reason for s in skipped}) or [f"it has no {', '.join(step.operators)}"]
        raise ModelError(f"no node can be quantized dynamically: {'; '.join(reasons[:3])}")
    drop_unused_initializers(out.graph)
    out.metadata_props[TARGET_KEY] = target.name
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(node: ir.Node, step: QuantizeDynamicStep, target: TargetProfile) -> str | None:
    """Return why `node` stays float, or None."""
    if node_name(node) in step.exclude:
        return "excluded by the recipe"
    if node.op_type not in target.quantize:
        return f"{target.name} has no integer kernel for {node.op_type}"
    weight = constant_array(node.inputs[1])
    if weight is None:
        return "its weights are no constants"
    if constant_array(node.inputs[0]) is not None:
        return "its first input is a constant"
    if weight.dtype != np.float32 or weight.ndim < 2:
        return f"its weights are {weight.dtype} with {weight.ndim} dimensions, not float32 with at least 2"
    if not np.isfinite(weight).all():
        return "its weights hold NaN or infinity"
    return _bias_refusal(node, weight)


def _bias_refusal(node: ir.Node, weight: Float32) -> str | None:
    bias = _bias(node)
    array = constant_array(bias)
    if node.op_type == "Conv" and bias is not None and (array is None or not is_vector(array, len(weight))):
        return "its bias is not a constant vector"
    if node.op_type == "Gemm" and int_attribute(node, "transA", 0):
        return "Gemm with transA"
    if bias is not None and array is None and float_attribute(node, "beta", 1.0) != 1.0:
        return "Gemm with beta and a bias that is not a constant"
    return None


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _scheme(node: ir.Node, step: QuantizeDynamicStep, target: TargetProfile) -> QScheme:
    """Return how the weights of `node` are quantized; a batch of matrices has one scale."""
    weight = node.inputs[1]
    ndim = 0 if weight is None or weight.shape is None else len(weight.shape)
    scheme = target.weight_scheme(0 if node.op_type == "Conv" else 1, bits=step.weight_bits)
    if node.op_type == "Conv":
        scheme = replace(scheme, dtype="uint8")
    elif step.weight_bits == 7:
        scheme = replace(scheme, dtype="int8")
    per_channel = target.weights_per_channel if step.per_channel is None else step.per_channel
    if not per_channel or (node.op_type != "Conv" and ndim != 2):
        return replace(scheme, axis=None)
    return replace(scheme, axis=0 if node.op_type == "Conv" else 1)


def _rewrite(graph: ir.Graph, node: ir.Node, scheme: QScheme, shared: _Shared) -> None:
    """Put quantize -> integer product -> Cast -> Mul -> Add in the place of `node`."""
    name = node_name(node)
    source = node.inputs[0]
    assert source is not None  # noqa: S101 - _refusal has looked at the operands
    x_q, x_scale, x_zero = _quantized_input(graph, node, source, shared)
    w_q, w_zero, w_scale = _quantized_weights(graph, node, scheme, shared)
    attributes = dict(node.attributes) if node.op_type == "Conv" else {}
    op_type = "ConvInteger" if node.op_type == "Conv" else "MatMulInteger"
    product = ir.node(op_type, [x_q, w_q, x_zero, w_zero], name=fresh_name(graph, f"{name}_quantized"))
    product.attributes.update(attributes)
    cast = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=fresh_name(graph, f"{name}_cast"))
    scale = ir.node("Mul", [x_scale, w_scale], name=fresh_name(graph, f"{name}_scales"))
    scaled = ir.node("Mul", [cast.outputs[0], scale.outputs[0]], name=fresh_name(graph, f"{name}_scaled"))
    new = [product, cast, scale, scaled]
    bias = _added_bias(graph, node)
    if bias is not None:
        new.append(ir.node("Add", [scaled.outputs[0], bias], name=fresh_name(graph, f"{name}_bias")))
    for part in new[:-1]:
        part.outputs[0].name = fresh_name(graph, f"{part.name}_out")
    replace_node(graph, node, new, new[-1].outputs[0])


def _quantized_input(
    graph: ir.Graph, node: ir.Node, source: ir.Value, shared: _Shared
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return integers, scale and zero point of `source`; made before the first node that reads them."""
    if source not in shared.inputs:
        name = str(source.name)
        quantize = ir.node(
            "DynamicQuantizeLinear", [source], num_outputs=3, name=fresh_name(graph, f"{name}_dynamic_quantize")
        )
        for value, suffix in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
            value.name = fresh_name(graph, f"{name}_{suffix}")
        graph.insert_before(node, quantize)
        integers, scale, zero = quantize.outputs
        shared.inputs[source] = (integers, scale, zero)
    return shared.inputs[source]


def _quantized_weights(graph: ir.Graph, node: ir.Node, scheme: QScheme, shared: _Shared) -> _Weights:
    """Return initializers for the weights as (K, N) or as a convolution stores them, with alpha multiplied in."""
    value, weight = node.inputs[1], constant_array(node.inputs[1])
    assert value is not None and weight is not None  # noqa: S101, PT018 - _refusal has looked
    transposed, alpha = bool(int_attribute(node, "transB", 0)), float_attribute(node, "alpha", 1.0)
    kind = "Conv" if node.op_type == "Conv" else "matrix"
    key = (value, kind, transposed, alpha)
    if key not in shared.weights:
        w = (weight.T if transposed else weight) * np.float32(alpha)
        low, high = (w.min(), w.max()) if scheme.axis is None else channel_range(w, scheme.axis)
        q = qparams_from_range(np.asarray(low), np.asarray(high), scheme)
        zero, scale = q.zero_point.astype(q.dtype), q.scale
        if kind == "Conv":
            zero = zero.reshape(-1)[0].reshape(())  # one for all: a symmetric scheme has the same everywhere
            scale = scale.reshape(-1, *([1] * (w.ndim - 2))) if scheme.axis is not None else scale
        name = str(value.name)
        shared.weights[key] = (
            add_initializer(graph, f"{name}_quantized", quantize_array(w, q)),
            add_initializer(graph, f"{name}_zero_point", zero),
            add_initializer(graph, f"{name}_scale", scale),
        )
    return shared.weights[key]


def _added_bias(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """Return what is added to the scaled product: the bias, times beta, in a shape that broadcasts."""
    bias, beta = _bias(node), float_attribute(node, "beta", 1.0)
    array = constant_array(bias)
    if bias is None or (node.op_type == "Gemm" and beta == 0.0):
        return None
    if array is None or (node.op_type == "Gemm" and beta == 1.0):
        return bias
    if node.op_type == "Gemm":
        return add_initializer(graph, f"{bias.name}_scaled", array * np.float32(beta))
    ndim = len(constant_array(node.inputs[1]).shape)  # type: ignore[union-attr]
    return add_initializer(graph, f"{bias.name}_shaped", array.reshape(-1, *([1] * (ndim - 2))))
