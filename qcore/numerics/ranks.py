"""What a chain of factors costs, and which ranks a model can afford: counting and choosing, without a graph.

A layer and its candidates are numbers here: what they cost and how much the model's output suffers. One threshold on
that score for all layers decides; bisection finds the lowest one that holds the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np
from scipy.optimize import isotonic_regression

from qcore.numerics.factors import Array, Kind, full_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Shape of a layer: `weight` (outputs, inputs, height, width), and the places that it reads and that it writes.

    `into` and `out` are (rows, columns) of the feature maps; of a matrix product the number of products, and 1.
    """

    weight: tuple[int, int, int, int]
    into: tuple[int, int]
    out: tuple[int, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layer for one sample."""
        return math.prod(self.weight) * math.prod(self.out)

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return math.prod(self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankScore:
    """One way to write a layer as a chain, what it costs, and what it does.

    `share` is the error of the layer's own outputs as a share of their power. `score` is how far the outputs of the
    model move with only this layer written so (`output_error`), monotone over the candidates of a layer.
    """

    kind: Kind
    ranks: tuple[int, ...]
    macs: int
    parameters: int
    share: float
    score: float = math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRanks:
    """A layer, what it costs as it is, its candidates by rising cost, and the chosen one; None leaves it alone."""

    node: str
    op_type: str
    macs: int
    parameters: int
    scores: tuple[RankScore, ...]
    chosen: int | None = None

    @property
    def choice(self) -> RankScore | None:
        """The chosen candidate."""
        return None if self.chosen is None else self.scores[self.chosen]


def padded(channels: int, multiple: int) -> int:
    """Return `channels` rounded up to a multiple of `multiple`."""
    return -(-channels // multiple) * multiple


def layer_macs(shape: LayerShape, multiple: int = 1) -> int:
    """Return the multiply-accumulates of a layer whose outputs are padded to `multiple`: what vector kernels do."""
    return shape.macs // shape.weight[0] * padded(shape.weight[0], multiple)


def chain_macs(kind: Kind, ranks: tuple[int, ...], shape: LayerShape, multiple: int = 1) -> int:
    """Return the multiply-accumulates of the chain for one sample, channels behind every factor padded to `multiple`.

    Args:
        kind: which chain.
        ranks: as in `factors.factorize`.
        shape: of the layer.
        multiple: 1 counts what the file says.
    """
    outputs, inputs, height, width = shape.weight
    outputs, first, last = padded(outputs, multiple), padded(ranks[0], multiple), padded(ranks[-1], multiple)
    read, written, between = math.prod(shape.into), math.prod(shape.out), shape.out[0] * shape.into[1]
    expand = written * outputs * last
    match kind:
        case "svd":
            return written * last * inputs * height * width + expand
        case "spatial":
            return between * last * inputs * height + expand * width
        case "tucker2":
            return read * first * inputs + written * last * first * height * width + expand
        case "cp":
            return read * last * inputs + between * last * height + written * last * width + expand
        case "depthwise":
            return read * last * inputs + written * last * height * width + expand
        case _:
            assert_never(kind)


def chain_parameters(kind: Kind, ranks: tuple[int, ...], shape: LayerShape) -> int:
    """Return the number of weights of the chain: what it multiplies at a single place."""
    return chain_macs(kind, ranks, replace(shape, into=(1, 1), out=(1, 1)))


def kinds_for(shape: LayerShape) -> tuple[Kind, ...]:
    """Return the chains that differ for a layer of `shape`: of a 1 x 1 kernel only one, of a flat one no separable."""
    height, width = shape.weight[2:]
    if height == width == 1:
        return ("svd",)
    if height == 1 or width == 1:
        return ("svd", "tucker2", "depthwise")
    return ("svd", "spatial", "tucker2", "cp", "depthwise")


def ranks_within(
    kind: Kind, shape: LayerShape, macs: float, multiple: int, tails: tuple[Array, Array]
) -> tuple[int, ...] | None:
    """Return the largest ranks, multiples of `multiple`, whose chain needs at most `macs`; None where none does.

    Args:
        kind: which chain.
        shape: of the layer.
        macs: most multiply-accumulates.
        multiple: of every rank.
        tails: of the channel modes (inputs, outputs), the power that is lost with 0, 1 ... components; their sum bounds
            the error of `tucker2` (De Lathauwer et al. 2000, property 10), so it chooses between its two ranks.
    """
    most = full_ranks(kind, shape.weight)
    if kind != "tucker2":
        rank = int(macs / chain_macs(kind, (1,), shape)) // multiple * multiple  # the cost is linear in the rank
        rank = min(rank, most[0] // multiple * multiple)
        return (rank,) if rank else None
    taps = shape.weight[2] * shape.weight[3]  # a core cannot use more channels than the others times taps
    pairs = [
        (tails[0][first] + tails[1][last], (first, last))
        for first in range(multiple, most[0] + 1, multiple)
        for last in range(multiple, most[1] + 1, multiple)
        if chain_macs(kind, (first, last), shape) <= macs and max(first, last) <= min(first, last) * taps
    ]
    return min(pairs)[1] if pairs else None


def monotone(scores: Sequence[RankScore]) -> tuple[RankScore, ...]:
    """Return `scores` by rising MACs, with the nearest scores that never rise with them (least squares).

    Few samples measure with noise, and more ranks cannot be worse.
    """
    ordered = sorted(scores, key=lambda s: (s.macs, s.parameters, s.share))
    if not ordered:
        return ()
    fitted = isotonic_regression(np.array([s.score for s in ordered]), increasing=False).x
    return tuple(replace(s, score=float(f)) for s, f in zip(ordered, fitted, strict=True))


def choose(layers: Sequence[LayerRanks], budget: float, *, size: bool = False) -> tuple[LayerRanks, ...] | None:
    """Return `layers` with candidates chosen by the lowest threshold whose total cost is at most `budget`.

    At a threshold every layer takes its cheapest candidate with a score up to it, or stays as it is. What is left of
    the budget then goes to the layers with the largest scores. None where the cheapest of all is too expensive.

    Args:
        layers: with scores; one without candidates counts as it is.
        budget: multiply-accumulates, or weights if `size`.
        size: what is counted.
    """
    thresholds = sorted({s.score for la in layers for s in la.scores})

    def at(threshold: float) -> tuple[LayerRanks, ...]:
        return tuple(_cheapest(la, threshold, size=size) for la in layers)

    def total(chosen: Sequence[LayerRanks]) -> int:
        return sum(cost(la, size=size) for la in chosen)

    if not thresholds or total(at(thresholds[-1])) > budget:
        return tuple(layers) if total(layers) <= budget else None
    low, high = -1, len(thresholds) - 1  # at `high` the budget holds, below `low` it does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if total(at(thresholds[middle])) <= budget else (middle, high)
    return _spent(at(thresholds[high]), budget, size=size)


def cost(layer: LayerRanks, *, size: bool) -> int:
    """Return what `layer` costs with its choice: MACs, or weights if `size`."""
    chosen = layer.choice or layer
    return chosen.parameters if size else chosen.macs


def _cheapest(layer: LayerRanks, threshold: float, *, size: bool) -> LayerRanks:
    within = [replace(layer, chosen=k) for k, s in enumerate(layer.scores) if s.score <= threshold]
    return min([*within, replace(layer, chosen=None)], key=lambda la: cost(la, size=size))


def _spent(layers: tuple[LayerRanks, ...], budget: float, *, size: bool) -> tuple[LayerRanks, ...]:
    """Return `layers` after better candidates were taken where the budget has room, worst layers first."""
    chosen, left = list(layers), budget - sum(cost(la, size=size) for la in layers)
    for k in sorted(range(len(chosen)), key=lambda k: -_score(chosen[k])):
        now = chosen[k]
        options = [replace(now, chosen=j) for j in (None, *range(len(now.scores)))]
        fits = [o for o in options if cost(o, size=size) - cost(now, size=size) <= left]
        best = min(fits, key=lambda o: (_score(o), cost(o, size=size)))
        if _score(best) < _score(now):
            left -= cost(best, size=size) - cost(now, size=size)
            chosen[k] = best
    return tuple(chosen)


def _score(layer: LayerRanks) -> float:
    return 0.0 if layer.choice is None else layer.choice.score
