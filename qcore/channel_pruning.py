"""Structured pruning of a float model towards a budget: measured, cut, and made good without training.

How many channels each group keeps follows from trials: one group at a time loses some, and the output error on samples
says what that costs. Then all layers are fitted to the outputs of the float model, which is kept if held-out samples
agree. A model that should lose little wants fine-tuning behind this.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.errors import ModelError
from qcore.graph.channels import ChannelGroup, Channels, Mask, channel_groups
from qcore.graph.cost import model_macs
from qcore.graph.history import ENTRY_BYTES
from qcore.graph.io import serialize_model
from qcore.graph.rewrite import Resized, Rewrite, Skipped
from qcore.graph.traverse import node_name
from qcore.methods.prune_channels import (
    PruneChannelsStep,
    axes_to_measure,
    cost_terms,
    counts_to_try,
    importances,
    masks,
    without_channels,
)
from qcore.numerics.channels import ChannelStats
from qcore.numerics.error import output_error
from qcore.numerics.removal import (
    Counts,
    Curve,
    first_that_fits,
    given_back,
    latency_left,
    removal_path,
    trades_of,
)
from qcore.reconstruction import refit_layers
from qcore.recovery import Evidence, Tensors, channel_statistics, output_distance
from qcore.runtime import ort

Array = NDArray[np.float64]
TRIAL_SAMPLES = 64
"""What the loss of channels of one group is measured on, spread over the samples to fit."""
_TRIAL_POSITIONS = 16
_TRADES_AT_ONCE = 6
MOST_TRADES = 24
"""So many ways to spend the same budget are fitted and compared at most."""
TIMING_S = 1.0
_STEADY = 0.98
"""A latency that is to hold must be so much below the budget when it is measured: the next time it is not the same."""
QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What is pruned: the groups that may shrink, what their channels matter, and what layers see of them."""

    model: ir.Model
    channels: Channels
    groups: tuple[ChannelGroup, ...]
    scores: Mapping[str, Array]
    stats: Mapping[str, ChannelStats]

    def keep(self, counts: Sequence[int]) -> dict[str, Mask]:
        """Return the masks with which the groups keep `counts` channels."""
        return masks(self.channels, self.scores, {g.name: c for g, c in zip(self.groups, counts, strict=True)})

    def pruned(self, counts: Sequence[int]) -> ir.Model:
        """Return the model whose groups keep `counts` channels, means made up for."""
        return without_channels(self.model, self.channels, self.keep(counts), self.stats).model


