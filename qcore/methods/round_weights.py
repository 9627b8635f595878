"""Second-order rounding: the integers of every layer are chosen for its outputs, not for its weights.

Layer after layer, with the inputs that the quantized graph really makes; the bias is corrected with it.

Source: Frantar et al. 2022 (arXiv 2210.17323); targets for the real inputs: Li et al. 2025 (arXiv 2504.02692).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qcore.config import Config
from qcore.numerics.refine import GridLayer, LayerMoments, corrected_bias, refined_weights

Array = NDArray[np.float64]


class RoundWeightsStep(Config):
    """Options of the recipe step `round-weights`.

    `damping` and `pull` are shares of the mean diagonal of the second moments: what is added to it, and how firmly the
    least-squares answer to the layer's real inputs is held to the float weights (None: these are rounded as they are).
    """

    method: Literal["round-weights"] = "round-weights"
    samples: int = Field(default=64, ge=1)
    positions: int = Field(default=64, ge=1)
    damping: float = Field(default=0.01, gt=0)
    pull: float | None = Field(default=None, gt=0)


def round_weights(layer: GridLayer, moments: LayerMoments, step: RoundWeightsStep, bits: int) -> tuple[Array, Array]:
    """Return the integers of `layer`, symmetric in `bits` bits, with which its outputs stay, and the bias for them."""
    top = (1 << (bits - 1)) - 1
    integers = refined_weights(layer, moments, (-top, top), step.damping, step.pull)
    return integers, corrected_bias(integers, layer.scale, moments)
