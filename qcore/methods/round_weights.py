"""Second-order rounding: the integers of every layer are chosen for its outputs, not for its weights.

Layer after layer, with the inputs that the quantized graph really makes; the bias is corrected with it.

Source: Frantar et al. 2022 (arXiv 2210.17323); targets for the real inputs: Li et al. 2025 (arXiv 2504.02692).
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.numerics.refine import GridLayer, LayerMoments, best_scales, corrected_bias, refined_weights, restored_gain

Array = NDArray[np.float64]


class RoundWeightsStep(Config):
    """Options of the recipe step `round-weights`.

    `damping` and `pull` are shares of the mean diagonal of the second moments: what is added to it, and how firmly the
    least-squares answer to the layer's real inputs is held to the float weights (None: these are rounded as they are).
    `shrink` lists what the scales of the weights are multiplied by; the factor that serves a layer's outputs best is
    taken, for each scale: with few levels a smaller step is worth the largest weights that it cuts. `gain` then
    corrects the scales for the slope of the outputs. Powers of two stay such.
    """

    method: Literal["round-weights"] = "round-weights"
    samples: int = Field(default=64, ge=1)
    positions: int = Field(default=64, ge=1)
    damping: float = Field(default=0.01, gt=0)
    pull: float | None = Field(default=None, gt=0)
    gain: bool = True
    shrink: tuple[Annotated[float, Field(gt=0.1, le=1)], ...] = Field(default=(1.0,), min_length=1)


def round_weights(
    layer: GridLayer, moments: LayerMoments, step: RoundWeightsStep, bits: int, exact: bool = False
) -> tuple[GridLayer, Array]:
    """Return `layer` with integers, symmetric in `bits` bits, with which its outputs stay, and the bias for them.

    `exact` says that scales must keep their form (powers of two).
    """
    top = (1 << (bits - 1)) - 1
    factors = [f for f in step.shrink if not exact or np.frexp(f)[0] == 0.5] or [1.0]
    tried = [
        refined_weights(replace(layer, scale=layer.scale * factor), moments, (-top, top), step.damping, step.pull)
        for factor in factors
    ]
    best = best_scales(tried, moments, shared=layer.shared)
    if step.gain and not exact:
        best = restored_gain(best, moments)
    return best, corrected_bias(best.integers, best.scale, moments)
