"""Structured pruning: whole channels are removed, so the file is smaller and faster on every runtime.

Which channels of a group go is decided by what the layers that read them would miss; what these miss on average is
added to their biases. How many go from which group, and what makes up for the rest, needs the model to be run: see
`channel_pruning.py`.

Source: He et al. 2017 (arXiv 1707.06168); Luo et al. 2017 (arXiv 1707.06342, ThiNet); Li et al. 2017 (arXiv 1608.08710)
for magnitudes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.graph.added_bias import added_bias, own_constant, replace_added_bias
from qcore.graph.channels import ChannelAxis, ChannelGroup, ChannelLayer, Channels, Mask
from qcore.graph.cost import layer_costs
from qcore.graph.edit import add_initializer, editable_copy
from qcore.graph.io import serialize_model
from qcore.graph.rewrite import Rewrite
from qcore.graph.slicing import remove_channels
from qcore.graph.traverse import constant_array, float_attribute, node_name
from qcore.numerics.channels import ChannelStats
from qcore.numerics.removal import CostTerms, channels_kept

Array = NDArray[np.float64]
Share = Annotated[float, Field(gt=0, lt=1)]
MOST_TRIALS = 8
"""At most so many numbers of channels of one group are tried."""


class PruneChannelsStep(Config):
    """Options of the recipe step `prune-channels`.

    `macs`, `size` and `latency` say what share of each to keep at most; without any, 0.6 of the multiply-accumulates
    and 0.75 of the latency.
    `criterion` ranks the channels of a group: by what the layers behind them see change (`response`), or by the norms
    of the filters that make them (`magnitude`). Channels are kept in multiples of `multiple` and at least
    `min_channels`; the outputs of the nodes in `exclude` keep theirs. `reconstruct` fits the weights of all layers to
    the outputs that the float model has at `positions` places of `samples` samples of the calibration split.
    """

    method: Literal["prune-channels"] = "prune-channels"
    macs: Share | None = None
    size: Share | None = None
    latency: Share | None = None
    criterion: Literal["response", "magnitude"] = "response"
    multiple: int = Field(default=4, ge=1)
    min_channels: int = Field(default=4, ge=1)
    exclude: tuple[str, ...] = ()
    reconstruct: bool = True
    samples: int = Field(default=512, ge=1)
    positions: int = Field(default=64, ge=1)

    @property
    def budgets(self) -> dict[str, float]:
        """What is limited, and the share of it to keep: of `macs`, `size` and `latency` those that are given."""
        given = {"macs": self.macs, "size": self.size, "latency": self.latency}
        return {what: share for what, share in given.items() if share is not None} or {"macs": 0.6, "latency": 0.75}


def axes_to_measure(channels: Channels) -> dict[str, int]:
    """Return what layers read that may lose channels, by tensor, and the axis of its channels."""
    return {la.reads: la.axis for la in channels.layers if channels.at(la.reads, la.axis) is not None}


def importances(
    model: ir.Model, channels: Channels, criterion: str, stats: Mapping[str, ChannelStats]
) -> dict[str, Array]:
    """Return for each group how much each of its channels matters, (size,), larger is more.

    `magnitude`: the root of the sum, over the layers that make it, of squared filter norms, each relative to that
    layer's mean. `response`: the variance that the channel adds to the outputs of the layers that read it (its own
    variance times the squared norm of the weights that read it), relative to what all channels of the layer add. Its
    mean does not count: biases make up for that. A group that nothing measured reads falls back to `magnitude`.

    Args:
        model: the float model.
        channels: its `channel_groups`.
        criterion: `response` or `magnitude`.
        stats: statistics of `axes_to_measure`; tensors that are missing do not count.
    """
    weights = editable_copy(model).graph.initializers
    made = {g.name: np.zeros(g.size) for g in channels.groups}
    read = {g.name: np.zeros(g.size) for g in channels.groups}
    for layer in channels.layers:
        array = constant_array(weights.get(layer.weight))
        out, into = channels.at(layer.weight, layer.out_axis), channels.at(layer.weight, layer.into_axis)
        if array is None:
            continue
        if out is not None:
            _add(made, channels, out, _relative(_power(array, layer.out_axis)))
        found = stats.get(layer.reads)
        if into is not None and found is not None and found.variance.size == into.group.size:
            _add(read, channels, into, _relative(_power(array, layer.into_axis) * found.variance))
    if criterion == "magnitude":
        return {name: np.sqrt(power) for name, power in made.items()}
    return {name: read[name] if read[name].any() else np.sqrt(made[name]) for name in read}


def counts_to_try(group: ChannelGroup, step: PruneChannelsStep) -> tuple[int, ...]:
    """Return numbers of channels that `group` could keep, from all down to the fewest allowed, at most `MOST_TRIALS`.

    Where a channel stands for several (those of a group of a grouped convolution), these are what is counted.
    """
    unit = max(1, step.multiple // group.width)
    least = max(1, -(-step.min_channels // group.width), int((~group.free).sum()))
    counts = [c for c in range(group.size - 1, least - 1, -1) if c % unit == 0]
    while len(counts) > MOST_TRIALS:  # rounder numbers, which kernels like
        unit *= 2
        counts = [c for c in counts if c % unit == 0]
    return (group.size, *counts)


def masks(channels: Channels, scores: Mapping[str, Array], counts: Mapping[str, int]) -> dict[str, Mask]:
    """Return which channels stay if each group named in `counts` keeps so many: those with the largest scores.

    An axis that would lose all its channels, as a part of a Split, keeps its best one too.
    """
    keep = {g.name: channels_kept(scores[g.name], g.free, counts[g.name]) for g in channels.groups if g.name in counts}
    for axis in channels.axes:
        if not channels.kept(axis, keep).any():
            group = channels.groups[int(axis.group[0])]
            keep[group.name][axis.channel[scores[group.name][axis.channel].argmax()]] = True
    return keep


def cost_terms(model: ir.Model, channels: Channels, names: Sequence[str], what: str) -> CostTerms:
    """Return how multiply-accumulates (`what` macs), or bytes of the file (size), fall as the groups `names` shrink.

    Raises:
        ModelError: as `layer_costs`.
    """
    constants = editable_copy(model).graph.initializers
    if what == "macs":
        costs = [(c.weight, float(c.macs)) for c in layer_costs(model)]
    else:
        cut = {a.tensor for a in channels.axes} & set(constants)
        costs = [(name, float(v.const_value.nbytes)) for name, v in constants.items() if v.const_value is not None]
        costs = [(name, amount) for name, amount in costs if name in cut]
        costs.append((None, len(serialize_model(model)) - sum(amount for _, amount in costs)))
    amount = np.array([a for _, a in costs])
    numbers = [[g.name for g in channels.groups].index(name) for name in names]
    whole, part = np.ones((len(costs), 2)), np.zeros((len(costs), 2, len(names)))
    for row, (name, _) in enumerate(costs):
        axes = [a for a in channels.axes if a.tensor == name and name in constants]
        for column, axis in enumerate(axes[:2]):  # outputs and inputs
            part[row, column] = [(axis.group == g).mean() for g in numbers]
            whole[row, column] = 1 - part[row, column].sum()
    return CostTerms(amount=amount, whole=whole, part=part)


def _power(weights: NDArray[np.generic], axis: int) -> Array:
    w = np.moveaxis(np.asarray(weights, np.float64), axis, 0)
    return np.asarray(np.square(w.reshape(len(w), -1)).sum(axis=1))


def _relative(power: Array) -> Array:
    return power / mean if (mean := float(power.mean())) > 0 else power


def _add(scores: dict[str, Array], channels: Channels, axis: ChannelAxis, values: Array) -> None:
    for number in np.unique(axis.group[axis.group >= 0]):
        here = axis.group == number
        np.add.at(scores[channels.groups[number].name], axis.channel[here], values[here])


def without_channels(
    model: ir.Model, channels: Channels, keep: Mapping[str, Mask], stats: Mapping[str, ChannelStats]
) -> Rewrite:
    """Return `model` without the channels that `keep` leaves out, whose means go into the biases of their readers.

    A MatMul has the bias that an Add behind it holds; one without a bias, and a transposed convolution, miss the means.
    Args and errors are those of `remove_channels`; `stats` are those of `axes_to_measure`.
    """
    pruned = remove_channels(model, channels, keep)
    weights = editable_copy(model).graph.initializers
    nodes = {str(n.outputs[0].name): n for n in pruned.model.graph}
    for layer in channels.layers:
        axis, found = channels.at(layer.reads, layer.axis), stats.get(layer.reads)
        weight = constant_array(weights.get(layer.weight))
        if axis is None or found is None or weight is None or layer.op_type == "ConvTranspose":
            continue
        gone = ~channels.kept(axis, keep)
        if gone.any() and found.mean.size == gone.size:
            missing = _matrix(weight, layer)[:, gone] @ found.mean[gone]
            out = channels.at(layer.makes, layer.axis)
            left = missing if out is None else missing[channels.kept(out, keep)]
            add_to_bias(pruned.model.graph, nodes[layer.makes], left)
    return pruned


def _matrix(weight: NDArray[np.generic], layer: ChannelLayer) -> Array:
    """Return the weights as (outputs, inputs), summed over taps."""
    w = np.moveaxis(np.asarray(weight, np.float64), (layer.out_axis, layer.into_axis), (0, 1))
    return np.asarray(w.reshape(*w.shape[:2], -1).sum(axis=2))


def add_to_bias(graph: ir.Graph, node: ir.Node, change: Array) -> bool:
    """Add `change` (outputs,) to the bias of the layer `node`; return whether it has one or can have one."""
    if float_attribute(node, "alpha", 1.0) != 1.0 or float_attribute(node, "beta", 1.0) != 1.0:
        return False
    if node.op_type == "MatMul":
        found = added_bias(node, change.size)
        if isinstance(found, str):
            return False
        own_constant(graph, found.node, found.index)
        for value, array in replace_added_bias(found, found.array.reshape(-1) + change).items():
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
        return True
    present = node.inputs[2] if len(node.inputs) > 2 else None
    old = constant_array(present)
    if present is not None and (old is None or old.size != change.size):
        return False
    if old is None:
        weight = constant_array(node.inputs[1])
        dtype = np.float32 if weight is None else weight.dtype
        node.resize_inputs(3)
        node.replace_input_with(2, add_initializer(graph, f"{node_name(node)}.bias", change.astype(dtype)))
        return True
    own_constant(graph, node, 2)
    own = node.inputs[2]
    assert own is not None  # noqa: S101 - looked at above
    own.const_value = ir.Tensor((old + change.reshape(old.shape)).astype(old.dtype), name=own.name)
    return True
