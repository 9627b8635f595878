"""What a layer should become when the inputs it really gets are known.

A bias restores the means of its outputs, second-order rounding the outputs themselves.

Both start from the same evidence: moments of the inputs as the quantized graph makes them, and of the outputs as the
float graph makes them, over the same samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.rounding import round_second_order

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMoments:
    """Moments of a layer's inputs x and of its wanted outputs y, over sampled output positions.

    `mean_in` (groups, inputs), `mean_out` (groups, outputs); `covariance` (groups, inputs, inputs) of x with itself and
    `cross` (groups, outputs, inputs) of y with x. Inputs are input channels times taps.
    """

    mean_in: Array
    mean_out: Array
    covariance: Array
    cross: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class GridLayer:
    """A layer's weights as they should be and as they are.

    `wanted` (groups, outputs, inputs) is float, `integers` of the same shape and without zero point, `scale` (groups,
    outputs) positive.
    """

    wanted: Array
    integers: Array
    scale: Array


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
        mean_in, mean_out = shift_in + self._origin[0][:, 0], shift_out + self._origin[1][:, 0]
        if not centred:
            covariance = covariance + mean_in[:, :, None] * mean_in[:, None, :]
            cross = cross + mean_out[:, :, None] * mean_in[:, None, :]
            mean_in, mean_out = np.zeros_like(mean_in), np.zeros_like(mean_out)
        return LayerMoments(mean_in=mean_in, mean_out=mean_out, covariance=covariance, cross=cross)


def _means(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows.mean(axis=1, keepdims=True, dtype=np.float64), np.float32)


def corrected_bias(integers: Array, scale: Array, moments: LayerMoments) -> Array:
    """Return the bias (groups, outputs) with which the layer's outputs have the means that are wanted.

    Source: Nagel et al. 2019 (arXiv 1906.04721) section 4.2; Finkelstein et al. 2019 (arXiv 1906.03193).
    """
    return moments.mean_out - ((integers * scale[:, :, None]) @ moments.mean_in[:, :, None])[:, :, 0]


def refined_weights(
    layer: GridLayer, moments: LayerMoments, levels: tuple[int, int], damping: float, pull: float | None
) -> Array:
    """Return integers with which the layer's outputs stay closest to those that are wanted.

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
    return round_second_order(target, moments.covariance, layer.scale, levels, damping)
