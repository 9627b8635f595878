"""Channel scales that make a chain of layers lose least to quantization: a convex problem in their logarithms.

Dividing channel i of an activation by `s_i = exp(t_i)` divides the layers that make it and multiplies the layers that
read it. Quantization with one step per tensor adds noise of power `step^2 / 12` to every weight and every value. With
`step = max / levels`, the noise that a layer's weights add to its outputs, and that an activation adds to its readers,
are sums of products of powers of the s (posynomials), so their logarithms are convex in t; so is the sum of
logarithms over all layers and tensors, which is minimized here. Each term is thereby counted relative to itself: no layer is traded away
because the estimate of how errors travel favours another.

The maximum is a p-norm here, to have derivatives. Source: the noise model is Krishnamoorthi 2018 (arXiv 1806.08342)
section 3; balancing channels is Nagel et al. 2019 (arXiv 1906.04721), eq. 11, which is the case of two layers without
activation noise; geometric programming: Boyd et al. 2007.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Vector = NDArray[np.float64]
P = 16.0
RIDGE = 1e-4
ITERATIONS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTerm:
    """The noise of one layer's weights.

    `peak` (groups, outputs, inputs) is the largest |weight| over the taps; `power` (groups, inputs) the mean square of
    each input; `importance` (groups, outputs) what noise in each output costs. `into` and `out` are the indices of the
    scale vectors on its two sides, or None where they are fixed at 1. `per_channel` means a step for each output.
    """

    peak: NDArray[np.float64]
    power: NDArray[np.float64]
    importance: NDArray[np.float64]
    into: int | None
    out: int | None
    per_channel: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorTerm:
    """The noise of one activation: the largest |value| of each channel, what noise costs, and its scale vector."""

    peak: Vector
    importance: Vector
    scales: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A bound that channels of scale vector `scales` share: `reached` in [0, 1] is how far each channel goes."""

    scales: int
    reached: Vector


def balance(
    sizes: Sequence[int], layers: Sequence[LayerTerm], tensors: Sequence[TensorTerm], cuts: Sequence[Cut], joint=False
) -> list[Vector]:
    """Return the scale vectors (all positive)."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    pins = {c.scales: c.reached for c in cuts}
    floors = [(None, None)] * int(starts[-1])
    for k, reached in pins.items():
        if (reached >= 0.999).any():
            for i, r in enumerate(reached):
                floors[starts[k] + i] = (0.0, 0.0 if r >= 0.999 else None)

    def expand(u):
        ts = []
        for k in range(len(sizes)):
            t = u[starts[k] : starts[k + 1]]
            if k in pins and (pins[k] >= 0.999).any():
                t = t + np.log(np.maximum(pins[k], 1e-6))
            ts.append(t)
        return ts

    pw = [np.power(l.peak / max(l.peak.max(), 1e-30), P).astype(np.float32) for l in layers]

    def cost(u):
        ts = expand(u)
        grads = [np.zeros_like(t) for t in ts]
        total = 0.0
        J = []
        for l, m in zip(layers, pw):
            g, o, i = l.peak.shape
            tin = ts[l.into].reshape(g, i) if l.into is not None else np.zeros((g, i))
            tout = ts[l.out].reshape(g, o) if l.out is not None else np.zeros((g, o))
            v = np.exp(P * tin)
            w = np.exp(-P * tout)
            pv = l.power * np.exp(-2 * tin)
            noise = pv.sum(1, keepdims=True)  # (g,1)
            imp = l.importance * np.exp(2 * tout)
            if l.per_channel:
                s = (m @ v[:, :, None])[:, :, 0] + 1e-300  # step_o^P without w
                d2 = np.exp(2 / P * np.log(s))
                terms = l.importance * d2 * noise
                T = terms.sum()
                if T <= 0:
                    continue
                gi = ((terms * 2 / s)[:, None, :] @ m)[:, 0, :] * v - 2 * pv * (l.importance * d2).sum(1, keepdims=True)
                go = None
            else:
                a = (m @ v[:, :, None])[:, :, 0]
                S = (w * a).sum() + 1e-300
                d2 = np.exp(2 / P * np.log(S))
                N = (imp.sum(1, keepdims=True) * noise).sum()
                T = d2 * N
                if T <= 0:
                    continue
                gi = T * 2 / S * v * (w[:, None, :] @ m)[:, 0, :] - 2 * d2 * pv * imp.sum(1, keepdims=True)
                go = -T * 2 / S * w * a + 2 * d2 * imp * noise
            total += np.log(T)
            if l.into is not None:
                grads[l.into] += (gi / T).reshape(-1)
            if l.out is not None and go is not None:
                grads[l.out] += (go / T).reshape(-1)
        for x in tensors:
            t = ts[x.scales]
            pk = x.peak / max(x.peak.max(), 1e-30)
            e = np.power(pk, P) * np.exp(-P * t)
            S = e.sum() + 1e-300
            d2 = np.exp(2 / P * np.log(S))
            q = x.importance * np.exp(2 * t)
            N = q.sum()
            T = d2 * N
            if T <= 0:
                continue
            total += np.log(T)
            grads[x.scales] += -2 * e / S + 2 * q / N
        g = np.concatenate(grads) if grads else np.zeros(0)
        g = g + 2 * RIDGE * u
        return total + RIDGE * float(u @ u), g

    u0 = np.zeros(int(starts[-1]))
    for k, reached in pins.items():
        if (reached >= 0.999).any():
            u0[starts[k] : starts[k + 1]] = -np.log(np.maximum(reached, 1e-6))
    r = minimize(
        cost, u0, jac=True, method="L-BFGS-B", bounds=floors, options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS}
    )
    balance.info = (cost(u0)[0], r.fun, r.nit)
    return [np.exp(t) for t in expand(r.x)]
