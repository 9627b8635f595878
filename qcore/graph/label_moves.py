"""Operators that move numbers and do not compute with them: what becomes of channel labels (see `label_rules.py`)."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcore.graph.labels import Count, Ints, Labels, because_of, is_constant, known_dims
from qcore.graph.traverse import constant_array, int_attribute, ints_attribute

Axes = dict[int, Ints]
Rule = Callable[[ir.Node, Labels], str | None]
"""Follows a node, or returns why it cannot: then every channel that touches the node stays."""


def axes_of(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """Return the axes that `node` names in its attribute or second input, () if it names none, None if computed."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    array = constant_array(given)
    if given is not None and array is None:
        return None
    named = ints_attribute(node, "axes") if array is None else tuple(int(a) for a in array.reshape(-1))
    return tuple(sorted(a % rank for a in named)) if rank else ()


def _squeeze(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    dims = known_dims(x)
    axes = axes_of(node, len(dims))
    if axes is None or is_constant(x):
        return "its axes are computed"
    axes = axes or tuple(a for a, d in enumerate(dims) if d == 1)
    found = labels.all_of(x)
    for axis in axes:
        labels.fix(found.pop(axis, None), because_of(node, "it removes the axis"))
    labels.give(node.outputs[0], {a - sum(b < a for b in axes): f for a, f in found.items()})
    return None


def _unsqueeze(node: ir.Node, labels: Labels) -> str | None:
    x, rank = node.inputs[0], len(known_dims(node.outputs[0]))
    axes = axes_of(node, rank)
    if axes is None or is_constant(x):
        return "its axes are computed"
    kept = [a for a in range(rank) if a not in axes]
    labels.give(node.outputs[0], {kept[a]: found for a, found in labels.all_of(x).items()})
    return None


def _concat(node: ir.Node, labels: Labels) -> str | None:
    parts = [v for v in node.inputs if v is not None]
    rank = len(known_dims(node.outputs[0]))
    joined = int_attribute(node, "axis", 0) % rank
    if all(is_constant(v) for v in parts) or any(known_dims(v)[joined] is None for v in parts):
        return "it joins constants, or an unknown number of channels"
    because = because_of(node, "it joins them with something that keeps its size")
    for axis in range(rank):
        here = [None if is_constant(v) else labels.of(v, axis) for v in parts]
        if axis == joined:
            if any(found is not None for found in here):
                labels.give(node.outputs[0], {axis: np.concatenate([_piece(v, axis, labels, node) for v in parts])})
            continue
        shared = None if any(found is None for found in here) else here[0]
        for found in here:
            labels.tie(found, shared, because)
        labels.give(node.outputs[0], {axis: shared})
    return None


def _piece(value: ir.Value, axis: int, labels: Labels, node: ir.Node) -> Ints:
    """Return the labels of a part of a Concat; a part without any gets some that must stay."""
    found = None if is_constant(value) else labels.of(value, axis)
    if found is None:
        found = (
            labels.of_constant(value, axis) if is_constant(value) else labels.fresh(int(known_dims(value)[axis] or 0))
        )
        labels.fix(found, because_of(node, "they are joined as they are"))
    return found


def _split(node: ir.Node, labels: Labels) -> str | None:
    x, rank = node.inputs[0], len(known_dims(node.inputs[0]))
    axis = int_attribute(node, "axis", 0) % rank
    into, at = labels.of(x, axis), 0
    sizes = [known_dims(o)[axis] for o in node.outputs]
    if is_constant(x) or (into is not None and (None in sizes or sum(s or 0 for s in sizes) != into.size)):
        return "how it splits is not known"
    for position, (output, size) in enumerate(zip(node.outputs, sizes, strict=True)):
        found: Axes = {a: f for a, f in labels.all_of(x).items() if a != axis}
        if into is not None:
            found[axis] = into[at : at + (size or 0)]
            labels.counts.append(
                Count(
                    node=str(node.outputs[0].name),
                    tensor=str(output.name),
                    axis=axis,
                    size=size or 0,
                    index=1,
                    position=position,
                )
            )
            at += size or 0
        labels.give(output, found)
    return None


def _slice(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    rank = len(known_dims(x))
    arrays = [constant_array(v) for v in node.inputs[1:5]]
    if is_constant(x) or any(a is None for a in arrays):
        return "where it cuts is computed"
    starts = arrays[0]
    assert starts is not None  # noqa: S101 - looked at above
    named = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.arange(starts.size)
    axes = {int(a) % rank for a in named}
    for axis, found in labels.all_of(x).items():
        if axis in axes:
            labels.fix(found, because_of(node, "it cuts them"))
        else:
            labels.give(node.outputs[0], {axis: found})
    return None


def _transpose(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    if is_constant(x):
        return "it reads a constant"
    order = ints_attribute(node, "perm") or tuple(reversed(range(len(known_dims(x)))))
    labels.give(node.outputs[0], {a: labels.of(x, source) for a, source in enumerate(order)})
    return None


def _flatten(node: ir.Node, labels: Labels) -> str | None:
    x, axis = node.inputs[0], int_attribute(node, "axis", 1)
    dims = known_dims(x)
    cut = axis % len(dims) if axis < 0 else axis
    if is_constant(x):
        return "it reads a constant"
    result: Axes = {}
    for target, (low, high) in enumerate(((0, cut), (cut, len(dims)))):
        merged = _merged(labels, x, (low, high), node)
        result |= {} if merged is None else {target: merged}
    labels.give(node.outputs[0], result)
    return None


def _merged(labels: Labels, x: ir.Value | None, span: tuple[int, int], node: ir.Node) -> Ints | None:
    """Return the labels of the axis that the axes from `span[0]` up to `span[1]` of `x` become."""
    dims = known_dims(x)[span[0] : span[1]]
    found = {a - span[0]: f for a, f in labels.all_of(x).items() if span[0] <= a < span[1]}
    if len(found) != 1 or any(d is None for d in dims):
        for left in found.values():
            labels.fix(left, because_of(node, "it mixes several axes that could lose channels"))
        return None
    ((axis, own),) = found.items()
    shape = [1] * len(dims)
    shape[axis] = own.size
    return np.broadcast_to(own.reshape(shape), [int(d or 0) for d in dims]).reshape(-1)


def _reshape(node: ir.Node, labels: Labels) -> str | None:
    x, wanted = node.inputs[0], node.inputs[1]
    literals = _literals(wanted, len(known_dims(node.outputs[0])))
    before, after = known_dims(x), _resolved(node, literals)
    spans = _spans(before, after)
    if is_constant(x) or spans is None or int_attribute(node, "allowzero", 0):
        return "how it rearranges axes is not known"
    reached: set[int] = set()
    for target, span in spans.items():
        reached |= set(range(*span))
        merged = _merged(labels, x, span, node)
        if merged is None:
            continue
        literal = literals[target]
        same = span == (target, target + 1)
        if literal is None or (literal == 0 and not same):
            labels.fix(merged, because_of(node, "its shape is computed"))
        elif literal > 0:
            labels.counts.append(
                Count(
                    node=str(node.outputs[0].name),
                    tensor=str(node.outputs[0].name),
                    axis=target,
                    size=merged.size,
                    index=1,
                    position=target,
                )
            )
        labels.give(node.outputs[0], {target: merged})
    for axis, found in labels.all_of(x).items():
        if axis not in reached:
            labels.fix(found, because_of(node, "it takes channels apart"))
    return None


def _resolved(node: ir.Node, literals: list[int | None]) -> tuple[int | None, ...]:
    """Return the shape that a Reshape makes, with what it infers (-1) where the batch is the only unknown.

    `x.view(x.size(0), -1)` is exported with a shape that is joined from the batch and -1, which shape inference does
    not know. Written into the output for those who read it.
    """
    x, output = node.inputs[0], node.outputs[0]
    before, after = known_dims(x), known_dims(output)
    open_axes = [a for a in range(1, len(after)) if after[a] is None]
    keeps_batch = literals[:1] == [0] or _is_batch(node.inputs[1], x)
    if before[:1] != (None,) or None in before[1:] or len(open_axes) != 1 or not keeps_batch:
        return after
    (axis,) = open_axes
    rest = math.prod(d or 1 for d in after[1:])
    if literals[axis] != -1 or not rest or math.prod(d or 0 for d in before[1:]) % rest:
        return after
    found = (None, *after[1:axis], math.prod(d or 0 for d in before[1:]) // rest, *after[axis + 1 :])
    output.shape = ir.Shape(found)
    return found


def _is_batch(wanted: ir.Value | None, x: ir.Value | None) -> bool:
    """Say whether the first number of a shape that is joined from parts is the first dimension of `x`."""
    join = wanted.producer() if wanted is not None else None
    node = join.inputs[0].producer() if join is not None and join.op_type == "Concat" and join.inputs[0] else None
    if node is not None and node.op_type == "Unsqueeze" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.inputs[0] is None:
        return False
    index, source = constant_array(node.inputs[1]), node.inputs[0].producer()
    if source is None or source.op_type != "Shape" or index is None or index.size != 1 or index.reshape(-1)[0] != 0:
        return False
    measured = source.inputs[0]
    if measured is None or measured.shape is None or x is None or x.shape is None or "start" in source.attributes:
        return False
    first, own = measured.shape[0], x.shape[0]
    return measured is x or (isinstance(first, ir.SymbolicDim) and first.value is not None and first == own)


def _spans(before: tuple[int | None, ...], after: tuple[int | None, ...]) -> dict[int, tuple[int, int]] | None:
    """Return which consecutive axes of `before` each axis of `after` is made of, where it is made of whole axes.

    None where that is not known: symbolic dimensions other than one first dimension that both have.
    """
    start = 1 if before[:1] == (None,) and after[:1] == (None,) else 0
    if None in before[start:] or None in after[start:] or 0 in before or 0 in after:
        return None
    old, new = [int(d or 0) for d in before[start:]], [int(d or 0) for d in after[start:]]
    if np.prod(old, dtype=object) != np.prod(new, dtype=object):
        return None
    spans = {0: (0, 1)} if start else {}
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if j == first_j + 1:
            spans[start + first_j] = (start + first_i, start + i)
    return spans


def _literals(wanted: ir.Value | None, rank: int) -> list[int | None]:
    """Return the numbers of the shape that a Reshape is given, None for those that are computed."""
    array = constant_array(wanted)
    if array is not None:
        return [int(v) for v in array.reshape(-1)]
    join = wanted.producer() if wanted is not None else None
    if join is None or join.op_type != "Concat" or join.domain != "":
        return [None] * rank
    found: list[int | None] = []
    for part in join.inputs:
        array = constant_array(part)
        # Only -1 can be left as it is; another number would have to be written into the Concat.
        found += [None] if array is None else [int(v) if v == -1 else None for v in array.reshape(-1)]
    return found if len(found) == rank else [None] * rank


def _pad(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    rank, pads = len(known_dims(x)), constant_array(node.inputs[1])
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(rank)
    if is_constant(x) or pads is None or axes is None:
        return "where it pads is computed"
    both = pads.reshape(2, -1)
    padded = {int(a) % rank for a, low, high in zip(axes.reshape(-1), *both, strict=True) if low or high}
    for axis, found in labels.all_of(x).items():
        if axis in padded:
            labels.fix(found, because_of(node, "it pads them"))
        else:
            labels.give(node.outputs[0], {axis: found})
    return None


def _resize(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    dims, result = known_dims(x), known_dims(node.outputs[0])
    named = ints_attribute(node, "axes") or tuple(range(len(dims)))
    at = {a % len(dims): position for position, a in enumerate(named)}
    scales, sizes = ([*node.inputs, None, None, None])[2:4]
    by_scale = scales is not None and known_dims(scales) != (0,)
    if is_constant(x) or constant_array(scales if by_scale else sizes) is None or _crops(node):
        return "its size is computed, or it crops"
    numbers = np.asarray(constant_array(scales if by_scale else sizes))
    output = str(node.outputs[0].name)
    for axis, found in labels.all_of(x).items():
        if dims[axis] != result[axis] or (by_scale and axis in at and numbers[at[axis]] != 1):
            labels.fix(found, because_of(node, "it resizes them"))
            continue
        if not by_scale and axis in at:
            labels.counts.append(
                Count(node=output, tensor=output, axis=axis, size=found.size, index=3, position=at[axis])
            )
        labels.give(node.outputs[0], {axis: found})
    return None


def _crops(node: ir.Node) -> bool:
    """Say whether what a Resize does along one axis may depend on others."""
    mode, policy = (
        node.attributes.get(name) for name in ("coordinate_transformation_mode", "keep_aspect_ratio_policy")
    )
    crops = mode is not None and mode.as_string() == "tf_crop_and_resize"
    return crops or (policy is not None and policy.as_string() != "stretch")


def _gather(node: ir.Node, labels: Labels) -> str | None:
    x, indices = node.inputs[0], node.inputs[1]
    if is_constant(x):
        return "it looks up a constant"
    axis, rank = int_attribute(node, "axis", 0) % len(known_dims(x)), len(known_dims(indices))
    for own, found in labels.all_of(x).items():
        if own == axis:
            labels.fix(found, because_of(node, "it picks some of them"))
        else:
            labels.give(node.outputs[0], {own if own < axis else own + rank - 1: found})
    return None


def _shape(node: ir.Node, labels: Labels) -> str | None:
    x = node.inputs[0]
    readers = [use.node for use in node.outputs[0].uses()]
    read: set[int] = set()
    for reader in readers:
        indices = constant_array(reader.inputs[1]) if reader.op_type == "Gather" and reader.domain == "" else None
        if indices is None:
            return "the shape is computed with"
        read |= {int(i) % len(known_dims(x)) for i in indices.reshape(-1)}
    if node.outputs[0].is_graph_output() or "start" in node.attributes or "end" in node.attributes:
        return "the shape is computed with"
    for axis, found in labels.all_of(x).items():
        if axis in read:
            labels.fix(found, because_of(node, "the shape is computed with"))
    return None


MOVES: Mapping[str, Rule] = {
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Pad": _pad,
    "Resize": _resize,
    "Gather": _gather,
    "Shape": _shape,
}
