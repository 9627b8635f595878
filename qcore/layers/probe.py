"""One graph that measures every layer of a quantized model: the float model, the quantized one, and what lies between.

Three things stand side by side in it and read the same inputs: the float model; the whole quantized model; and for
each layer a copy of that layer alone, with the file's own weights and Q/DQ parameters, fed with the float model's
tensors. What leaves the graph are sums of squares and the integers of each activation quantizer, so one run of one
batch measures all layers, and nothing that grows with the data is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, editable_copy, fresh_name
from qcore.graph.io import at_opset
from qcore.graph.rewrite import Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.layers.find import (
    DEQUANTIZE,
    QUANTIZE,
    Layer,
    Pair,
    dequantized_constant,
    find_layers,
    is_constant,
    layers_before,
)
from qcore.numerics.affine import Float
from qcore.numerics.error import limited_db

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PREFIX = "quantized/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Names of four scalar float32 outputs: sum x^2, sum (x - y)^2, sum y^2 and sum x*y of reference x and y."""

    signal: str
    noise: str
    power: str
    product: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """An activation quantizer with per-tensor parameters, on the float model's tensor.

    `integers` names the output with the quantized values, `beyond` the scalar output that counts the values which
    saturate, `rounding` compares the tensor with itself after the quantizer; `low` and `high` are the reals that
    `qmin` and `qmax` stand for.
    """

    integers: str
    beyond: str
    rounding: Comparison
    qmin: int
    qmax: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightError:
    """How far quantized weights are from the float ones, in dB.

    `sqnr_db` is over all of them, where large channels hide what small ones lose; `weak_channels_sqnr_db` is what a
    tenth of the output channels stays below.
    """

    sqnr_db: float
    weak_channels_sqnr_db: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What is measured about one layer; `tensor` is its output in the float model, `after` the layers that it reads.

    `local` is None where the layer computes in float, `weights` where it has no quantized ones, `quantizer` where its
    output is not quantized with one scale.
    """

    node: str
    op_type: str
    tensor: str
    after: tuple[str, ...]
    accumulated: Comparison
    local: Comparison | None
    weights: WeightError | None
    quantizer: Quantizer | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedModel:
    """The graph (its only outputs are those that the probes name), the probes in graph order, and what has none."""

    model: ir.Model
    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]


def probe_layers(baseline: ir.Model, quantized: ir.Model) -> ProbedModel:
    """Return the graph that measures the layers of `quantized` against `baseline`; neither is changed.

    Args:
        baseline: the float model as the quantizer saw it: tensors have the same names, batch norms are folded.
        quantized: the QDQ model made from it.

    Raises:
        ModelError: `quantized` has no Q/DQ pairs, or its inputs are not those of `baseline`.
    """
    _refuse_other_forms(quantized)
    out = editable_copy(at_opset(baseline, quantized.opset_imports.get("", 0)))
    for domain, version in quantized.opset_imports.items():
        out.opset_imports.setdefault(domain, version)
    ShapeInferencePass()(out)
    values = [*out.graph.inputs, *(o for n in out.graph for o in n.outputs)]
    source = editable_copy(quantized).graph
    layers = find_layers(source)
    after = layers_before(layers)
    weights = {node_name(n): constant_array(n.inputs[1]) for n in out.graph if n.op_type in WEIGHTED}
    branches = _Branches(
        graph=out.graph,
        floats={str(v.name): v for v in values if v.name and v.dtype == ir.DataType.FLOAT},
        weights={k: w for k, w in weights.items() if w is not None and w.dtype == np.float32},
        names=_names(source),
        known={},
        outputs=[],
        sums={},
    )
    others = {v.name for v in values if v.dtype not in (None, ir.DataType.FLOAT)}
    _move(source, out.graph)
    out.graph.outputs.clear()
    probes, skipped = [], []
    for layer in layers:
        if layer.tensor in branches.floats:
            probes.append(_probe(branches, layer, after[layer.name]))
        elif layer.tensor not in others:
            reason = f"the baseline has no float tensor {layer.tensor}; pass the model that was quantized"
            skipped.append(Skipped(node=layer.name, op_type=layer.op_type, reason=reason))
    out.graph.outputs.extend(reversed(branches.outputs))
    return ProbedModel(model=out, probes=tuple(probes), skipped=tuple(skipped))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Branches:
    """The graph that grows.

    `floats` are the float model's tensors and `weights` its layers' weights, by name; `names` what the quantized
    file calls its values; `known` what a value of the quantized model is when computed from float tensors; `outputs`
    what the graph will give, and `sums` the names of the sums among them.
    """

    graph: ir.Graph
    floats: Mapping[str, ir.Value]
    weights: Mapping[str, Float]
    names: Mapping[ir.Value, str]
    known: dict[ir.Value, ir.Value]
    outputs: list[ir.Value]
    sums: dict[tuple[str, ir.Value], str]


def _refuse_other_forms(quantized: ir.Model) -> None:
    types = {n.op_type for n in quantized.graph}
    if QUANTIZE in types and DEQUANTIZE in types:
        return
    form = "in QOperator form" if any(t.startswith("QLinear") for t in types) else "a float model"
    raise ModelError(
        f"the model has no QuantizeLinear / DequantizeLinear pairs (it is {form}); allowed: QDQ form; pass the file "
        "that `qcore quantize` wrote in QDQ form"
    )


def _names(graph: ir.Graph) -> dict[ir.Value, str]:
    values = (*graph.inputs, *(o for n in graph for o in n.outputs))
    return {v: str(v.name) for v in values if v.name}


def _move(source: ir.Graph, graph: ir.Graph) -> None:
    """Move everything in `source` to the end of `graph`, under new names; it reads the inputs of `graph`."""
    inputs = {v.name: v for v in graph.inputs}
    for value in source.inputs:
        own = inputs.get(value.name)
        if own is None or own.dtype != value.dtype:
            have = ", ".join(f"{v.name} ({v.dtype})" for v in graph.inputs)
            raise ModelError(
                f"the quantized model reads {value.name} ({value.dtype}), the baseline {have}; allowed: equal inputs; "
                "pass the float model that it was made from"
            )
        value.replace_all_uses_with(own)
    source.outputs.clear()
    constants = list(source.initializers.values())
    source.initializers.clear()
    for value in constants:
        value.name = fresh_name(graph, f"{_PREFIX}{value.name}")
        graph.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        node.name = fresh_name(graph, f"{_PREFIX}{node.name}")
        for output in node.outputs:
            output.name = fresh_name(graph, f"{_PREFIX}{output.name}") if output.name else output.name
        graph.append(node)


def _probe(b: _Branches, layer: Layer, after: tuple[str, ...]) -> Probe:
    reference = b.floats[layer.tensor]
    measured = layer.result if layer.pair is None else layer.pair[1].outputs[0]
    local = quantizer = weights = None
    if layer.pair is not None:
        quantizer = _quantizer(b, layer.pair, reference)
    if layer.is_quantized:
        local = _compare(b, reference, _alone(b, layer))
        weights = _weights(b, layer)
    return Probe(
        node=layer.name,
        op_type=layer.op_type,
        tensor=layer.tensor,
        after=after,
        accumulated=_compare(b, reference, measured),
        local=local,
        weights=weights,
        quantizer=quantizer,
    )


def _alone(b: _Branches, layer: Layer) -> ir.Value:
    """Return the result of `layer` alone: its own weights and roundings, float tensors as inputs."""
    value = b.floats[layer.tensor] if not layer.nodes else layer.result
    behind: dict[ir.Value, ir.Value] = {}
    for node in layer.nodes:
        inputs = [None if v is None else behind.get(v) or _from_floats(b, v) for v in node.inputs]
        copy = _copy(b, node, inputs)
        behind[node.outputs[0]] = value = copy.outputs[0]
    if layer.pair is None:
        return value
    integers = _copy(b, layer.pair[0], [value, *layer.pair[0].inputs[1:]])
    return _copy(b, layer.pair[1], [integers.outputs[0], *layer.pair[1].inputs[1:]]).outputs[0]


def _from_floats(b: _Branches, value: ir.Value) -> ir.Value:
    """Return `value` of the quantized model as it would be if every layer before it were exact."""
    if value in b.known:
        return b.known[value]
    producer = value.producer()
    if producer is None or is_constant(value):
        return value
    source = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer.op_type == DEQUANTIZE and source is not None and source.op_type == QUANTIZE:
        result = _rounded(b, (source, producer)).outputs[0]
    elif b.names.get(value) in b.floats:
        result = b.floats[b.names[value]]
    else:
        inputs = [None if v is None else _from_floats(b, v) for v in producer.inputs]
        copy = _copy(b, producer, inputs)
        b.known.update(zip(producer.outputs, copy.outputs, strict=True))
        result = b.known[value]
    b.known[value] = result
    return result


def _rounded(b: _Branches, pair: Pair) -> ir.Node:
    """Return the second node of a copy of `pair` that reads the float model's tensor."""
    quantize, dequantize = pair
    known = b.known.get(dequantize.outputs[0])
    if known is not None:
        node = known.producer()
        assert node is not None  # noqa: S101 - only this function and _copy write outputs of nodes there
        return node
    behind, before = dequantize.outputs[0], quantize.inputs[0]
    assert before is not None  # noqa: S101 - the first input of QuantizeLinear is not optional
    reference = b.floats.get(b.names.get(behind, "")) or b.floats.get(b.names.get(before, ""))
    source = reference if reference is not None else _from_floats(b, before)
    integers = _copy(b, quantize, [source, *quantize.inputs[1:]])
    result = _copy(b, dequantize, [integers.outputs[0], *dequantize.inputs[1:]])
    b.known[behind] = result.outputs[0]
    return result


