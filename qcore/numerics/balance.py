"""Channel scales that make a chain of layers lose least to quantization: a convex problem in their logarithms.

Dividing channel i of an activation by `s_i = exp(t_i)` divides the layers that make it and multiplies the layers that
read it. One step for a whole tensor, `step = max / levels`, adds noise of power `step^2 / 12` to every weight or value.
What that costs is a sum of products of powers of the s (a posynomial), so its logarithm is convex in t, and so is the
sum of these logarithms over all layers and tensors, which is minimized. Every layer and tensor counts relative to
itself: none is traded away because an estimate of how errors travel favours another.

Source: noise model of Krishnamoorthi 2018 (arXiv 1806.08342) section 3; Nagel et al. 2019 (arXiv 1906.04721) eq. 11 is
the case of two layers without activation noise; geometric programming: Boyd et al. 2007, Optim. Eng. 8. The maximum is
a p-norm here, to have derivatives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
P = 16.0
RIDGE = 1e-4  # holds the scales of channels that no term speaks of
ITERATIONS = 80
LIMIT = 15.0  # of a logarithm: a long step of the line search must not overflow
REACHED = 0.999  # of a bound: rounding in the runtime must not hide that a channel was cut
TINY = 1e-300


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTerm:
    """The noise of one layer's weights.

    `peak` (groups, outputs, inputs) is the largest |weight| over the taps; `power` (groups, inputs) the mean square of
    each input times the taps; `importance` (groups, outputs) what noise in each output costs. `into` and `out` are the
    indices of the scale vectors on its two sides, None where they are 1. `per_channel` means a step for each output.
    """

    peak: Array
    power: Array
    importance: Array
    into: int | None
    out: int | None
    per_channel: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorTerm:
    """The noise of one activation: the largest |value| of each channel, what noise costs, and its scale vector."""

    peak: Array
    importance: Array
    scales: int


def balance(
    sizes: Sequence[int], layers: Sequence[LayerTerm], tensors: Sequence[TensorTerm], reached: Mapping[int, Array]
) -> list[Array]:
    """Return the scale vectors, all positive.

    Args:
        sizes: channels of each scale vector.
        layers: terms of the weights.
        tensors: terms of the activations.
        reached: for scale vectors behind a common bound, how far each channel goes, in [0, 1]. Channels that reach it
            share one scale, and no other channel is scaled up beyond it.
    """
    cut = {k: r for k, r in reached.items() if (r >= REACHED).any()}
    ends = np.cumsum(sizes)[:-1]
    offsets = [np.log(np.maximum(cut[k], 1e-6)) if k in cut else np.zeros(n) for k, n in enumerate(sizes)]
    bounds: list[tuple[float, float]] = []
    for k, n in enumerate(sizes):
        bounds += [(0.0, 0.0 if r >= REACHED else LIMIT) for r in cut[k]] if k in cut else [(-LIMIT, LIMIT)] * n
    steep = [np.power(la.peak / max(float(la.peak.max()), TINY), P).astype(np.float32) for la in layers]

    def logs(u: Array) -> list[Array]:
        return [part + offset for part, offset in zip(np.split(u, ends), offsets, strict=True)]

    def cost(u: Array) -> tuple[float, Array]:
        t = logs(u)
        slopes = [np.zeros_like(part) for part in t]
        total = sum(_layer_cost(la, m, t, slopes) for la, m in zip(layers, steep, strict=True))
        total += sum(_tensor_cost(x, t[x.scales], slopes[x.scales]) for x in tensors)
        return total + RIDGE * float(u @ u), np.concatenate(slopes) + 2 * RIDGE * u

    start = -np.concatenate(offsets)  # scales of 1
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS})
    return [np.exp(part) for part in logs(found.x)]


def _layer_cost(la: LayerTerm, steep: NDArray[np.float32], t: list[Array], slopes: list[Array]) -> float:
    """Return the logarithm of what the weights of `la` cost, and add its derivatives to `slopes`."""
    if not la.peak.any():
        return 0.0
    groups, outputs, inputs = la.peak.shape
    into = t[la.into].reshape(groups, inputs) if la.into is not None else np.zeros((groups, inputs))
    out = t[la.out].reshape(groups, outputs) if la.out is not None else np.zeros((groups, outputs))
    grown = np.exp(P * into)
    power = la.power * np.exp(-2 * into)
    noise = power.sum(axis=1, keepdims=True)
    rows = (steep @ grown[:, :, None])[:, :, 0]
    if la.per_channel:  # the step of an output is divided by its scale, and its cost multiplied: both cancel
        terms = la.importance * np.exp(2 / P * np.log(rows + TINY))
        total = float((terms * noise).sum())
        pull = terms * noise * (2 / (rows + TINY))
        shrink = 2 * power * terms.sum(axis=1, keepdims=True)
        rise = np.zeros_like(out)
    else:
        shrunk = np.exp(-P * out)
        norm = float((shrunk * rows).sum()) + TINY
        square = float(np.exp(2 / P * np.log(norm)))
        weight = la.importance * np.exp(2 * out)
        total = square * float((weight.sum(axis=1, keepdims=True) * noise).sum())
        pull = total * 2 / norm * shrunk
        shrink = 2 * square * power * weight.sum(axis=1, keepdims=True)
        rise = 2 * square * weight * noise - pull * rows
    if total <= 0:
        return 0.0
    if la.into is not None:
        back = (pull[:, None, :] @ steep)[:, 0, :] * grown - shrink
        slopes[la.into] += back.reshape(-1) / total
    if la.out is not None:
        slopes[la.out] += rise.reshape(-1) / total
    return float(np.log(total))


def _tensor_cost(x: TensorTerm, t: Array, slope: Array) -> float:
    """Return the logarithm of what rounding the values of `x` costs, and add its derivatives to `slope`."""
    if not x.peak.any():
        return 0.0
    parts = np.power(x.peak / float(x.peak.max()), P) * np.exp(-P * t)
    norm = float(parts.sum()) + TINY
    weight = x.importance * np.exp(2 * t)
    total = float(np.exp(2 / P * np.log(norm)) * weight.sum())
    if total <= 0:
        return 0.0
    slope += 2 * weight / weight.sum() - 2 * parts / norm
    return float(np.log(total))
