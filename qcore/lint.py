"""The linter: proves that a quantized file is what a target profile wants, or names every place where it is not.

It reads the file alone, in either form (QDQ or integer operators), and knows nothing of how it was made. Float islands
are found by asking of every node what the quantizer asks (`placement.py`): may it run on integers there, and does it?
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qcore.canonical import Json
from qcore.graph.edit import editable_copy
from qcore.graph.qdq import is_dequantize, is_quantize
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.numerics.affine import container_bits
from qcore.placement import (
    READS_SHAPES,
    WEIGHTED,
    absorbing,
    carrier,
    data_inputs,
    data_outputs,
    float_tail,
    is_activation,
    moves,
)
from qcore.target import TargetProfile

Rule = Literal[
    "opset",
    "graph-io",
    "activation-dtype",
    "weight-dtype",
    "weight-bits",
    "bias",
    "bias-scale",
    "zero-point",
    "per-channel",
    "power-of-two",
    "same-scale",
    "float-island",
    "unsupported-op",
]
_UNARY = {
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
    "QLinearLeakyRelu",
    "QLinearSigmoid",
    "QLinearSoftmax",
}
_BINARY = {"QLinearAdd", "QLinearMul"}
_LAYERS = {"QLinearConv", "QLinearMatMul", "QGemm"}
_OPERATORS = _UNARY | _BINARY | _LAYERS | {"QLinearConcat"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One breach of a profile: the rule, the node or tensor, what is there, and what the profile allows."""

    rule: Rule
    where: str
    observed: str
    allowed: str

    def to_json(self) -> Json:
        """Return the JSON form."""
        return {"rule": self.rule, "where": self.where, "observed": self.observed, "allowed": self.allowed}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Quantized:
    """One use of integers: at which node, as what, and with which parameters."""

    where: str
    role: Literal["activation", "weight", "bias"]
    dtype: str
    scale: NDArray[np.float32]
    zero: NDArray[np.generic] | None
    integers: NDArray[np.generic] | None = None
    depthwise: bool = False


def lint(model: ir.Model, target: TargetProfile) -> tuple[Finding, ...]:
    """Return what in `model` is not as `target` wants it, in graph order; empty for a file that satisfies it."""
    copy = editable_copy(model)
    ShapeInferencePass()(copy)  # tells integers that are shapes from integers that are data
    graph = copy.graph
    tail = float_tail(graph, target)
    found: list[Finding] = [*_opset(copy, target), *_graph_io(graph, target)]
    for node in graph:
        for tensor in _quantized(node):
            found += _tensor(tensor, target)
        found += [*_scales(node, target), *_bias(node, target), *_island(node, target, tail)]
    return tuple(dict.fromkeys(found))


def _opset(model: ir.Model, target: TargetProfile) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    if target.opset is not None and opset != target.opset:
        yield Finding(rule="opset", where="model", observed=str(opset), allowed=str(target.opset))


def _graph_io(graph: ir.Graph, target: TargetProfile) -> Iterator[Finding]:
    if not target.integer_io:
        return
    for side, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
                yield Finding(
                    rule="graph-io",
                    where=f"{side} {value.name}",
                    observed=str(value.dtype.name).lower(),
                    allowed=_activation_dtypes(target),
                )


def _quantized(node: ir.Node) -> Iterator[_Quantized]:
    """Yield every quantized tensor whose parameters `node` carries."""
    if is_quantize(node) or is_dequantize(node):
        yield from _pair(node)
    elif node.op_type in _LAYERS:
        last = 7 if node.op_type == "QGemm" else 6
        depthwise = int_attribute(node, "group", 1) > 1 and _depthwise(node.inputs[3])
        role: Literal["activation", "weight"] = "weight" if constant_array(node.inputs[3]) is not None else "activation"
        yield from _triple(node, 0, "activation")
        yield from _triple(node, 3, role, depthwise)
        if len(node.inputs) > last + 1:
            yield from _triple(node, last - 1, "activation")
    elif node.op_type in _BINARY | _UNARY:
        starts = (0, 3, 5) if node.op_type in _BINARY else (0, 2)
        for start in starts:
            yield from _triple(node, start, "activation")
    elif node.op_type == "QLinearConcat":
        for start in range(-1, len(node.inputs) - 2, 3):
            yield from _triple(node, start, "activation")


def _pair(node: ir.Node) -> Iterator[_Quantized]:
    scale, zero = constant_array(node.inputs[1]), constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    integers = constant_array(node.inputs[0]) if is_dequantize(node) else None
    if scale is None:
        return
    dtype = zero.dtype.name if zero is not None else "uint8" if integers is None else integers.dtype.name
    role: Literal["activation", "weight", "bias"] = "activation"
    depthwise = False
    for use in node.outputs[0].uses() if integers is not None else ():
        if use.node.op_type in WEIGHTED and use.idx in (1, 2) and is_activation(_source(use.node.inputs[0])):
            role = "weight" if use.idx == 1 else "bias"
            depthwise = use.node.op_type == "Conv" and int_attribute(use.node, "group", 1) > 1
            depthwise = depthwise and _depthwise(node.inputs[0])
    yield _Quantized(
        where=node_name(node),
        role=role,
        dtype=dtype,
        scale=scale,
        zero=zero,
        integers=integers,
        depthwise=depthwise,
    )


