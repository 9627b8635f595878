"""Cross-layer equalization: the same function, with channels that are alike in magnitude.

One scale per tensor serves a layer badly when one of its channels is a hundred times another. Channels are rescaled
between layers (`graph/sets.py` says where that is free) such that quantization adds least noise
(`numerics/balance.py`).

A Clip (ReLU6) cuts at one bound for all channels, so it is not homogeneous. With `clips: keep`, channels that reach the
bound share one scale, with which the bound moves, and the others are scaled up to the bound at most: on the
calibration data the function stays what it was. With `clips: lift` the bound is dropped, and what it cut is not any
more.

Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.1; Meller et al. 2019 (arXiv 1902.01917).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.config import Config
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, remove_in_favour_of
from qcore.graph.rewrite import Rewrite
from qcore.graph.sets import SetLayer, Sets, clip_bound, equalization_sets, stored_weight
from qcore.graph.traverse import constant_array, node_name
from qcore.numerics.balance import LayerTerm, TensorTerm, balance
from qcore.numerics.channels import ChannelStats
from qcore.target import TargetProfile

Array = NDArray[np.float64]
MARGIN = 1.25  # other data go further than the calibration data did


class EqualizeStep(Config):
    """Options of the recipe step `equalize`: what becomes of the bound of a Clip between equalized layers."""

    method: Literal["equalize"] = "equalize"
    clips: Literal["keep", "lift"] = "keep"


def equalize(
    model: ir.Model, step: EqualizeStep, target: TargetProfile, channels: Mapping[str, ChannelStats]
) -> Rewrite:
    """Return `model` with the channels of its layers evened out for `target`; `changed` names the layers.

    Args:
        model: float model, batch norms folded.
        step: options.
        target: says whether weights have one scale or one per channel.
        channels: per tensor the statistics of its channels. Tensors that are missing are not counted; a set behind a
            Clip without statistics is left alone.
    """
    out = editable_copy(model)
    sets = equalization_sets(out.graph)
    clips = [n for n in out.graph if n.op_type == "Clip" and n.domain == "" and clip_bound(n) is not None]
    reached, unknown = _reached(clips, sets, channels)
    free = tuple(root for root in sets.free if root not in unknown)
    lift = step.clips == "lift"
    index, sizes = {root: k for k, root in enumerate(free)}, {la.out: la.outputs for la in sets.layers}
    cost = _importance(out.graph, sets)
    layers = _layer_terms(sets, index, cost, channels, target.weights_per_channel)
    tensors = _tensor_terms(sets, index, cost, channels)
    bounds = {} if lift else {index[root]: share for root, share in reached.items() if root in index}
    found = balance([sizes[root] for root in free], layers, tensors, bounds) if free else []
    scales = dict(zip(free, found, strict=True))
    for clip in clips:
        root = sets.root[clip.outputs[0]]
        if root in scales:
            _move_bound(out.graph, clip, None if lift else reached[root], scales[root])
    changed = [node_name(la.node) for la in sets.layers if _scale_layer(out.graph, la, scales)]
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=sets.skipped)


def _reached(
    clips: list[ir.Node], sets: Sets, channels: Mapping[str, ChannelStats]
) -> tuple[dict[ir.Value, Array], set[ir.Value]]:
    """Return how far the channels of each set behind a Clip go, and the sets of which that is not known."""
    reached: dict[ir.Value, Array] = {}
    unknown: set[ir.Value] = set()
    for clip in clips:
        root, bound, stats = sets.root[clip.outputs[0]], clip_bound(clip), channels.get(str(clip.outputs[0].name))
        if stats is None or bound is None or root in reached:
            unknown.add(root)
        else:
            reached[root] = np.clip(MARGIN * stats.high / bound, 0.0, 1.0)
    return reached, unknown


def _layer_terms(
    sets: Sets,
    index: Mapping[ir.Value, int],
    cost: Mapping[ir.Value, Array],
    channels: Mapping[str, ChannelStats],
    per_channel: bool,
) -> list[LayerTerm]:
    terms = []
    for la in sets.layers:
        groups, outputs, inputs, taps = la.weight.shape
        stats = channels.get(str(la.node.inputs[0].name)) if la.node.inputs[0] is not None else None
        known = stats is not None and stats.mean.size == groups * inputs
        power = stats.mean**2 + stats.variance if stats is not None and known else np.ones(groups * inputs)
        terms.append(
            LayerTerm(
                peak=np.abs(la.weight).max(axis=3),
                power=power.reshape(groups, inputs) * taps,
                importance=_even(cost.get(la.out), la.outputs).reshape(groups, outputs),
                into=index.get(la.into),
                out=index.get(la.out),
                per_channel=per_channel,
            )
        )
    return terms


def _tensor_terms(
    sets: Sets, index: Mapping[ir.Value, int], cost: Mapping[ir.Value, Array], channels: Mapping[str, ChannelStats]
) -> list[TensorTerm]:
    sizes = {la.out: la.outputs for la in sets.layers}
    return [
        TensorTerm(
            peak=np.maximum(np.abs(stats.low), np.abs(stats.high)),
            importance=_even(cost.get(root), sizes[root]),
            scales=index[root],
        )
        for value, root in sets.root.items()
        if root in index and (stats := channels.get(str(value.name))) is not None and stats.mean.size == sizes[root]
    ]


def _importance(graph: ir.Graph, sets: Sets) -> dict[ir.Value, Array]:
    """Return what noise in each channel of a set costs: noise power followed back from the outputs through the layers.

    Only the differences between the channels of a set count, so means are kept at 1.
    """
    cost: dict[ir.Value, Array] = {}
    by_node = {la.node: la for la in sets.layers}
    for node in reversed(graph):
        la = by_node.get(node)
        if la is None:
            continue
        groups, outputs, inputs, _ = la.weight.shape
        out = _even(cost.get(la.out), la.outputs).reshape(groups, outputs)
        back = _even(np.einsum("goit,go->gi", la.weight**2, out).reshape(-1), groups * inputs)
        known = cost.get(la.into)
        cost[la.into] = back if known is None or known.size != back.size else known + back
    return cost


def _even(cost: Array | None, size: int) -> Array:
    """Return `cost` with mean 1, or ones where it is not known."""
    if cost is None or cost.size != size or not cost.mean() > 0:
        return np.ones(size)
    return np.asarray(cost / cost.mean())


def _move_bound(graph: ir.Graph, clip: ir.Node, reached: Array | None, scales: Array) -> None:
    """Let `clip` cut where its scaled channels are cut, or nowhere."""
    bound = clip_bound(clip)
    if reached is None or bound is None:
        relu = ir.node("Relu", [clip.inputs[0]], name=clip.name)
        relu.outputs[0].type, relu.outputs[0].shape = clip.outputs[0].type, clip.outputs[0].shape
        graph.insert_before(clip, relu)
        remove_in_favour_of(clip, relu.outputs[0])
    else:
        moved = np.array((reached * bound / scales).max(), np.float32)
        clip.replace_input_with(2, add_initializer(graph, f"{node_name(clip)}.bound", moved))


def _scale_layer(graph: ir.Graph, la: SetLayer, scales: Mapping[ir.Value, Array]) -> bool:
    """Divide the outputs of `la` by the scales behind it, multiply its inputs by those before it; say if it changed."""
    if la.out not in scales and la.into not in scales:
        return False
    node, name = la.node, node_name(la.node)
    groups, outputs, inputs, _ = la.weight.shape
    out = scales.get(la.out, np.ones(groups * outputs))
    into = scales.get(la.into, np.ones(groups * inputs))
    matrix = la.weight / out.reshape(groups, outputs, 1, 1) * into.reshape(groups, 1, inputs, 1)
    node.replace_input_with(1, add_initializer(graph, f"{name}.weight_equalized", stored_weight(node, matrix)))
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        moved = (bias.astype(np.float64).reshape(-1) / out).astype(np.float32)
        node.replace_input_with(2, add_initializer(graph, f"{name}.bias_equalized", moved))
    return True
