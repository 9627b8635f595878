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


def single_sample(model: ir.Model) -> ir.Model:
    """Return a copy of `model` for one sample, with every shape that ONNX shape inference finds.

    The first dimension of every input becomes 1; where the graph does not take that (a matrix is no batch), only those
    do that have no number.
    """
    sized = _inferred(model, fixed_too=True)
    if all(static_shape(o) is not None for node in sized.graph for o in node.outputs):
        return sized
    return _inferred(model, fixed_too=False)


def _inferred(model: ir.Model, *, fixed_too: bool) -> ir.Model:
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None and len(value.shape) and not value.is_initializer():
            first = 1 if fixed_too or not isinstance(value.shape[0], int) else value.shape[0]
            value.shape = ir.Shape([first, *value.shape[1:]])
    for value in (*copy.graph.outputs, *(o for node in copy.graph for o in node.outputs)):
        value.shape = None  # said for another batch; inferred anew
    # Not strict: what does not fit keeps an unknown shape, and nobody is warned.
    return ShapeInferencePass(check_type=False, strict_mode=False)(copy).model


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of `value` if every dimension is a number, else None."""
    if value is None or value.shape is None:
        return None
    dims = tuple(value.shape)
    return tuple(int(d) for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None
