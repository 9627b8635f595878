"""Float16: weights and activations in half precision wherever the operators allow it.

Which inputs and outputs of a node may be float16 is read from ONNX's own operator schemas, not from a list of names.
A tensor that is produced in one precision and read in the other gets one Cast per direction. Files shrink to a half;
on CPUs without float16 kernels the runtime computes in float32 between casts of its own, so this is for size and for
devices that have such kernels. Activations beyond 65504 become infinite: exclude their nodes.

Source: IEEE 754-2019 binary16; ONNX operator schemas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name

_LARGEST = float(np.finfo(np.float16).max)
_LOST = 1e-4  # squared relative error of a constant: 1 % of its norm; ordinary rounding leaves 1e-7
_SCATTER = ("ScatterElements", "ScatterND")
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Float16Step(Config):
    """Options of the recipe step `float16`.

    `keep_io` leaves the model's inputs and outputs float32. `exclude` names nodes, `exclude_operators` op types that
    stay float32.
    """

    method: Literal["float16"] = "float16"
    keep_io: bool = True
    exclude: tuple[str, ...] = ()
    exclude_operators: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class _Ports:
    """Which inputs and outputs of one node become float16, by index."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Plan:
    """What becomes of every node of the main graph."""

    ports: dict[ir.Node, _Ports] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def to_float16(model: ir.Model, step: Float16Step) -> Rewrite:
    """Return `model` in float16; `changed` names the nodes that compute in it.

    A node stays float32 if its operator has no float16 form, if a constant of it would overflow or lose more than 1 %,
    or if it has a subgraph (If, Loop, Scan), which stays float32 as a whole.

    Raises:
        ModelError: no node can be float16, or `exclude` names no node.
    """
    described = {v.name for node in model.graph for v in node.outputs if v.type is not None}
    out = editable_copy(ShapeInferencePass()(model.clone()).model)
    graph = out.graph
    missing = set(step.exclude) - {node_name(n) for n in graph}
    if missing:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    plan = _planned(out, step)
    if not plan.ports:
        reasons = sorted({s.reason for s in plan.skipped}) or ["it has no float32 tensors"]
        raise ModelError(f"no node can be float16: {'; '.join(reasons[:3])}")
    halves = {node.outputs[i] for node, ports in plan.ports.items() for i in ports.outputs}
    for value in halves:
        value.type = ir.TensorType(_HALF)
    if not step.keep_io:
        for port in graph.inputs:
            if _is_float(port):
                port.type = ir.TensorType(_HALF)
                halves.add(port)
    _join(graph, plan, halves, step)
    drop_unused_initializers(graph)
    for value in [o for node in graph for o in node.outputs]:
        if value.name not in described and not value.is_graph_output():
            value.type = value.shape = None  # inferred here; in the file it would only take room
    return Rewrite(model=out, changed=tuple(node_name(n) for n in plan.ports), skipped=tuple(plan.skipped))


def _planned(model: ir.Model, step: Float16Step) -> _Plan:
    plan = _Plan()
    opset = model.opset_imports.get("", 0)
    for node in model.graph:
        floats = [v for v in (*node.inputs, *node.outputs) if v is not None and _is_float(v)]
        unknown = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name and v.dtype is None]
        if not floats and not unknown:
            continue  # it has nothing to do with floats
        found = f"the type of {unknown[0].name} is not known" if unknown else _ports(node, opset, step)
        if isinstance(found, _Ports):
            plan.ports[node] = found
        else:
            plan.skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=found))
    return plan


def _ports(node: ir.Node, opset: int, step: Float16Step) -> _Ports | str:
    """Return the ports of `node` that become float16, or why it stays float32."""
    if node_name(node) in step.exclude or node.op_type in step.exclude_operators:
        return "excluded by the recipe"
    if (reason := _operator_refusal(node)) is not None:
        return reason
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"opset {opset} has no schema of {node.op_type}"
    inputs = frozenset(i for i, v in enumerate(node.inputs) if _can_be_half(v, _formal(schema.inputs, i), schema))
    if not inputs:
        return f"opset {opset} has no float16 form of {node.op_type}"
    for i in inputs:
        value, array = node.inputs[i], constant_array(node.inputs[i])
        bound = node.op_type == "Clip" and i > 0  # no float16 lies beyond 65504, so such a bound may end there
        if value is not None and array is not None and (reason := _unfit(array, may_saturate=bound)) is not None:
            return f"constant {value.name} {reason}"
    outputs = _half_outputs(node, inputs, schema)
    return outputs if isinstance(outputs, str) else _Ports(inputs=inputs, outputs=outputs)