def _triple(
    node: ir.Node, start: int, role: Literal["activation", "weight"], depthwise: bool = False
) -> Iterator[_Quantized]:
    """Yield the tensor of the inputs `start` (data, absent for outputs), `start + 1` (scale), `start + 2` (zero)."""
    scale, zero = constant_array(node.inputs[start + 1]), constant_array(node.inputs[start + 2])
    if scale is None or zero is None:
        return
    yield _Quantized(
        where=f"{node_name(node)} input {start + 1}",
        role=role,
        dtype=zero.dtype.name,
        scale=scale,
        zero=zero,
        integers=constant_array(node.inputs[start]) if role == "weight" else None,
        depthwise=depthwise,
    )


def _depthwise(weight: ir.Value | None) -> bool:
    array = constant_array(weight)
    return array is not None and array.ndim > 1 and array.shape[1] == 1


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return what `value` is the dequantized form of, or `value` itself."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and is_dequantize(node) else value


def _activation_dtypes(target: TargetProfile) -> str:
    return " or ".join([target.activations, *([target.wide_activations] if "int16" in target.mixed else [])])


def _tensor(tensor: _Quantized, target: TargetProfile) -> Iterator[Finding]:
    """Yield what is wrong with the parameters of one tensor by themselves."""
    if tensor.role == "bias":
        return
    dtypes = _activation_dtypes(target).split(" or ")
    if tensor.role == "weight":
        dtypes = [target.depthwise_weights or target.weights if tensor.depthwise else target.weights]
        yield from _weight_levels(tensor, target)
    if tensor.dtype not in dtypes:
        rule: Rule = "weight-dtype" if tensor.role == "weight" else "activation-dtype"
        yield Finding(rule=rule, where=tensor.where, observed=tensor.dtype, allowed=" or ".join(dtypes))
    per_channel = tensor.role == "weight" and target.weights_per_channel
    if tensor.scale.size > 1 and not per_channel:
        observed = f"{tensor.scale.size} scales"
        yield Finding(rule="per-channel", where=tensor.where, observed=observed, allowed="one scale")
    if tensor.role == "weight" or target.activations_symmetric:
        yield from _symmetry(tensor)
    if target.power_of_two_scales and not _power_of_two(tensor.scale):
        first = tensor.scale.reshape(-1)[~_are_powers(tensor.scale).reshape(-1)][0]
        yield Finding(rule="power-of-two", where=tensor.where, observed=f"{first:g}", allowed="powers of two")


def _symmetry(tensor: _Quantized) -> Iterator[Finding]:
    middle = 0 if tensor.dtype.startswith("int") else 1 << (int(tensor.dtype.removeprefix("uint")) - 1)
    zero = np.zeros(1, np.int64) if tensor.zero is None else tensor.zero.astype(np.int64).reshape(-1)
    wrong = zero[zero != middle]
    if wrong.size:
        yield Finding(rule="zero-point", where=tensor.where, observed=str(wrong[0]), allowed=str(middle))


def _weight_levels(tensor: _Quantized, target: TargetProfile) -> Iterator[Finding]:
    dtype = target.depthwise_weights or target.weights if tensor.depthwise else target.weights
    bits = min(target.weight_bits, container_bits(dtype) - target.reduce_range)
    if tensor.integers is None or bits >= container_bits(dtype) or tensor.dtype != dtype:
        return
    zero = 0 if dtype.startswith("int") else 1 << (container_bits(dtype) - 1)
    largest, limit = int(np.abs(tensor.integers.astype(np.int64) - zero).max()), (1 << (bits - 1)) - 1
    if largest > limit:
        allowed = f"at most {limit} ({bits} bits)"
        yield Finding(rule="weight-bits", where=tensor.where, observed=f"level {largest}", allowed=allowed)


def _are_powers(scale: NDArray[np.float32]) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = np.frexp(scale)[0] == 0.5
    return result


def _power_of_two(scale: NDArray[np.float32]) -> bool:
    return bool(_are_powers(scale).all())


def _parameters(value: ir.Value | None) -> tuple[float, int, str] | None:
    """Return (scale, zero point, dtype) of the Q or DQ that makes `value` or alone reads it, or None."""
    if value is None:
        return None
    node = value.producer()
    if node is None or not is_dequantize(node):
        node = next((u.node for u in value.uses() if is_quantize(u.node)), None)
    if node is None or len(node.inputs) < 3:
        return None
    scale, zero = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    if scale is None or zero is None or scale.size != 1:
        return None
    return float(scale.reshape(())), int(zero.astype(np.int64).reshape(())), zero.dtype.name


