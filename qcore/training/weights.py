"""Which initializers are weights, and how trained values get back into them."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch

from qcore.graph.edit import editable_copy
from qcore.training.ops import SETTINGS
from qcore.training.tensors import FLOATS, onnx_from_torch, torch_from_onnx

_LEARNED: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "BatchNormalization": (1, 2),
        "Conv": (1, 2),
        "ConvTranspose": (1, 2),
        "GRU": (1, 2, 3),
        "Gemm": (1, 2),
        "GroupNormalization": (1, 2),
        "InstanceNormalization": (1, 2),
        "LSTM": (1, 2, 3, 7),
        "LayerNormalization": (1, 2),
        "PRelu": (1,),
        "RMSNormalization": (1,),
        "RNN": (1, 2, 3),
    }
)
"""Operator -> the inputs that are weights whatever they look like."""
_PERHAPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Add": (0, 1),
        "Concat": tuple(range(64)),
        "Einsum": tuple(range(8)),
        "Expand": (0,),
        "Gather": (0,),
        "MatMul": (0, 1),
        "Mul": (0, 1),
        "QuantizeLinear": (0,),
        "Reshape": (0,),
        "Transpose": (0,),
    }
)
"""Operator -> the inputs that are weights if they hold several values, none as large as those of masks."""
_MASK = 1e4
STATISTICS = (3, 4)
"""Inputs of BatchNormalization that hold running statistics."""


def trainable_names(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the float initializers (and Constant outputs) that are taken to be weights, in graph order.

    Those are the weights, scales and biases of layers that have such inputs; and, of what products, sums, lookups and
    moves read, constants of more than one value that are all below 1e4: masks and lone factors are left out. Never the
    scales of quantizers, bounds, shapes and running statistics.
    """
    found: dict[str, None] = {}
    for node in editable_copy(model).graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.dtype not in FLOATS or node.domain != "":
                continue
            certain = index in _LEARNED.get(node.op_type, ())
            perhaps = index in _PERHAPS.get(node.op_type, ()) and index not in SETTINGS.get(node.op_type, ())
            if certain or (perhaps and _looks_learned(value.const_value)):
                found[str(value.name)] = None
    return tuple(found)


def _looks_learned(tensor: ir.TensorProtocol) -> bool:
    return tensor.size > 1 and bool((np.abs(tensor.numpy().astype(np.float64)) < _MASK).all())


def statistics_names(graph: ir.Graph) -> tuple[str, ...]:
    """Return the names of the running means and variances of `graph`, in order."""
    return tuple(
        str(node.inputs[index].name)  # type: ignore[union-attr]  # the operator has no optional inputs
        for node in graph
        if node.op_type == "BatchNormalization"
        for index in STATISTICS
    )


def with_values(model: ir.Model, values: Mapping[str, torch.Tensor]) -> ir.Model:
    """Return `model` with new values in the initializers or Constant nodes called as in `values`.

    Name, shape and element type stay; a tensor whose values did not change stays the very object it was, so its bytes
    do too. The argument is not changed.
    """
    out = model.clone()
    for name, value in out.graph.initializers.items():
        if name in values and value.const_value is not None:
            value.const_value = _replaced(value.const_value, values[name])
    for node in out.graph:
        name = str(node.outputs[0].name) if node.op_type == "Constant" else ""
        old = ir.convenience.get_const_tensor(node.outputs[0]) if name in values else None
        if old is not None and (new := _replaced(old, values[name])) is not old:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", new)
            node.outputs[0].const_value = new
    return out


def _replaced(old: ir.TensorProtocol, new: torch.Tensor) -> ir.TensorProtocol:
    same = torch.equal(torch_from_onnx(old), new.detach().cpu())
    return old if same else onnx_from_torch(new, old)
