"""The operator form of a quantized model: `DQ -> op -> Q` written as one integer operator.

QLinearConv and QLinearMatMul are ONNX (opset 10), the others are of the domain com.microsoft of ONNX Runtime. What has
no integer operator keeps its DQ and Q.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name
from qcore.graph.qdq import CONTRIB, is_dequantize, is_quantize
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name, only_consumer
from qcore.numerics.affine import IntDtype, QParams, quantize_array

_UNARY = {
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "AveragePool": "QLinearAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
}
_BINARY = {"Add": "QLinearAdd", "Mul": "QLinearMul"}
# ONNX Runtime has these for int8 and uint8 themselves; their data is input 0.
_MOVING = (
    *("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"),
    *("GatherElements", "Expand", "Tile", "DepthToSpace", "Identity"),
)
_EIGHT_BITS = ("int8", "uint8")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Integer:
    """A quantized tensor: integers, scale and zero point."""

    value: ir.Value
    scale: ir.Value
    zero: ir.Value

    @property
    def all(self) -> list[ir.Value]:
        return [self.value, self.scale, self.zero]


def to_qoperator(model: ir.Model) -> Rewrite:
    """Return the QDQ `model` with integer operators; `skipped` are nodes between DQ and Q that have none.

    Raises:
        ModelError: a tensor has 16 or 4 bits, which no such operator takes.
    """
    out = editable_copy(model)
    graph = out.graph
    _refuse_other_widths(graph)
    changed: list[str] = []
    skipped: list[Skipped] = []
    for node in list(graph):
        if is_quantize(node) or is_dequantize(node) or not any(map(_integer, node.inputs)):
            continue
        written = _written(graph, node)
        if written is None:
            reason = "it has no integer operator; it computes in float between DQ and Q"
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
        else:
            changed.append(node_name(written))
    _drop_unread(graph)
    drop_unused_initializers(graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _refuse_other_widths(graph: ir.Graph) -> None:
    for node in graph:
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and zero.dtype.name not in _EIGHT_BITS:
            raise ModelError(
                f"form qoperator cannot hold {zero.dtype.name} (node {node_name(node)}); allowed: int8 and uint8; use "
                "form qdq"
            )


def _integer(value: ir.Value | None) -> _Integer | None:
    """Return the quantized tensor that a DQ makes `value` from, or None."""
    node = value.producer() if value is not None else None
    if node is None or not is_dequantize(node) or len(node.inputs) < 3:
        return None
    source, scale, zero = node.inputs
    assert source is not None and scale is not None and zero is not None  # noqa: S101, PT018 - the checker has looked
    return _Integer(value=source, scale=scale, zero=zero)


def _quantized(value: ir.Value) -> tuple[ir.Node, _Integer] | None:
    """Return the Q that alone reads `value`, and the tensor that it makes, or None."""
    node = only_consumer(value)
    if node is None or not is_quantize(node):
        return None
    scale, zero = node.inputs[1], node.inputs[2]
    assert scale is not None and zero is not None  # noqa: S101, PT018 - the checker has looked
    return node, _Integer(value=node.outputs[0], scale=scale, zero=zero)


def _written(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """Put the integer operator in place of `node` and the Q behind it; return it, or None where there is none."""
    if node.domain != "":
        return None
    if node.op_type in _MOVING:
        return _moved(graph, node)
    inputs = [_integer(v) for v in node.inputs]
    if not inputs or inputs[0] is None:
        return None
    bound = _bound_behind(node)
    result = _quantized((bound or node).outputs[0])
    present = [i for i in inputs if i is not None]
    if node.op_type == "Gemm":
        built = _gemm(graph, node, present, None if result is None else result[1])
    else:
        built = None if result is None else _built(graph, node, present, result[1])
    if built is None:
        return None
    ends = None if bound is None or result is None else _ends(graph, bound, result[1])
    _replace(graph, node, built, result)
    if bound is not None and ends is not None:
        _bound_integers(graph, bound.name, built.outputs[0], ends)
    return built


def _built(graph: ir.Graph, node: ir.Node, inputs: list[_Integer], out: _Integer) -> ir.Node | None:
    """Return the operator of one output that computes what `node` does, not yet in the graph."""
    ends = [out.scale, out.zero]
    name, attributes = node.name, node.attributes
    first = inputs[0]
    match node.op_type:
        case "Conv" if len(inputs) == 2:
            bias = _int32(node)
            if len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
                return None
            parts = [*first.all, *inputs[1].all, *ends, *([bias] if bias is not None else [])]
            return ir.node("QLinearConv", parts, attributes, name=name)
        case "MatMul" if len(inputs) == 2:
            return ir.node("QLinearMatMul", [*first.all, *inputs[1].all, *ends], attributes, name=name)
        case "Add" | "Mul" if len(inputs) == 2:
            return _contrib(graph, _BINARY[node.op_type], [*first.all, *inputs[1].all, *ends], node)
        case "Concat" if len(inputs) == len(node.inputs):
            return _contrib(graph, "QLinearConcat", [*ends, *(v for i in inputs for v in i.all)], node)
        case op if op in _UNARY:
            return _contrib(graph, _UNARY[op], [*first.all, *ends], node)
        case _:
            return None


def _contrib(graph: ir.Graph, op_type: str, inputs: list[ir.Value], node: ir.Node) -> ir.Node:
    """Return a node of the contributed operators with the attributes of `node`."""
    attributes = dict(node.attributes)
    if op_type == "QLinearSoftmax":
        attributes["opset"] = ir.AttrInt64("opset", graph.opset_imports[""])
    if op_type == "QLinearAveragePool":
        attributes.pop("dilations", None)
    graph.opset_imports.setdefault(CONTRIB, 1)
    return ir.node(op_type, inputs, attributes, domain=CONTRIB, name=node.name)


def _gemm(graph: ir.Graph, node: ir.Node, inputs: list[_Integer], out: _Integer | None) -> ir.Node | None:
    """Return QGemm for Gemm, not yet in the graph: with `out` integers come out, else float logits."""
    bias = _int32(node)
    if len(inputs) < 2 or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
        return None
    attributes = {k: v for k, v in node.attributes.items() if k in ("alpha", "transA", "transB")}
    parts: list[ir.Value | None] = [*inputs[0].all, *inputs[1].all, bias]
    if out is not None:
        parts += [out.scale, out.zero]
    while parts[-1] is None:
        parts.pop()
    graph.opset_imports.setdefault(CONTRIB, 1)
    return ir.node("QGemm", parts, attributes, domain=CONTRIB, name=node.name)


def _bound_behind(node: ir.Node) -> ir.Node | None:
    """Return the Relu or Clip with constant bounds that alone reads `node` and is itself only read by a Q."""
    reader = only_consumer(node.outputs[0])
    if reader is None or reader.op_type not in ("Relu", "Clip") or reader.inputs[0] is not node.outputs[0]:
        return None
    if any(v is not None and constant_array(v) is None for v in reader.inputs[1:]):
        return None
    return reader if _quantized(reader.outputs[0]) is not None else None


def _ends(graph: ir.Graph, bound: ir.Node, out: _Integer) -> list[ir.Value | None]:
    """Return new constants: the bounds of a Relu or Clip as integers of `out`."""
    scale, zero = constant_array(out.scale), constant_array(out.zero)
    assert scale is not None and zero is not None  # noqa: S101, PT018 - insert_activation_qdq writes both
    limits, dtype = np.iinfo(zero.dtype), cast(IntDtype, zero.dtype.name)
    lower, upper = (constant_array(v) for v in [*bound.inputs[1:3], None, None][:2])
    ends = [np.zeros((), np.float32) if bound.op_type == "Relu" else lower, upper]
    q = QParams(scale=scale, zero_point=zero.astype(np.int32), dtype=dtype, qmin=limits.min, qmax=limits.max)
    name = f"{bound.name}_bound"
    return [None if e is None else add_initializer(graph, name, quantize_array(e.reshape(()), q)) for e in ends]


def _bound_integers(graph: ir.Graph, name: str | None, result: ir.Value, ends: list[ir.Value | None]) -> None:
    """Clip the integers `result` where floats were clipped: rounding and saturating keep the order.

    So `Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))`, exactly.
    """
    clip = ir.node("Clip", [result, *ends], name=name)
    clipped, maker = clip.outputs[0], result.producer()
    assert maker is not None  # noqa: S101 - it has just been put there
    clipped.type, clipped.shape = result.type, result.shape
    for reader, index in list(result.uses()):
        if reader is not clip:
            reader.replace_input_with(index, clipped)
    for i, value in enumerate(graph.outputs):
        if value is result:
            graph.outputs[i] = clipped
    graph.insert_after(maker, clip)
    clipped.name, result.name = result.name, fresh_name(graph, f"{result.name}_unbounded")


def _int32(node: ir.Node) -> ir.Value | None:
    """Return the int32 bias of a layer, or None where it has none or a float one."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    producer = value.producer() if value is not None else None
    if producer is None or not is_dequantize(producer):
        return None
    integers = constant_array(producer.inputs[0])
    return producer.inputs[0] if integers is not None and integers.dtype == np.int32 else None