def _scales(node: ir.Node, target: TargetProfile) -> Iterator[Finding]:
    """Yield a node between DQ and Q whose tensors must share one scale and do not."""
    if moves(node, target):
        values = [node.inputs[0], *data_outputs(node)]
    elif node.op_type in target.one_scale and node.domain == "":
        values = [*(node.inputs[i] for i in data_inputs(node)), *map(carrier, data_outputs(node))]
    else:
        return
    found = dict.fromkeys(p for p in map(_parameters, values) if p is not None)
    if len(found) > 1:
        observed = ", ".join(f"{scale:g} ({zero}, {dtype})" for scale, zero, dtype in found)
        yield Finding(
            rule="same-scale", where=node_name(node), observed=observed, allowed="one scale, zero point and dtype"
        )


def _bias(node: ir.Node, target: TargetProfile) -> Iterator[Finding]:
    """Yield what is wrong with the bias of a layer whose data are integers."""
    if node.op_type not in WEIGHTED or node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    source, weight, bias = node.inputs[:3]
    made = [v.producer() if v is not None else None for v in (source, weight, bias)]
    if bias is None or any(m is None or not is_dequantize(m) for m in made[:2]):
        return  # an island: it has a finding of its own
    integers = constant_array(_source(bias))
    kind = "float" if integers is None or integers.dtype.kind == "f" else integers.dtype.name
    wanted = "int32" if target.bias == "int32" else "float"
    if kind != wanted:
        yield Finding(rule="bias", where=node_name(node), observed=kind, allowed=wanted)
    elif kind == "int32":
        scales = [constant_array(m.inputs[1]) if m is not None and is_dequantize(m) else None for m in made]
        if any(s is None for s in scales):
            return
        a, b, c = (np.asarray(s, np.float64) for s in scales)
        if not np.allclose(a * b, c, rtol=1e-5, atol=0):
            yield Finding(
                rule="bias-scale",
                where=node_name(node),
                observed=f"{c.reshape(-1)[0]:g}",
                allowed=f"{(a * b).reshape(-1)[0]:g} (scale of data x scale of weights)",
            )


def _island(node: ir.Node, target: TargetProfile, tail: set[ir.Value]) -> Iterator[Finding]:
    """Yield a node that computes on floats where the profile says integers."""
    if is_quantize(node) or is_dequantize(node) or not _on_floats(node) or any(v in tail for v in node.inputs):
        return
    if node.op_type in (*_OPERATORS, *READS_SHAPES) or _absorbed(node, target):
        return
    known = node.domain == "" and node.op_type in (*target.quantize, *target.same_scale)
    if not known:
        if target.integer_only:
            allowed = "only " + ", ".join(dict.fromkeys((*target.quantize, *target.same_scale)))
            yield Finding(rule="unsupported-op", where=node_name(node), observed=node.op_type, allowed=allowed)
        return
    floats = _floats_of(node, target, tail)
    if floats:
        yield Finding(
            rule="float-island",
            where=node_name(node),
            observed=f"{node.op_type} with float {', '.join(floats)}",
            allowed=f"integers: {target.name} has {node.op_type}",
        )


def _on_floats(node: ir.Node) -> bool:
    """Say whether `node` reads or gives floats that are not constants."""
    values = [v for v in node.inputs if v is not None and is_activation(v)]
    return any(not _integers(v) for v in values or node.outputs[:1])


def _absorbed(node: ir.Node, target: TargetProfile) -> bool:
    """Say whether `node` is a Relu or Clip that the kernel of the layer before it computes."""
    source = node.inputs[0] if node.inputs else None
    producer = source.producer() if source is not None else None
    if source is None or producer is None or is_dequantize(producer) or moves(producer, target):
        return False
    return absorbing(source) is node


def _floats_of(node: ir.Node, target: TargetProfile, tail: set[ir.Value]) -> list[str]:
    """Return the names of the tensors of `node` that should be integers and are not."""
    mover = moves(node, target)
    indices = [0] if mover else sorted({*data_inputs(node), *([1] if node.op_type in WEIGHTED else [])})
    inputs = [v for i in indices if i < len(node.inputs) and (v := node.inputs[i]) is not None]
    outputs = [o for o in data_outputs(node) if o not in tail]
    floats = [f"input {v.name}" for v in inputs if not is_dequantize(v.producer()) and not _integers(v)]
    into_float = [o for o in (outputs if mover else map(carrier, outputs)) if not _only_quantized(o)]
    floats += [f"output {o.name}" for o in into_float]
    if mover and len(floats) == len(inputs) + len(outputs):
        return []  # it moves floats between floats: no island of its own
    return floats


def _integers(value: ir.Value | None) -> bool:
    """Say whether `value` holds integers, also behind operators that type inference does not know."""
    while value is not None:
        if value.dtype is not None:
            return not value.dtype.is_floating_point()
        node = value.producer()
        if node is None:
            return False
        if node.op_type in _OPERATORS:
            return node.op_type != "QGemm" or len(node.inputs) > 7
        value = None if is_dequantize(node) else node.inputs[0] if node.inputs else None
    return False


def _only_quantized(value: ir.Value) -> bool:
    """Say whether every reader of `value` is a Q; a value that is integers already counts."""
    if _integers(value):
        return True
    uses = value.uses()
    return bool(uses) and not value.is_graph_output() and all(is_quantize(u.node) for u in uses)
