"""Channels followed through a graph: every position along an axis has a label, and what must go together is tied.

A label is an integer. An axis of a tensor holds an array with one label per position; a tensor that repeats,
concatenates or cuts channels repeats, concatenates or cuts their labels. Tied labels are one channel. Axes without
labels cannot become shorter, and what is tied to them cannot either. Which operator does what is in `label_rules.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qcore.graph.rewrite import Skipped
from qcore.graph.shapes import dims_of
from qcore.graph.traverse import node_name

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """A number in a node that follows from how many positions an axis has left, divided by `divisor`.

    The node is the one that makes the tensor `node`. The number is its attribute `group`, or the value at `position`
    of its constant input `index`. The axis had `size` positions.
    """

    node: str
    tensor: str
    axis: int
    size: int
    divisor: int = 1
    index: int | None = None
    position: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer with constant weights: labels of its outputs, and of its inputs where they have labels of their own."""

    node: ir.Node
    out: Ints
    into: Ints | None


def because_of(node: ir.Node, reason: str) -> Skipped:
    """Return the reason why channels that reach `node` must stay."""
    return Skipped(node=node_name(node), op_type=node.op_type, reason=reason)


def known_dims(value: ir.Value | None) -> tuple[int | None, ...]:
    """Return the shape of `value`, whose rank is known."""
    dims = dims_of(value)
    assert dims is not None  # noqa: S101 - rules are asked only where ranks are known
    return dims


def is_constant(value: ir.Value | None) -> bool:
    """Say whether `value` is an initializer."""
    return value is not None and value.is_initializer()


@dataclass(slots=True)
class Labels:
    """All labels of a graph while they are being found; `fixed` says which may not go and because of what."""

    axes: dict[tuple[ir.Value, int], Ints] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    total: int = 0
    ties: list[tuple[Ints, Ints]] = field(default_factory=list)
    fixed: list[tuple[Ints, Skipped]] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    used: set[tuple[ir.Value, int]] = field(default_factory=set)

    def fresh(self, size: int) -> Ints:
        """Return `size` labels that nothing else has."""
        self.starts.append(self.total)
        self.total += size
        return np.arange(self.total - size, self.total)

    def of(self, value: ir.Value | None, axis: int) -> Ints | None:
        """Return the labels of `axis` of an activation, None where it has none."""
        return None if value is None else self.axes.get((value, axis))

    def of_constant(self, value: ir.Value, axis: int) -> Ints:
        """Return the labels of `axis` of an initializer, made now if this is its first reader."""
        self.used.add((value, axis))
        if (value, axis) not in self.axes:
            dims = dims_of(value)
            assert dims is not None and dims[axis] is not None  # noqa: S101, PT018 - an initializer
            self.axes[value, axis] = self.fresh(int(dims[axis] or 0))
        return self.axes[value, axis]

    def give(self, value: ir.Value, labels: Mapping[int, Ints | None]) -> None:
        """Let the axes of `value` have `labels`."""
        self.axes.update({(value, axis): found for axis, found in labels.items() if found is not None})

    def all_of(self, value: ir.Value | None) -> dict[int, Ints]:
        """Return the labels of every axis of an activation that has any."""
        dims = dims_of(value) or ()
        return {a: found for a in range(len(dims)) if (found := self.of(value, a)) is not None}

    def bind(self, value: ir.Value, axis: int, labels: Ints | None, because: Skipped) -> None:
        """Let `axis` of an initializer follow the `labels` of an activation; None: neither may become shorter."""
        self.used.add((value, axis))
        if labels is not None and (value, axis) not in self.axes:
            self.axes[value, axis] = labels
        else:
            self.tie(self.of_constant(value, axis), labels, because)

    def tie(self, a: Ints | None, b: Ints | None, because: Skipped) -> None:
        """Let each channel of `a` go together with that of `b`; where one has no labels the other may not go."""
        if a is not None and b is not None:
            self.ties.append((a, b))
        elif (left := a if b is None else b) is not None:
            self.fix(left, because)

    def fix(self, labels: Ints | None, because: Skipped) -> None:
        """Let the channels of `labels` stay."""
        if labels is not None and labels.size:
            self.fixed.append((labels, because))

    def fix_value(self, value: ir.Value | None, because: Skipped) -> None:
        """Let every axis of `value` stay as it is."""
        if value is None:
            return
        constant = value.is_initializer()
        for axis in range(len(dims_of(value) or ())):
            self.fix(self.of_constant(value, axis) if constant else self.of(value, axis), because)


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """What ties come to: `channel` numbers the channel of each label, `family` the channels that are tied in parallel.

    `reasons` says why a channel must stay, by its number.
    """

    channel: Ints
    family: Ints
    reasons: Mapping[int, Skipped]


def classes_of(labels: Labels) -> Classes:
    """Return the channels and families that follow from all ties."""
    pairs = [np.concatenate(side) for side in zip(*labels.ties, strict=True)] if labels.ties else [np.zeros(0, int)] * 2
    channel = _components(pairs[0], pairs[1], labels.total)
    space = np.searchsorted(np.array(labels.starts, int), np.arange(labels.total), side="right") - 1
    by_space = _components(space[pairs[0]], space[pairs[1]], len(labels.starts))
    reasons: dict[int, Skipped] = {}
    for found, because in labels.fixed:
        for c in np.unique(channel[found]):
            reasons.setdefault(int(c), because)
    return Classes(channel=channel, family=by_space[space], reasons=reasons)


def _components(a: Ints, b: Ints, n: int) -> Ints:
    if n == 0:
        return np.zeros(0, np.int64)
    found = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1]
    return np.asarray(found, np.int64)
