"""Removing channels for real: constants are cut, numbers in nodes that count channels are lowered, shapes follow."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcore.errors import ModelError
from qcore.graph.channels import OVERRIDABLE_SINCE, Channels, Mask
from qcore.graph.edit import add_initializer, editable_copy
from qcore.graph.labels import Count
from qcore.graph.rewrite import Rewrite
from qcore.graph.traverse import constant_array, node_name

Place = tuple[str, int]
"""The name of a tensor and an axis of it."""


def remove_channels(model: ir.Model, channels: Channels, keep: Mapping[str, Mask]) -> Rewrite:
    """Return `model` without the channels that `keep` leaves out; `changed` names the nodes that lose numbers.

    Names stay as they are. Every other constant, node and attribute stays too.

    Args:
        model: float model.
        channels: `channel_groups` of this model.
        keep: by group name which of its channels stay, (size,) bool. Groups that are not named stay whole.

    Raises:
        ModelError: a group is not there, a mask has another size or leaves out a channel that must stay, or an axis
            would lose all its channels.
    """
    _check(channels, keep)
    out = copy_with_inputs(model)
    left = {(a.tensor, a.axis): kept for a in channels.axes if not (kept := channels.kept(a, keep)).all()}
    empty = next((name for (name, _), kept in left.items() if not kept.any()), None)
    if empty is not None:
        raise ModelError(f"tensor {empty} would lose all its channels; allowed: at least one left; keep more")
    values = {v.name: v for v in _values(out.graph)}
    touched: set[ir.Value] = set()
    for (name, axis), kept in left.items():
        value = values[name]
        if value.is_initializer():
            _cut(value, axis, kept)
            touched.add(value)
        elif value.shape is not None:
            dims = list(value.shape.dims)
            dims[axis] = int(kept.sum())
            value.shape = ir.Shape(dims)
    recounted = _recount(out, channels, left)
    changed = [
        node_name(n) for n in out.graph if n in recounted or any(v in touched for v in n.inputs if v is not None)
    ]
    return Rewrite(model=out, changed=tuple(changed))


def copy_with_inputs(model: ir.Model) -> ir.Model:
    """Return `editable_copy` of `model` in which initializers that a caller may replace are still inputs."""
    out = editable_copy(model)
    if model.ir_version >= OVERRIDABLE_SINCE:
        order = [str(v.name) for v in model.graph.inputs]
        known = {v.name: v for v in out.graph.inputs} | {
            n: out.graph.initializers[n] for n in order if n in out.graph.initializers
        }
        out.graph.inputs[:] = [known[n] for n in order]
    return out


def _check(channels: Channels, keep: Mapping[str, Mask]) -> None:
    groups = {group.name: group for group in channels.groups}
    for name, mask in keep.items():
        if name not in groups:
            raise ModelError(f"channel group {name!r} is not there; allowed: {', '.join(groups) or 'none'}")
        if mask.shape != (groups[name].size,):
            raise ModelError(
                f"channel group {name!r} has {groups[name].size} channels, the mask {mask.shape}; ask again"
            )
        if (~mask & ~groups[name].free).any():
            raise ModelError(f"channel group {name!r}: a channel that must stay would go; allowed: those in `free`")


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]


def _cut(value: ir.Value, axis: int, kept: Mask) -> None:
    array = constant_array(value)
    assert array is not None  # noqa: S101 - an initializer
    smaller = np.ascontiguousarray(np.compress(kept, array, axis=axis))
    value.const_value = ir.Tensor(smaller, name=value.name)
    value.shape = ir.Shape(smaller.shape)


def _recount(out: ir.Model, channels: Channels, left: Mapping[Place, Mask]) -> set[ir.Node]:
    """Write the numbers of channels that are left into nodes that say them; return the nodes."""
    makers = {str(n.outputs[0].name): n for n in out.graph}
    sizes = {(c.tensor, c.axis): c.size for c in channels.counts} | {p: int(kept.sum()) for p, kept in left.items()}
    by_node: dict[str, list[Count]] = {}
    for count in channels.counts:
        by_node.setdefault(count.node, []).append(count)
    done: set[ir.Node] = set()
    for name, counts in by_node.items():
        if not any((c.tensor, c.axis) in left for c in counts):
            continue
        numbers = {c.position: sizes[c.tensor, c.axis] // c.divisor for c in counts}
        if counts[0].index is None:
            makers[name].attributes["group"] = ir.AttrInt64("group", numbers[0])
        else:
            _write(out.graph, makers[name], counts[0].index, numbers)
        done.add(makers[name])
    return done


def _write(graph: ir.Graph, node: ir.Node, index: int, numbers: Mapping[int, int]) -> None:
    """Give `node` a constant input `index` of its own with `numbers` at their positions."""
    present = node.inputs[index] if len(node.inputs) > index else None
    old = constant_array(present)
    new = np.zeros(len(numbers), np.int64) if old is None else old.reshape(-1).astype(np.int64)
    for position, number in numbers.items():
        new[position] = number
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, add_initializer(graph, f"{node_name(node)}.channels", new))
    node.attributes.pop("num_outputs", None)  # of a Split, which may not say both
    if present is not None and not present.uses() and not (present.is_graph_input() or present.is_graph_output()):
        del graph.initializers[str(present.name)]