def _quantizer(b: _Branches, pair: Pair, reference: ir.Value) -> Quantizer | None:
    """Return the outputs that say how the levels of `pair` are used, or None for per-channel parameters."""
    scale = constant_array(pair[0].inputs[1])
    zero = constant_array(pair[0].inputs[2]) if len(pair[0].inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    levels = np.iinfo(zero.dtype)
    step, offset = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    low, high = ((q - offset) * step for q in (levels.min, levels.max))
    edges = [
        add_initializer(b.graph, f"{reference.name}.{end}", np.array(at, np.float32))
        for end, at in (("lower_edge", low - step / 2), ("upper_edge", high + step / 2))
    ]
    clipped = _add(b, "Clip", [reference, *edges])
    inside = _add(b, "Equal", [reference, clipped])
    outside = _add(b, "Cast", [_add(b, "Not", [inside])], to=int(ir.DataType.FLOAT))
    dequantize = _rounded(b, pair)
    integers = dequantize.inputs[0]
    assert integers is not None  # noqa: S101 - _copy gave it
    integers.type = ir.TensorType(ir.DataType.from_numpy(zero.dtype))
    b.outputs.append(integers)
    return Quantizer(
        integers=str(integers.name),
        beyond=_sum(b, "ReduceSum", outside),
        rounding=_compare(b, reference, dequantize.outputs[0]),
        qmin=int(levels.min),
        qmax=int(levels.max),
        low=low,
        high=high,
    )


def _weights(b: _Branches, layer: Layer) -> WeightError | None:
    node = layer.nodes[0] if layer.nodes else None
    if node is None or node.op_type not in WEIGHTED or node.inputs[1] is None:
        return None
    before, dequantize = b.weights.get(layer.name), node.inputs[1].producer()
    after = None if dequantize is None else dequantized_constant(dequantize)
    if before is None or after is None or before.shape != after.shape:
        return None
    axis = _channel_axis(node, before.ndim)
    others = tuple(i for i in range(before.ndim) if i != axis)
    signal = np.sum(before.astype(np.float64) ** 2, axis=others)
    noise = np.sum((before.astype(np.float64) - after) ** 2, axis=others)
    channels = [limited_db(float(x), float(e)) for x, e in zip(signal, noise, strict=True) if x > 0]
    return WeightError(
        sqnr_db=limited_db(float(signal.sum()), float(noise.sum())),
        weak_channels_sqnr_db=float(np.percentile(channels, 10)) if channels else limited_db(1, 0),
    )


def _channel_axis(node: ir.Node, ndim: int) -> int:
    """Return the axis of the output channels of the weights of `node`."""
    match node.op_type:
        case "Conv":
            return 0
        case "Gemm":
            return 0 if int_attribute(node, "transB", 0) else 1
        case "ConvTranspose":
            return 1
        case _:
            return ndim - 1


def _compare(b: _Branches, reference: ir.Value, measured: ir.Value) -> Comparison:
    difference = _add(b, "Sub", [reference, measured])
    product = _add(b, "Mul", [reference, measured])
    return Comparison(
        signal=_sum(b, "ReduceSumSquare", reference),
        noise=_sum(b, "ReduceSumSquare", difference),
        power=_sum(b, "ReduceSumSquare", measured),
        product=_sum(b, "ReduceSum", product),
    )


def _sum(b: _Branches, op_type: str, value: ir.Value) -> str:
    """Return the name of an output that reduces `value` to a scalar; there is one for each reduction and value."""
    if (op_type, value) in b.sums:
        return b.sums[op_type, value]
    result = _add(b, op_type, [value], keepdims=0)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
    b.outputs.append(result)
    b.sums[op_type, value] = str(result.name)
    return b.sums[op_type, value]


def _add(b: _Branches, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes, name=fresh_name(b.graph, f"probe/{op_type}"))
    node.outputs[0].name = fresh_name(b.graph, f"probe/{inputs[0].name}/{op_type}")
    b.graph.append(node)
    return node.outputs[0]


def _copy(b: _Branches, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """Return a copy of `node` that reads `inputs`."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise ModelError(
            f"node {node.name} holds a subgraph beside quantized layers, which cannot be measured alone; export the "
            "model without control flow"
        )
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=fresh_name(b.graph, f"local/{node.name}"),
    )
    for output, model in zip(copy.outputs, node.outputs, strict=True):
        output.name = fresh_name(b.graph, f"local/{model.name}") if model.name else model.name
        output.type = model.type
    b.graph.append(copy)
    return copy
