"""Second-order rounding: the integers of every layer are chosen for its outputs, not for its weights.

Layer after layer, with the inputs that the quantized graph really makes; the bias is corrected with it. How far the
samples are believed is chosen for every layer by cross-validation over them (`numerics/shrinkage.py`).

Source: Frantar et al. 2022 (arXiv 2210.17323); targets for the real inputs: Li et al. 2025 (arXiv 2504.02692).
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.numerics.refine import GridLayer, LayerMoments, best_grid, corrected_bias, restored_gain
from qcore.numerics.shrinkage import choose_ridge, choose_shrinkage, pulled, shrunk

Array = NDArray[np.float64]
FEW_BITS = 6
"""Up to this many, all levels are used, the lowest too."""
CUTS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""What steps are multiplied by for few bits."""
SHARED_CUTS = (1.0, 0.85, 0.7)
"""The same where all outputs share one, which the largest weight of all sets."""
HALVED = (1.0, 0.5)
_FAR = 4.0  # a scale stays this near to the one that quantize chose, which also had the bias in mind


class RoundWeightsStep(Config):
    """Options of the recipe step `round-weights`.

    `samples` of the calibration split are run and `positions` outputs of each convolution looked at. `pull` says how
    firmly the least-squares answer to the layer's real inputs is held to the float weights, as a share of the mean
    variance of the inputs (None: the float weights are rounded as they are). `shrinkage` is how far the covariance of
    the inputs is drawn to its diagonal. `auto` chooses both for each layer on halves of the samples. `shrink` lists
    what the scales of the weights are multiplied by; the factor that serves a layer's outputs best is taken, for each
    scale; None means smaller steps too where levels are scarce (few bits, or one scale for all outputs), else 1. `gain`
    is how far the scales then make up for outputs that fade, 0 to 1. Powers of two stay such.
    """

    method: Literal["round-weights"] = "round-weights"
    samples: int = Field(default=128, ge=1)
    positions: int = Field(default=64, ge=1)
    pull: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    gain: float = Field(default=0.5, ge=0, le=1)
    shrink: tuple[Annotated[float, Field(gt=0.1, le=1)], ...] | None = Field(default=None, min_length=1)


def round_weights(
    layer: GridLayer, moments: LayerMoments, step: RoundWeightsStep, bits: int, exact: bool = False
) -> tuple[GridLayer, Array]:
    """Return `layer` with integers of `bits` bits with which its outputs stay, and the bias for them.

    `exact` says that scales must keep their form (powers of two).
    """
    top = (1 << (bits - 1)) - 1
    levels = (-top - (bits <= FEW_BITS), top)
    wanted = pulled(layer.wanted, moments, choose_ridge(layer.wanted, moments) if step.pull == "auto" else step.pull)
    scale = layer.scale if exact else _covering(layer, wanted, levels)
    factors = step.shrink or _usual_cuts(layer, bits, exact)
    if exact:
        factors = tuple(f for f in factors if np.frexp(f)[0] == 0.5) or (1.0,)
    share = choose_shrinkage(wanted, moments, scale, levels) if step.shrinkage == "auto" else step.shrinkage
    metric = shrunk(moments.covariance, share)
    best = best_grid(layer, wanted, metric, [scale * f for f in factors], levels)
    if step.gain and not exact:
        best = restored_gain(best, moments, step.gain)
    return best, corrected_bias(best.integers, best.scale, moments)


def _usual_cuts(layer: GridLayer, bits: int, exact: bool) -> tuple[float, ...]:
    if exact:
        return HALVED
    if bits <= FEW_BITS:
        return CUTS
    return SHARED_CUTS if layer.shared else (1.0,)


def _covering(layer: GridLayer, wanted: Array, levels: tuple[int, int]) -> Array:
    """Return the scales (groups, outputs) with which `levels` just hold `wanted`."""
    low, high = levels
    scale = np.maximum(wanted.max(axis=2) / high, wanted.min(axis=2) / low)
    if layer.shared:
        scale = np.full_like(scale, scale.max())
    return np.asarray(np.clip(scale, layer.scale / _FAR, layer.scale * _FAR))