def prune_channels(
    model: ir.Model,
    step: PruneChannelsStep,
    evidence: Evidence,
    scores: Mapping[str, Array] | None = None,
    *,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Rewrite:
    """Return `model` with fewer channels, within the budget of `step`; `changed` names the layers that make fewer.

    `resized` has multiply-accumulates, bytes, milliseconds (batch 1, one thread) and the channels of each such layer.

    Args:
        model: float model; batch norms folded or not.
        step: options.
        evidence: calibration data.
        scores: importance of each channel by group name, (size,), larger is more, e.g. from gradients; groups that are
            missing are ranked by the criterion of `step`.
        told: gets how many groups have been tried, and of how many.

    Raises:
        ModelError: the model is quantized, no channel may go, the budget cannot be reached, or scores do not fit.
    """
    _refuse_quantized(model)
    search = _search(model, step, evidence, scores or {})
    curves = _curves(search, step, evidence, told)
    budget = _budget(search, step, curves, evidence)
    counts = _within_budget(step, curves, budget)
    if step.reconstruct and evidence.held_out:
        counts = _traded(search, step, (curves, budget), evidence, counts)
    keep = search.keep(counts)
    pruned = search.pruned(counts)
    if step.reconstruct:
        pruned = _refitted(search, pruned, keep, step, evidence)
    fewer = _fewer(search.channels, keep)
    return Rewrite(
        model=pruned,
        changed=tuple(r.of for r in fewer),
        skipped=(*search.channels.skipped, *_left_alone(search, step)),
        resized=(*_costs(model, pruned, evidence), *fewer),
    )


def _refuse_quantized(model: ir.Model) -> None:
    found = next((n for n in model.graph if n.op_type in QUANTIZED), None)
    if found is not None:
        raise ModelError(
            f"{node_name(found)} ({found.op_type}) is quantized; allowed: float models; prune channels first, then "
            "quantize"
        )


def _search(model: ir.Model, step: PruneChannelsStep, evidence: Evidence, given: Mapping[str, Array]) -> _Search:
    if missing := set(step.exclude) - {node_name(n) for n in model.graph}:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    channels = channel_groups(model)
    stats = channel_statistics(model, evidence, axes_to_measure(channels))
    scores = importances(model, channels, step.criterion, stats)
    for name, array in given.items():
        if name not in scores or scores[name].shape != np.shape(array) or not np.isfinite(array).all():
            wanted = scores[name].shape if name in scores else f"one of {', '.join(scores)}"
            raise ModelError(
                f"scores of channel group {name!r} have shape {np.shape(array)}; allowed: {wanted}, finite"
            )
        scores[name] = np.asarray(array, np.float64)
    groups = tuple(
        g for g in channels.groups if len(counts_to_try(g, step)) > 1 and not set(g.producers) & set(step.exclude)
    )
    if not groups:
        raise ModelError(
            f"no channel can be removed: {len(channels.groups)} groups, none has more than multiple = {step.multiple} "
            f"and min_channels = {step.min_channels} channels and is not excluded; lower them"
        )
    return _Search(model=model, channels=channels, groups=groups, scores=scores, stats=stats)


def _curves(
    search: _Search, step: PruneChannelsStep, evidence: Evidence, told: Callable[[int, int], None]
) -> list[Curve]:
    """Return what it costs on samples, and saves in time if that is limited, that one group keeps fewer channels."""
    samples = evidence.some(evidence.fit, TRIAL_SAMPLES)
    reference = _outputs(search.model, samples)
    whole = tuple(g.size for g in search.groups)
    curves = []
    for position, group in enumerate(search.groups):
        told(position, len(search.groups))
        counts = counts_to_try(group, step)
        tried = [search.pruned((*whole[:position], c, *whole[position + 1 :])) for c in counts[1:]]
        errors = [_error(reference, _outputs(model, samples), evidence) for model in tried]
        times = latencies((search.model, *tried), evidence) if "latency" in step.budgets else ()
        shares = tuple(t / times[0] for t in times)
        curves.append(Curve(counts=counts, errors=(0.0, *errors), latencies=shares))
    return curves


def _outputs(model: ir.Model, samples: Sequence[Tensors]) -> dict[str, NDArray[np.generic]]:
    predict = ort.load_unfused(serialize_model(model)).predict
    parts = [predict(sample) for sample in samples]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _error(reference: Tensors, outputs: Tensors, evidence: Evidence) -> float:
    try:
        return output_error(reference, outputs, evidence.task)
    except ValueError as e:
        raise ModelError(f"outputs cannot be compared: {e}; check the model and the preprocessing") from e


@dataclass(frozen=True, kw_only=True, slots=True)
class _Budget:
    """What of each cost may be left, and functions that say what is: estimated, and with measured latencies."""

    shares: Mapping[str, float]
    left: Callable[[str, Counts], float]
    measured: Callable[[str, Counts], float]

    def over(self, counts: Counts) -> float:
        """Return the largest of all costs, each as a multiple of what may be left."""
        return max(self.left(what, counts) / share for what, share in self.shares.items())

    def near(self, counts: Counts) -> Callable[[Counts], float]:
        """Return `over` for what is not far from `counts`, where what is measured differs from what is estimated."""
        error = {what: self.measured(what, counts) - self.left(what, counts) for what in self.shares}
        return lambda c: max((self.left(what, c) + error[what]) / share for what, share in self.shares.items())

    def holds(self, counts: Counts) -> bool:
        """Say whether all budgets hold where latency is measured."""
        return all(self.measured(what, counts) <= share for what, share in self.shares.items())


def _budget(search: _Search, step: PruneChannelsStep, curves: Sequence[Curve], evidence: Evidence) -> _Budget:
    names = [g.name for g in search.groups]
    sizes = np.array([g.size for g in search.groups], np.float64)
    terms = {w: cost_terms(search.model, search.channels, names, w) for w in step.budgets if w != "latency"}
    full = {what: t.at(np.ones(len(sizes))) for what, t in terms.items()}

    def left(what: str, counts: Counts) -> float:
        if what == "latency":
            return latency_left(curves, counts)
        added = ENTRY_BYTES if what == "size" else 0  # what the file will say of its making counts too
        return (terms[what].at(np.array(counts) / sizes) + added) / full[what]

    def measured(what: str, counts: Counts) -> float:
        if what != "latency":
            return left(what, counts)
        before, after = latencies((search.model, search.pruned(counts)), evidence)
        return after / before / _STEADY

    return _Budget(shares=step.budgets, left=left, measured=measured)


def _within_budget(step: PruneChannelsStep, curves: Sequence[Curve], budget: _Budget) -> Counts:
    """Return how many channels each group keeps so that all budgets hold.

    What is removed next saves most of the budget that is missed most. Latencies are estimated from what single groups
    save, and measured where the way down is halved and where channels are given back; they are not monotone to the
    microsecond, so the found place holds the budget and the one before it did not.
    """
    path = removal_path(curves, budget.over)
    at = first_that_fits(path, budget.holds)
    if at is None:
        found = {what: budget.measured(what, path[-1]) for what in budget.shares}
        what = max(found, key=lambda w: found[w] / budget.shares[w])
        raise ModelError(
            f"the budget cannot be reached: with the fewest channels allowed {found[what]:.2f} of {what} is left, "
            f"wanted {budget.shares[what]}; raise {what}, or lower multiple = {step.multiple} and min_channels = "
            f"{step.min_channels}"
        )
    return given_back(curves, path[at], budget.holds)


def _traded(
    search: _Search,
    step: PruneChannelsStep,
    known: tuple[Sequence[Curve], _Budget],
    evidence: Evidence,
    counts: Counts,
) -> Counts:
    """Return `counts` after trades: one group keeps fewer channels, others more, and the fitted model comes closer.

    What single groups cost before layers are fitted says little of what they cost together after that (ResNet8 at
    0.6 of the multiply-accumulates and 0.75 of the latency: 0.076 of the outputs' power is lost, after trades 0.063).
    """
    curves, budget = known
    quick = step.model_copy(update={"samples": TRIAL_SAMPLES, "positions": _TRIAL_POSITIONS})
    judge = replace(evidence, task="none")

    def lost(tried: Counts) -> float:
        fitted = _refitted(search, search.pruned(tried), search.keep(tried), quick, evidence)
        return output_distance(fitted, search.model, judge)

    best, seen, left = lost(counts), {counts}, MOST_TRADES
    while left > 0:
        over = budget.near(counts)
        trades = [t for t in trades_of(curves, counts, over) if t not in seen][: min(left, _TRADES_AT_ONCE)]
        seen |= set(trades)
        left -= len(trades)
        found = sorted((lost(t), t) for t in trades)
        better = next(((error, t) for error, t in found if error < best and budget.holds(t)), None)
        if better is None and not trades:
            break
        best, counts = better or (best, counts)
    return counts


def latencies(models: Sequence[ir.Model], evidence: Evidence) -> tuple[float, ...]:
    """Return the median milliseconds of one inference of each model, batch 1 on one thread, measured in turns."""
    loaded = [ort.load(serialize_model(m), threads=1) for m in models]
    sample = evidence.fit[0]
    if loaded[0].fixed_batch is None:
        sample = {name: value[:1] for name, value in sample.items()}
    return tuple(latency.p50 for latency in ort.measure_latency(loaded, sample, budget_s=TIMING_S))


def _refitted(
    search: _Search, pruned: ir.Model, keep: Mapping[str, Mask], step: PruneChannelsStep, evidence: Evidence
) -> ir.Model:
    """Return `pruned` with fitted layers, or as it is where held-out samples do not agree or there are none."""
    if not evidence.held_out:
        return pruned
    rows = {a.tensor: search.channels.kept(a, keep) for a in search.channels.axes}
    samples = evidence.some(evidence.fit, step.samples)
    fitted = refit_layers(pruned, search.model, rows, samples, step.positions).model
    # By squared error: it is what was fitted, and KL punishes sure mistakes of a model that is not tuned yet.
    judge = replace(evidence, task="none")
    before, after = (output_distance(m, search.model, judge) for m in (pruned, fitted))
    return fitted if after < before else pruned


def _costs(before: ir.Model, after: ir.Model, evidence: Evidence) -> tuple[Resized, ...]:
    was, now = latencies((before, after), evidence)
    found = [("size_bytes", len(serialize_model(before)), len(serialize_model(after))), ("latency_ms", was, now)]
    with contextlib.suppress(ModelError):  # a symbolic size: a budget of size or latency does without
        found.insert(0, ("macs", model_macs(before), model_macs(after)))
    return tuple(Resized(what=what, of="", before=float(a), after=float(b)) for what, a, b in found)


def _fewer(channels: Channels, keep: Mapping[str, Mask]) -> tuple[Resized, ...]:
    """Return the layers that make fewer channels, in graph order."""
    made = [(la, axis) for la in channels.layers if (axis := channels.at(la.makes, la.axis)) is not None]
    left = [(la.node, axis.group.size, int(channels.kept(axis, keep).sum())) for la, axis in made]
    return tuple(
        Resized(what="channels", of=node, before=before, after=after) for node, before, after in left if after < before
    )


def _left_alone(search: _Search, step: PruneChannelsStep) -> list[Skipped]:
    """Return the layers whose channels could go and were not asked for: excluded, or too few already."""
    types = {la.node: la.op_type for la in search.channels.layers}
    planned = {g.name for g in search.groups}
    small = f"it has no more channels than multiple = {step.multiple} and min_channels = {step.min_channels} allow"
    return [
        Skipped(
            node=name,
            op_type=types[name],
            reason="excluded by the recipe" if set(g.producers) & set(step.exclude) else small,
        )
        for g in search.channels.groups
        if g.name not in planned
        for name in g.producers
    ]
