"""Batch norms back into a graph from which they were folded: the way back of `fold`.

Networks that were trained with batch normalization learn badly without it. A folded graph gets it again behind every
convolution, at first changing nothing: it takes away the mean and the deviation that samples show there, and puts both
back.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), whose section 3 notes that the transform can be the identity.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import add_initializer, editable_copy, fresh_name
from qcore.graph.fold import fold_batchnorm
from qcore.graph.traverse import constant_array, int_attribute, node_name

EPSILON = 1e-5
_PARTS = ("gamma", "beta", "mean", "variance")
Vector = NDArray[np.floating]


def outputs_to_normalize(model: ir.Model) -> tuple[str, ...]:
    """Return the outputs of convolutions that can get a batch norm which `folded_back` can fold, in graph order.

    Those with constant weights of their own, several channels, and no batch norm behind them yet.
    """
    return tuple(str(n.outputs[0].name) for n in model.graph if _can_have_one(n))


def unfold_batchnorm(model: ir.Model, statistics: Mapping[str, tuple[Vector, Vector]]) -> ir.Model:
    """Return `model` with a batch norm behind each tensor in `statistics`; it computes what it did.

    Args:
        model: float model; not changed.
        statistics: mean and variance of each channel, (channels,) each, by tensor of `outputs_to_normalize`.
    """
    out = editable_copy(model)
    for node in [n for n in out.graph if str(n.outputs[0].name) in statistics]:
        value, name = node.outputs[0], str(node.outputs[0].name)
        mean, variance = (np.asarray(v, np.float32) for v in statistics[name])
        parts = (np.sqrt(variance + np.float32(EPSILON)), mean, mean.copy(), variance)
        held = [add_initializer(out.graph, f"{name}.{p}", v) for p, v in zip(_PARTS, parts, strict=True)]
        norm = ir.node("BatchNormalization", [value, *held], {"epsilon": EPSILON}, name=f"{node_name(node)}.batchnorm")
        result = norm.outputs[0]
        result.type, result.shape = value.type, value.shape
        for reader, index in [(use.node, use.idx) for use in value.uses() if use.node is not norm]:
            reader.replace_input_with(index, result)
        out.graph.insert_after(node, norm)
        # Whoever asks for the tensor by its name gets what it was.
        value.name = fresh_name(out.graph, f"{name}.raw")
        result.name = name
    return out


def idle_biases(model: ir.Model) -> frozenset[str]:
    """Return the names of biases that a batch norm takes away again: nothing depends on them while a batch decides."""
    normed = [n.inputs[0] for n in model.graph if n.op_type == "BatchNormalization"]
    makers = [m for value in normed if value is not None and (m := value.producer()) is not None]
    return frozenset(str(m.inputs[2].name) for m in makers if len(m.inputs) > 2 and m.inputs[2] is not None)


def folded_back(model: ir.Model, original: ir.Model) -> ir.Model:
    """Return `model`, of `unfold_batchnorm`, with batch norms folded and weights called as in `original`."""
    out = fold_batchnorm(model).model
    read = {node_name(n): n.inputs for n in original.graph}
    taken = set(out.graph.initializers)
    for node in out.graph:
        for value, old in zip(node.inputs, read.get(node_name(node), ()), strict=False):
            if value is not None and old is not None and value.is_initializer() and old.name not in taken:
                value.name = old.name
    return out


def _can_have_one(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose") or node.domain != "":
        return False
    if node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1:
        return False
    weight, result = node.inputs[1], node.outputs[0]
    array = constant_array(weight)
    if weight is None or array is None or not np.issubdtype(array.dtype, np.floating) or len(list(weight.uses())) > 1:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_array(bias) is None:
        return False
    readers = {use.node.op_type for use in result.uses()}
    return bool(readers) and not result.is_graph_output() and "BatchNormalization" not in readers