def _moved(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """Let a node that only moves values work on the integers themselves, if all scales are the same."""
    source = _integer(node.inputs[0])
    results = [_quantized(o) for o in node.outputs if o.uses() or o.is_graph_output()]
    if source is None or not results or any(r is None for r in results):
        return None
    pairs = [r for r in results if r is not None]
    if any(not _same(source, out) for _, out in pairs):
        return None
    node.replace_input_with(0, source.value)
    for quantize, out in pairs:
        real = quantize.inputs[0]
        assert real is not None  # noqa: S101 - a Q has an input
        real.type, real.shape = ir.TensorType(source.zero.dtype or ir.DataType.UINT8), out.value.shape or real.shape
        name = out.value.name
        out.value.replace_all_uses_with(real, replace_graph_outputs=True)
        graph.remove(quantize, safe=True)
        real.name = name
    return node


def _same(a: _Integer, b: _Integer) -> bool:
    pairs = ((a.scale, b.scale), (a.zero, b.zero))
    arrays = [(constant_array(x), constant_array(y)) for x, y in pairs]
    return all(x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


def _replace(graph: ir.Graph, node: ir.Node, built: ir.Node, result: tuple[ir.Node, _Integer] | None) -> None:
    """Put `built` where `node` and the Q behind it were; its output takes over name, readers and type."""
    old, new = node.outputs[0] if result is None else result[1].value, built.outputs[0]
    name = old.name
    dtype = ir.DataType.FLOAT if result is None else result[1].zero.dtype
    new.type, new.shape = ir.TensorType(dtype or ir.DataType.UINT8), old.shape or node.outputs[0].shape
    graph.insert_before(node, built)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    last = node if result is None else result[0]
    while last is not node:  # the Q, and the Relu or Clip between
        before = last.inputs[0].producer() if last.inputs[0] is not None else None
        graph.remove(last, safe=True)
        last = before or node
    graph.remove(node, safe=True)
    old.name = None
    new.name = name


def _drop_unread(graph: ir.Graph) -> None:
    """Remove the DQs that nothing reads any more."""
    for node in reversed(list(graph)):
        if is_dequantize(node) and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