def _operator_refusal(node: ir.Node) -> str | None:
    if node.domain != "":
        return f"domain {node.domain} is not standard ONNX"
    if node.op_type == "MeanVarianceNormalization":
        return "ONNX defines it with float32 constants"
    if node.op_type in _SCATTER and _reduces(node):
        return "onnxruntime has no float16 kernel that reduces while it scatters, and cannot fall back"
    if any(
        isinstance(v.type, ir.SequenceType | ir.OptionalType) for v in (*node.inputs, *node.outputs) if v is not None
    ):
        return "it handles sequences or optional values"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "it has a subgraph, which stays float32"
    return None


def _half_outputs(node: ir.Node, inputs: frozenset[int], schema: "onnx.defs.OpSchema") -> frozenset[int] | str:
    """Return the float32 outputs that turn float16 when `inputs` do, as ONNX's type inference sees it."""
    types = {}
    for i, value in enumerate(node.inputs):
        if value is not None and value.name is not None:
            proto = types[value.name] = ir.serde.serialize_value(value).type
            if i in inputs:
                proto.tensor_type.elem_type = int(_HALF)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), types)
    except (onnx.shape_inference.InferenceError, RuntimeError) as e:
        return f"its types do not fit in float16: {' '.join(str(e).split())[:80]}"
    if any(_is_float(v) and v.name not in inferred for v in node.outputs):
        return "ONNX cannot infer its types"
    return frozenset(
        i
        for i, v in enumerate(node.outputs)
        if _is_float(v) and v.name in inferred and inferred[v.name].tensor_type.elem_type == int(_HALF)
    )


def _reduces(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.as_string() != "none"


def _formal(ports: "Sequence[onnx.defs.OpSchema.FormalParameter]", index: int) -> "onnx.defs.OpSchema.FormalParameter":
    return ports[min(index, len(ports) - 1)]  # the last one may be variadic


def _can_be_half(
    value: ir.Value | None, formal: "onnx.defs.OpSchema.FormalParameter", schema: "onnx.defs.OpSchema"
) -> bool:
    """Say whether a float32 `value` may be float16 there: its type is a variable that allows it."""
    if value is None or not _is_float(value):
        return False
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == formal.type_str), ())
    return "tensor(float16)" in allowed


def _is_float(value: ir.Value) -> bool:
    return value.dtype == _FLOAT and isinstance(value.type, ir.TensorType)


def _unfit(array: NDArray[np.floating], *, may_saturate: bool) -> str | None:
    """Return what is lost if the constant `array` becomes float16, or None."""
    x = array.astype(np.float64)
    finite = np.isfinite(x)
    if may_saturate:
        x[finite] = np.clip(x[finite], -_LARGEST, _LARGEST)
    if (np.abs(x[finite]) > _LARGEST).any():
        return f"holds {float(np.abs(x[finite]).max()):.4g}; float16 ends at {_LARGEST:.0f}"
    rounded = x.astype(np.float16).astype(np.float64)
    if float(np.sum((x - rounded)[finite] ** 2)) > _LOST * float(np.sum(x[finite] ** 2)):
        return f"holds {float(np.abs(x[finite]).max()):.4g}, of which float16 keeps too little"
    return None


def _join(graph: ir.Graph, plan: _Plan, halves: set[ir.Value], step: Float16Step) -> None:
    """Give every reader the precision that it wants: one half copy per constant, one Cast per tensor and direction."""
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(o for node in list(graph) for o in node.outputs),
    ]
    for value in values:
        is_half = value in halves
        if not is_half and not _is_float(value):
            continue
        other = [(n, i) for n, i in value.uses() if (n in plan.ports and i in plan.ports[n].inputs) != is_half]
        wanted = _FLOAT if is_half else _HALF
        as_output = value.is_graph_output() and not value.is_graph_input() and is_half == step.keep_io
        if not other and not as_output:
            continue
        array = constant_array(value)
        if array is not None and not as_output:
            converted = add_initializer(graph, f"{value.name}_half", _halved(array))
        else:
            converted = _cast(graph, value, wanted)
        for node, index in other:
            node.replace_input_with(index, converted)
        if as_output:
            _take_over_output(graph, value, converted)


def _halved(array: NDArray[np.floating]) -> NDArray[np.float16]:
    """Return `array` in float16; finite values stay finite."""
    finite = np.clip(array, -_LARGEST, _LARGEST)
    return np.where(np.isfinite(array), finite, array).astype(np.float16)


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` in `dtype`, by a new Cast right behind it."""
    suffix = "half" if dtype == _HALF else "float"
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=fresh_name(graph, f"{value.name}_to_{suffix}"))
    result = node.outputs[0]
    result.name = fresh_name(graph, f"{value.name}_{suffix}")
    result.type, result.shape = ir.TensorType(dtype), value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    return result


def _take_over_output(graph: ir.Graph, value: ir.Value, converted: ir.Value) -> None:
    """Let the graph give out `converted` under the name of `value`."""
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = converted
    name, value.name = value.name, fresh_name(graph, f"{value.name}_inner")
    converted.name = name
