"""Rounding with gradients: what stands in a float graph for a Q/DQ pair while it is trained.

Values in range pass their gradient straight through, values that saturate pass none; a scale that is learnt gets the
gradient of learned step sizes, scaled by 1 / sqrt(values x levels). Scales are kept as logarithms: they stay positive,
and a step of the optimizer changes small and large ones by the same share.

Source: Bengio et al. 2013 (arXiv 1308.3432); Esser et al. 2020 (arXiv 1902.08153) section 2.1.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from qcore.graph.fake_quant import FakeQuantized, Quantizer
from qcore.training.ops.quantization import round_straight_through


class Scales(torch.nn.Module):
    """The scales of a graph by name, as base-2 logarithms; with `power_of_two` rounded to whole ones."""

    def __init__(self, scales: Mapping[str, Any], *, learn: Collection[str], power_of_two: bool) -> None:
        """Start from `scales` (float32 arrays); those in `learn` have gradients."""
        super().__init__()
        self._power_of_two = power_of_two
        self._keys = {name: f"s{k}" for k, name in enumerate(scales)}
        for name, key in self._keys.items():
            start = torch.as_tensor(np.asarray(np.log2(np.asarray(scales[name], np.float64)), np.float32))
            self.register_parameter(key, torch.nn.Parameter(start, requires_grad=name in learn))

    def scale(self, name: str) -> torch.Tensor:
        """Return the scale `name`, () or (channels,), with its gradient."""
        exponent = self._parameters[self._keys[name]]
        return torch.exp2(round_straight_through(exponent) if self._power_of_two else exponent)

    @property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Those scales that moved, as they are now, float32."""
        with torch.no_grad():
            return {n: self.scale(n).cpu().numpy() for n, k in self._keys.items() if self._parameters[k].requires_grad}


class FakeQuantizer(torch.nn.Module):
    """Rounds one tensor as `quantizer` says, with the scale that `scales` holds for it."""

    def __init__(self, quantizer: Quantizer, scales: Scales) -> None:
        """Count levels from the zero point, as ONNX rounds; `scales` is shared by all quantizers of a graph."""
        super().__init__()
        q = quantizer.q
        self._scales, self._name, self._axis = scales, quantizer.scale, q.axis
        zero = np.broadcast_to(q.zero_point, q.scale.shape).reshape(-1)
        # torch wants 0 among the levels, which it is not where the few levels of few bits lie around 128.
        shift = int(zero[0]) if (zero == zero[0]).all() else 0
        self._low, self._high = q.qmin - shift, q.qmax - shift
        self.register_buffer("zero", torch.from_numpy((zero - shift).astype(np.float32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(clip(round(x / scale) + zero, qmin, qmax) - zero) * scale`, shape and layout of `x`."""
        low, high, scale = self._low, self._high, self._scales.scale(self._name)
        # torch's own kernel: one pass forward and one back, where the formula as written would take nine.
        if self._axis is None:
            factor = 1.0 / (x.numel() * max(high, 1)) ** 0.5
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale.reshape(1), self.zero, low, high, factor)
        factor = 1.0 / (x.numel() / scale.numel() * max(high, 1)) ** 0.5
        axis = self._axis % x.dim()
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, self.zero, axis, low, high, factor)


def quantizers_of(fake: FakeQuantized, *, learn: bool, power_of_two: bool) -> tuple[Scales, dict[str, FakeQuantizer]]:
    """Return the scales of `fake` and, for the name of every tensor that is rounded, what rounds it."""
    moving = set(fake.scales) - fake.fixed if learn else set()
    scales = Scales(fake.scales, learn=moving, power_of_two=power_of_two)
    return scales, {quantizer.value: FakeQuantizer(quantizer, scales) for quantizer in fake.quantizers}
