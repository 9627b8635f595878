"""Weights of a smaller model fitted, layer after layer, to what the layers of the float model make.

A layer that lost inputs sees others that move with them, and reads errors of the layers before it. Least squares over
samples finds the weights that serve it best then; how firmly they are held to the old ones is chosen by
cross-validation over the samples (`numerics/shrinkage.py`).

Source: He et al. 2017 (arXiv 1707.06168) section 3.1, asymmetric form; Luo et al. 2017 (arXiv 1707.06342).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.added_bias import added_bias, own_constant, replace_added_bias
from qcore.graph.edit import editable_copy
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, node_name
from qcore.layer_moments import SampledLayer, Tensors, Wanted, layer_moments, wanted_outputs
from qcore.numerics.shrinkage import choose_ridge, pulled
from qcore.runtime.nodewise import Walk, start_walk

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
LAYERS = ("Conv", "Gemm", "MatMul")


def refit_layers(
    model: ir.Model, reference: ir.Model, rows: Mapping[str, Mask], samples: Sequence[Tensors], positions: int
) -> Rewrite:
    """Return `model` with weights and biases with which its layers make what those of `reference` make.

    Args:
        model: float model with the tensor names of `reference`.
        reference: the float model that it was made from.
        rows: of tensors with fewer channels than in `reference`, by name: which of those are left.
        samples: named inputs of each batch.
        positions: how many output positions of each sample of a convolution are looked at.
    """
    out = editable_copy(model)
    layers, skipped = _layers(out.graph)
    sampled = {la.name: la for la in layers.values()}
    wanted = wanted_outputs(reference, tuple(sampled.values()), samples, positions) if sampled else {}
    walk = _named_walk(out, samples)
    changed: list[str] = []
    for node, layer in layers.items():
        kept = rows.get(layer.wanted)
        targets = [
            w if kept is None else Wanted(y=w.y[:, kept], rows=w.rows, columns=w.columns) for w in wanted[layer.name]
        ]
        if _refit(walk, node, layer, targets):
            changed.append(node_name(node))
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _layers(graph: ir.Graph) -> tuple[dict[ir.Node, SampledLayer], list[Skipped]]:
    """Return the layers whose weights can be fitted, in graph order, and the others with reasons."""
    layers: dict[ir.Node, SampledLayer] = {}
    skipped: list[Skipped] = []
    for node in [n for n in graph if n.op_type in LAYERS and n.domain == ""]:
        reason = _refusal(node)
        if reason is not None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
            continue
        weight = constant_array(node.inputs[1])
        assert weight is not None  # noqa: S101 - _refusal has looked
        has_bias, wanted = len(node.inputs) > 2 and node.inputs[2] is not None, node.outputs[0]
        if node.op_type == "MatMul" and not isinstance(found := added_bias(node, weight.shape[1]), str):
            own_constant(graph, found.node, found.index)
            has_bias, wanted = True, found.node.outputs[0]
        elif has_bias:
            own_constant(graph, node, 2)
        layers[node] = SampledLayer(
            name=str(node.outputs[0].name),
            node=node,
            wanted=str(wanted.name),
            kernel=weight.shape[2:] if node.op_type == "Conv" else (),
            groups=int_attribute(node, "group", 1) if node.op_type == "Conv" else 1,
            centred=has_bias,
        )
    return layers, skipped


def _refusal(node: ir.Node) -> str | None:
    value, weight = node.inputs[1], constant_array(node.inputs[1])
    graph = node.graph
    if not isinstance(graph, ir.Graph) or next(graph.subgraphs(), None) is not None:
        return "the graph has subgraphs"
    if value is None or weight is None or weight.dtype != np.float32 or len(value.uses()) > 1:
        return "its weights are not float32 constants of its own"
    if weight.ndim not in ((3, 4) if node.op_type == "Conv" else (2,)):
        return "it is not a convolution in one or two dimensions, or multiplies a stack of matrices"
    if any(float_attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")) or int_attribute(node, "transA", 0):
        return "Gemm with alpha, beta or transA"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    array, outputs = constant_array(bias), weight.shape[_output_axis(node)]
    if bias is not None and (array is None or array.size != outputs or array.dtype != np.float32):
        return "its bias is not one float32 constant per output channel"
    return None


def _output_axis(node: ir.Node) -> int:
    return 0 if node.op_type == "Conv" or int_attribute(node, "transB", 0) else 1


def _named_walk(out: ir.Model, samples: Sequence[Tensors]) -> Walk:
    """Return a walk through `out` in which every node has the name of its first output: names of nodes may repeat."""
    proto = ir.serde.serialize_model(out)
    for node in proto.graph.node:
        node.name = node.output[0]
    return start_walk(proto, samples)


def _refit(walk: Walk, node: ir.Node, layer: SampledLayer, wanted: Sequence[Wanted]) -> bool:
    """Give `node` fitted weights and bias, in the graph and in `walk`; return whether anything differs."""
    value = node.inputs[1]
    weight = constant_array(value)
    assert value is not None and weight is not None  # noqa: S101, PT018 - _refusal has looked
    flat = weight.astype(np.float64) if _output_axis(node) == 0 else weight.astype(np.float64).T
    old = np.ascontiguousarray(flat).reshape(layer.groups, flat.shape[0] // layer.groups, -1)
    moments = layer_moments(walk, layer, wanted, (old.shape[0], old.shape[1], old.shape[2]))
    new = pulled(old, moments, choose_ridge(old, moments))
    matrix = new.reshape(flat.shape)
    arrays = {value: np.ascontiguousarray(matrix if _output_axis(node) == 0 else matrix.T).astype(np.float32)}
    if layer.centred:
        bias = (moments.mean_out - (new @ moments.mean_in[:, :, None])[:, :, 0]).reshape(-1)
        arrays |= _bias(node, bias)
    arrays = {v: a for v, a in arrays.items() if not np.array_equal(a, np.asarray(constant_array(v)))}
    for changed, array in arrays.items():
        changed.const_value = ir.Tensor(array, name=changed.name)
        walk.constants[str(changed.name)] = array
    return bool(arrays)


def _bias(node: ir.Node, bias: Array) -> dict[ir.Value, NDArray[np.float32]]:
    """Return the initializer that holds the bias of `node`, and what it must become."""
    if node.op_type == "MatMul":
        found = added_bias(node, bias.size)
        assert not isinstance(found, str)  # noqa: S101 - _layers has looked
        return {v: a.astype(np.float32) for v, a in replace_added_bias(found, bias).items()}
    value = node.inputs[2]
    old = constant_array(value)
    assert value is not None and old is not None  # noqa: S101, PT018 - _refusal has looked
    return {value: bias.reshape(old.shape).astype(np.float32)}
