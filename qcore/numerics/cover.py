"""Scales of weights: one that covers every value, or the one of least square error, which may cut the largest."""

from dataclasses import replace

import numpy as np

from qcore.numerics.affine import (
    Float,
    QParams,
    QScheme,
    channel_range,
    dequantize_array,
    qparams_from_range,
    quantize_array,
)

SHRUNK = np.linspace(0.98, 0.4, 30)
HALVED = np.array([0.5])


def covering_scale(weight: Float, scheme: QScheme) -> QParams:
    """Return the parameters that cover all of `weight` (float, channels along `scheme.axis`)."""
    low, high = (weight.min(), weight.max()) if scheme.axis is None else channel_range(weight, scheme.axis)
    return qparams_from_range(np.asarray(low), np.asarray(high), scheme)


def least_error_scale(weight: Float, scheme: QScheme) -> QParams:
    """Return the parameters of least square error among the covering scale and smaller ones, for each channel.

    With few levels a smaller step gains more on the many small weights than it loses on the few that it cuts.

    Source: Banner et al. 2019 (arXiv 1810.05723), by search instead of a distribution.
    """
    q = covering_scale(weight, scheme)
    others = None if scheme.axis is None else tuple(i for i in range(weight.ndim) if i != scheme.axis)

    def error(p: QParams) -> Float:
        difference = dequantize_array(quantize_array(weight, p), p) - weight
        return np.asarray((difference.astype(np.float64) ** 2).sum(axis=others))

    best, least = q.scale, error(q)
    for factor in HALVED if scheme.power_of_two else SHRUNK:
        tried = replace(q, scale=(q.scale * np.float32(factor)).astype(np.float32))
        now = error(tried)
        best = np.where(now < least, tried.scale, best)
        least = np.minimum(now, least)
    return replace(q, scale=np.asarray(best, np.float32))
