"""What a layer should become when the inputs it really gets are known.

A bias restores the means of its outputs, second-order rounding the outputs themselves.

Both start from the same evidence: moments of the inputs as the quantized graph makes them, and of the outputs as the
float graph makes them, over the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.rounding import round_second_order

Array = NDArray[np.float64]
MOST_GAIN = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMoments:
    """Moments of a layer's inputs x and of its wanted outputs y, over sampled output positions.

    `mean_in` (groups, inputs), `mean_out` and `variance_out` (groups, outputs); `covariance` (groups, inputs, inputs)
    of x with itself and `cross` (groups, outputs, inputs) of y with x. Inputs are input channels times taps.
    """

    mean_in: Array
    mean_out: Array
    variance_out: Array
    covariance: Array
    cross: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class GridLayer:
    """A layer's weights as they should be and as they are.

    `wanted` (groups, outputs, inputs) is float, `integers` of the same shape and without zero point, `scale` (groups,
    outputs) positive; `shared` says that it is one number for all outputs.
    """

    wanted: Array
    integers: Array
    scale: Array
    shared: bool = False


class MomentSums:
    """Sums from which `LayerMoments` follow, added up over batches.

    Products are those of differences from the first batch's means: what hardly varies around a large mean would drown
    in float32 rounding otherwise.
    """

    def __init__(self, groups: int, outputs: int, inputs: int) -> None:
        self._count = 0
        self._origin: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._x = np.zeros((groups, inputs))
        self._y = np.zeros((groups, outputs))
        self._yy = np.zeros((groups, outputs))
        self._xx = np.zeros((groups, inputs, inputs))
        self._yx = np.zeros((groups, outputs, inputs))

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Add rows: `x` (groups, rows, inputs) and `y` (groups, rows, outputs)."""
        if self._origin is None:
            self._origin = (_means(x), _means(y))
        x, y = x - self._origin[0], y - self._origin[1]
        self._count += x.shape[1]
        self._x += x.sum(axis=1, dtype=np.float64)
        self._y += y.sum(axis=1, dtype=np.float64)
        self._yy += np.square(y, dtype=np.float64).sum(axis=1)
        self._xx += np.swapaxes(x, 1, 2) @ x
        self._yx += np.swapaxes(y, 1, 2) @ x

    def moments(self, *, centred: bool = True) -> LayerMoments:
        """Return the moments of all rows so far, at least one.

        `centred` False gives moments about zero and means of zero: for a layer without a bias, whose weights alone
        must keep the means of its outputs.
        """
        assert self._origin is not None  # noqa: S101 - at least one row
        n = self._count
        shift_in, shift_out = self._x / n, self._y / n
        covariance = self._xx / n - shift_in[:, :, None] * shift_in[:, None, :]
        cross = self._yx / n - shift_out[:, :, None] * shift_in[:, None, :]
        variance_out = np.maximum(self._yy / n - shift_out**2, 0.0)
        mean_in, mean_out = shift_in + self._origin[0][:, 0], shift_out + self._origin[1][:, 0]
        if not centred:
            covariance = covariance + mean_in[:, :, None] * mean_in[:, None, :]
            cross = cross + mean_out[:, :, None] * mean_in[:, None, :]
            variance_out = variance_out + mean_out**2
            mean_in, mean_out = np.zeros_like(mean_in), np.zeros_like(mean_out)
        return LayerMoments(
            mean_in=mean_in, mean_out=mean_out, variance_out=variance_out, covariance=covariance, cross=cross
        )


def _means(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows.mean(axis=1, keepdims=True, dtype=np.float64), np.float32)


def corrected_bias(integers: Array, scale: Array, moments: LayerMoments) -> Array:
    """Return the bias (groups, outputs) with which the layer's outputs have the means that are wanted.

    Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.2; Finkelstein et al. 2019 (arXiv 1906.03193).
    """
    return moments.mean_out - ((integers * scale[:, :, None]) @ moments.mean_in[:, :, None])[:, :, 0]


def refined_weights(
    layer: GridLayer, moments: LayerMoments, levels: tuple[int, int], damping: float, pull: float | None
) -> GridLayer:
    """Return the layer with integers for which its outputs stay closest to those that are wanted.

    Args:
        layer: the weights and their grid.
        moments: of the layer's inputs and wanted outputs.
        levels: lowest and highest integer.
        damping: of the second moments, as a share of their mean diagonal.
        pull: None rounds the wanted weights. A number first moves them to the least-squares answer to the inputs that
            the layer really gets, held to the wanted weights by a ridge of this share of the mean diagonal.
    """
    target = layer.wanted
    if pull is not None:
        k = target.shape[2]
        ridge = (pull * np.trace(moments.covariance, axis1=1, axis2=2) / k + 1e-12)[:, None, None] * np.eye(k)
        missing = moments.cross - target @ moments.covariance
        target = target + np.swapaxes(np.linalg.solve(moments.covariance + ridge, np.swapaxes(missing, 1, 2)), 1, 2)
    return replace(layer, integers=round_second_order(target, moments.covariance, layer.scale, levels, damping))


def restored_gain(layer: GridLayer, moments: LayerMoments) -> GridLayer:
    """Return `layer` with scales for which its outputs follow the wanted ones one to one.

    Inputs that were quantized before and weights rounded for least squares both make outputs a little smaller. Layer
    after layer that adds up to a signal that has faded. The factor is `var(y) / cov(y, y')`, the one that makes the
    slope of y' over y 1; it is a bias correction for the second moment.
    """
    follows = (layer.integers * layer.scale[:, :, None] * moments.cross).sum(axis=2)
    wanted = moments.variance_out
    if layer.shared:
        follows, wanted = follows.sum(keepdims=True), wanted.sum(keepdims=True)
    usable = (follows > 0) & (wanted > 0)
    gain = np.where(usable, wanted / np.where(usable, follows, 1.0), 1.0)
    return replace(layer, scale=layer.scale * np.clip(gain, 1 / MOST_GAIN, MOST_GAIN))


def best_scales(tried: Sequence[GridLayer], moments: LayerMoments, shared: bool) -> GridLayer:
    """Return the layer with the best of several roundings on grids of different scales.

    Args:
        tried: the same layer, rounded on different grids.
        moments: of its inputs.
        shared: all outputs have one scale and are chosen together, else each for itself.
    """
    errors = []
    for layer in tried:
        difference = layer.integers * layer.scale[:, :, None] - layer.wanted
        errors.append(((difference @ moments.covariance) * difference).sum(axis=2))
    total = np.stack(errors)
    if shared:
        return tried[int(total.sum(axis=(1, 2)).argmin())]
    best = total.argmin(axis=0)
    integers = np.take_along_axis(np.stack([la.integers for la in tried]), best[None, :, :, None], axis=0)[0]
    scale = np.take_along_axis(np.stack([la.scale for la in tried]), best[None], axis=0)[0]
    return replace(tried[0], integers=integers, scale=scale)
