"""Shapes of all tensors of a graph, inferred where the file does not say them."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcore.graph.edit import editable_copy


def shaped_copy(model: ir.Model) -> ir.Model:
    """Return `editable_copy` of `model` in which every tensor has the shape that ONNX shape inference finds."""
    copy = editable_copy(model)
    # Not strict: an operator that inference does not know leaves its own outputs without a shape and no others.
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    return copy


def dims_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Return the shape of `value`, None for each symbolic dimension, or None where even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape.dims)
