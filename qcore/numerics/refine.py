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
    `halves` are the same of every other sample each, to learn on one and judge on the other; None where there are none.
    """

    mean_in: Array
    mean_out: Array
    variance_out: Array
    covariance: Array
    cross: Array
    halves: "tuple[LayerMoments, LayerMoments] | None" = None


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
        self._origin: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._halves = (_Sums.zero(groups, outputs, inputs), _Sums.zero(groups, outputs, inputs))

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32], sample: NDArray[np.int64] | None = None) -> None:
        """Add rows: `x` (groups, rows, inputs), `y` (groups, rows, outputs), and which `sample` (rows,) each is of.

        Without `sample` there will be no halves.
        """
        if self._origin is None:
            self._origin = (_means(x), _means(y))
        x, y = x - self._origin[0], y - self._origin[1]
        if sample is None:
            self._halves[0].add(x, y)
            return
        for parity, half in enumerate(self._halves):
            chosen = sample % 2 == parity
            if chosen.any():
                half.add(x[:, chosen], y[:, chosen])

    def moments(self, *, centred: bool = True) -> LayerMoments:
        """Return the moments of all rows so far, at least one.

        `centred` False gives moments about zero and means of zero: for a layer without a bias, whose weights alone
        must keep the means of its outputs.
        """
        assert self._origin is not None  # noqa: S101 - at least one row
        even, odd = self._halves
        x, y = (v[:, 0].astype(np.float64) for v in self._origin)
        halves = (even.moments(x, y, centred), odd.moments(x, y, centred)) if even.count and odd.count else None
        return replace((even + odd).moments(x, y, centred), halves=halves)


@dataclass(slots=True)
class _Sums:
    """Sums over rows of differences from an origin; `xx` and `yx` of products."""

    x: Array
    y: Array
    yy: Array
    xx: Array
    yx: Array
    count: int = 0

    @staticmethod
    def zero(groups: int, outputs: int, inputs: int) -> "_Sums":
        one, two = np.zeros((groups, outputs)), np.zeros((groups, outputs))
        return _Sums(
            x=np.zeros((groups, inputs)),
            y=one,
            yy=two,
            xx=np.zeros((groups, inputs, inputs)),
            yx=np.zeros((groups, outputs, inputs)),
        )

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        self.count += x.shape[1]
        self.x += x.sum(axis=1, dtype=np.float64)
        self.y += y.sum(axis=1, dtype=np.float64)
        self.yy += np.square(y, dtype=np.float64).sum(axis=1)
        self.xx += np.swapaxes(x, 1, 2) @ x
        self.yx += np.swapaxes(y, 1, 2) @ x

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            x=self.x + other.x,
            y=self.y + other.y,
            yy=self.yy + other.yy,
            xx=self.xx + other.xx,
            yx=self.yx + other.yx,
            count=self.count + other.count,
        )

    def moments(self, origin_in: Array, origin_out: Array, centred: bool) -> LayerMoments:
        n = self.count
        shift_in, shift_out = self.x / n, self.y / n
        covariance = self.xx / n - shift_in[:, :, None] * shift_in[:, None, :]
        cross = self.yx / n - shift_out[:, :, None] * shift_in[:, None, :]
        variance_out = np.maximum(self.yy / n - shift_out**2, 0.0)
        mean_in, mean_out = shift_in + origin_in, shift_out + origin_out
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


def restored_gain(layer: GridLayer, moments: LayerMoments, share: float = 1.0) -> GridLayer:
    """Return `layer` with scales for which its outputs follow the wanted ones one to one.

    Inputs that were quantized before and weights rounded for least squares both make outputs a little smaller. Layer
    after layer that adds up to a signal that has faded. The factor is `var(y) / cov(y, y')`, the one that makes the
    slope of y' over y 1; it is a bias correction for the second moment. It also raises the noise in y': `share` takes
    that power of the factor, 0 to 1.
    """
    follows = (layer.integers * layer.scale[:, :, None] * moments.cross).sum(axis=2)
    wanted = moments.variance_out
    if layer.shared:
        follows, wanted = follows.sum(keepdims=True), wanted.sum(keepdims=True)
    usable = (follows > 0) & (wanted > 0)
    gain = np.where(usable, wanted / np.where(usable, follows, 1.0), 1.0)
    return replace(layer, scale=layer.scale * np.clip(gain, 1 / MOST_GAIN, MOST_GAIN) ** share)


def best_grid(
    layer: GridLayer, wanted: Array, metric: Array, tried: Sequence[Array], levels: tuple[int, int]
) -> GridLayer:
    """Return `layer` rounded on the grid that leaves the least `tr (W - Q) H (W - Q)'`.

    Args:
        layer: whose integers and scales are replaced.
        wanted: W, (groups, outputs, inputs).
        metric: H, (groups, inputs, inputs), positive definite.
        tried: scales, each (groups, outputs); all outputs are chosen together where they share one, else each for
            itself.
        levels: lowest and highest integer.
    """
    groups, outputs, inputs = wanted.shape
    scales = np.stack(tried, axis=1)  # (groups, tried, outputs): all grids are rounded in one go
    many = np.broadcast_to(wanted[:, None], (groups, len(tried), outputs, inputs)).reshape(groups, -1, inputs)
    integers = round_second_order(many, metric, scales.reshape(groups, -1), levels)
    difference = integers * scales.reshape(groups, -1, 1) - many
    error = ((difference @ metric) * difference).sum(axis=2).reshape(groups, len(tried), outputs)
    if layer.shared:
        best = np.full((groups, 1, outputs), error.sum(axis=(0, 2)).argmin())
    else:
        best = error.argmin(axis=1)[:, None]
    chosen = np.take_along_axis(integers.reshape(groups, len(tried), outputs, inputs), best[..., None], axis=1)
    return replace(layer, integers=chosen[:, 0], scale=np.take_along_axis(scales, best, axis=1)[:, 0])
