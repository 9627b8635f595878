"""Channel groups: which channels of which tensors must be removed together, and which must stay.

A residual sum ties the channels of all it adds, a depthwise convolution those of its input and output, a flattened
feature map those of a block of matrix rows. `labels.py` and `label_rules.py` follow them; this file says what comes of
it. How channels are really removed is in `slicing.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.label_rules import follow
from qcore.graph.labels import Classes, Count, Ints, Labels, because_of, classes_of, known_dims
from qcore.graph.rewrite import Skipped
from qcore.graph.shapes import shaped_copy
from qcore.graph.traverse import int_attribute, node_name

Mask = NDArray[np.bool_]
OVERRIDABLE_SINCE = 4  # IR version; before it every initializer had to be an input


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelGroup:
    """Channels that layers make and read in parallel, numbered from 0 to `size`.

    `free` (size,) bool says which may go. `width` is how many positions of a tensor one of them is at least: 1, or the
    channels of a group of a grouped convolution. `producers` and `consumers` name the layers that make and read them.
    """

    name: str
    size: int
    free: Mask
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelAxis:
    """Where the channels of an axis belong: for each position the number of a group (-1: none) and of its channel."""

    tensor: str
    axis: int
    group: Ints
    channel: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelLayer:
    """A layer with constant weights and no groups: what it reads and makes, and the axes of its channels there.

    `out_axis` and `into_axis` are those of the weights; `axis` is that of what it reads and makes.
    """

    node: str
    op_type: str
    weight: str
    out_axis: int
    into_axis: int
    reads: str
    makes: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """All channel groups of a model with a free channel, the axes they are on, and numbers in nodes that count them.

    `layers` are all that make or read channels; `skipped` names those none of whose output channels may go, and why.
    """

    groups: tuple[ChannelGroup, ...]
    axes: tuple[ChannelAxis, ...]
    counts: tuple[Count, ...]
    layers: tuple[ChannelLayer, ...]
    skipped: tuple[Skipped, ...]

    def at(self, tensor: str, axis: int) -> ChannelAxis | None:
        """Return where the channels along `axis` of `tensor` belong, None if to no group."""
        return next((a for a in self.axes if a.tensor == tensor and a.axis == axis), None)

    def kept(self, axis: ChannelAxis, keep: Mapping[str, Mask]) -> Mask:
        """Return which positions of `axis` are left; groups that `keep` does not name keep all."""
        left = np.ones(axis.group.size, bool)
        for number, group in enumerate(self.groups):
            if group.name in keep:
                here = axis.group == number
                left[here] = keep[group.name][axis.channel[here]]
        return left


def channel_groups(model: ir.Model) -> Channels:
    """Return the channel groups of the float `model`; batch norms may be folded or not.

    A channel that reaches a graph output, or an operator through which channels are not followed, stays.
    """
    copy = shaped_copy(model)
    labels = Labels()
    _fix_overridable(model, copy, labels)
    for node in copy.graph:
        follow(node, labels)
    _fix_captured(copy, labels)
    for output in copy.graph.outputs:
        owner = output.producer()
        said = Skipped(node=str(output.name), op_type=owner.op_type if owner else "", reason="it is a graph output")
        labels.fix_value(output, said)
    return _assembled(labels, classes_of(labels))


def _fix_overridable(model: ir.Model, copy: ir.Model, labels: Labels) -> None:
    """Let initializers stay whose numbers a caller may replace."""
    if model.ir_version < OVERRIDABLE_SINCE:
        return
    for value in model.graph.inputs:
        if value.name is not None and value.name in copy.graph.initializers:
            said = Skipped(node=value.name, op_type="", reason="a constant of it is also a graph input")
            labels.fix_value(copy.graph.initializers[value.name], said)


def _fix_captured(copy: ir.Model, labels: Labels) -> None:
    """Let what subgraphs read from outside stay."""
    for graph in copy.graph.subgraphs():
        for node in graph:
            for value in node.inputs:
                labels.fix_value(value, because_of(node, "it is in a subgraph"))
        for output in graph.outputs:
            said = Skipped(node=str(output.name), op_type="", reason="it is the output of a subgraph")
            labels.fix_value(output, said)


def _assembled(labels: Labels, classes: Classes) -> Channels:
    """Return the groups of all families of channels that a layer makes."""
    stays = np.isin(classes.channel, np.array(list(classes.reasons), np.int64))
    families: dict[int, list[str]] = {}
    skipped: list[Skipped] = []
    for layer in labels.layers:
        for family in np.unique(classes.family[layer.out]):
            families.setdefault(int(family), []).append(node_name(layer.node))
        if stays[layer.out].all():
            because = classes.reasons[int(classes.channel[layer.out[0]])]
            skipped.append(
                Skipped(
                    node=node_name(layer.node),
                    op_type=layer.node.op_type,
                    reason=f"its outputs reach {because.node}: {because.reason}",
                )
            )
    number = np.full(classes.channel.size, -1)
    place = np.zeros(classes.channel.size, np.int64)
    groups: list[ChannelGroup] = []
    for family, producers in families.items():
        members = np.flatnonzero(classes.family == family)
        if stays[members].all():
            continue
        order, first, inverse = np.unique(classes.channel[members], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # channels in the order in which they were first met
        number[members], place[members] = len(groups), rank[inverse]
        free = np.ones(order.size, bool)
        free[place[members][stays[members]]] = False
        found = _group(labels, producers, number == len(groups), place, free)
        taken = any(group.name == found.name for group in groups)  # ONNX lets nodes share a name
        groups.append(replace(found, name=f"{found.name}#{len(groups)}") if taken else found)
    axes = tuple(
        ChannelAxis(tensor=str(value.name), axis=axis, group=number[found], channel=place[found])
        for (value, axis), found in labels.axes.items()
        if (number[found] >= 0).any()
    )
    return Channels(
        groups=tuple(groups),
        axes=axes,
        counts=tuple(labels.counts),
        layers=tuple(_layer(la.node) for la in labels.layers),
        skipped=tuple(skipped),
    )


def _layer(node: ir.Node) -> ChannelLayer:
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None and weight is not None  # noqa: S101, PT018 - a layer
    flipped = node.op_type == "Conv" or bool(int_attribute(node, "transB", 0))
    return ChannelLayer(
        node=node_name(node),
        op_type=node.op_type,
        weight=str(weight.name),
        out_axis=0 if flipped else 1,
        into_axis=1 if flipped else 0,
        reads=str(x.name),
        makes=str(node.outputs[0].name),
        axis=1 if node.op_type in ("Conv", "ConvTranspose") else len(known_dims(x)) - 1,
    )


def _group(labels: Labels, producers: list[str], mine: Mask, place: Ints, free: Mask) -> ChannelGroup:
    made = [layer.out[mine[layer.out]] for layer in labels.layers if mine[layer.out].any()]
    return ChannelGroup(
        name=producers[0],
        size=free.size,
        free=free,
        width=min(int(np.bincount(place[out])[np.unique(place[out])].min()) for out in made),
        producers=tuple(dict.fromkeys(producers)),
        consumers=tuple(
            dict.fromkeys(node_name(la.node) for la in labels.layers if la.into is not None and mine[la.into].any())
        ),
    )
