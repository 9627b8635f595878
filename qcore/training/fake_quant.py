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

from qcore.graph.fake_quant import FakeQuantized, Quantizer, TrainedLayer
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


class RoundedThrough(torch.autograd.Function):
    """Rounding in a few vectorized passes: torch's kernel for the CPU takes numbers one by one, five times as long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, levels: tuple[int, int], factor: float) -> torch.Tensor:
        """Return `x` in whole steps of `scale` (1,), `levels` of them at most; `factor` is on the scale's gradient."""
        y = (x / scale).round_().clamp_(*levels).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.levels, ctx.factor = levels, factor
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Pass the gradient where a value is in range, and give the scale its own."""
        x, y, scale = ctx.saved_tensors
        step = float(scale)
        low, high = ((level + half) * step for level, half in zip(ctx.levels, (-0.5, 0.5), strict=True))
        inside = torch.ops.aten.hardtanh_backward(gradient, x, low, high)
        if not ctx.needs_input_grad[1]:
            return inside, None, None, None
        # Two sums of small numbers: of their difference as a whole little would be left in float32.
        moved = torch.dot(_flat(inside), _flat(y - x)) + torch.dot(_flat(gradient - inside), _flat(y))
        return inside, (moved * (ctx.factor / step)).reshape(scale.shape), None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Return the values of `x` in the order of memory, without copying where they are dense."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return (x.permute(0, 2, 3, 1) if last else x).reshape(-1)


class FakeQuantizer(torch.nn.Module):
    """Rounds an activation as `quantizer` says, with the scale that `scales` holds for it."""

    def __init__(self, quantizer: Quantizer, scales: Scales) -> None:
        """Keep the zero point as a buffer; `scales` is shared by all quantizers of a graph."""
        super().__init__()
        self._scales, self._name, self._q = scales, quantizer.scale, quantizer.q
        self._zero = int(quantizer.q.zero_point.reshape(-1)[0])
        self.register_buffer("zero", torch.tensor([float(self._zero)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(clip(round(x / scale) + zero, qmin, qmax) - zero) * scale`, shape and layout of `x`."""
        q, scale = self._q, self._scales.scale(self._name).reshape(1)
        factor = 1.0 / (x.numel() * max(q.qmax, 1)) ** 0.5
        x = x.float()
        if x.is_cuda:  # one kernel, and no number has to come back from the device
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale, self.zero, q.qmin, q.qmax, factor)
        levels = (q.qmin - self._zero, q.qmax - self._zero)
        rounded: torch.Tensor = RoundedThrough.apply(x, scale, levels, factor)
        return rounded


class FakeWeights(torch.nn.Module):
    """Rounds weights on the grid that they start with, and multiplies by how far the scale has moved since.

    A scale that moves takes the weights with it: their integers stay. With a grid that moves under resting weights a
    third of a level at the ends of the range re-rounds them all, and what `round-weights` found is lost
    (MobileNetV2 per tensor: KL 0.007 before, 0.09 after nine steps).
    """

    def __init__(self, quantizer: Quantizer, scales: Scales) -> None:
        """Keep grid and zero points as buffers; `scales` is shared by all quantizers of a graph."""
        super().__init__()
        self._scales, self._name, self._q = scales, quantizer.scale, quantizer.q
        scale = quantizer.q.scale.reshape(-1)
        zero = np.broadcast_to(quantizer.q.zero_point.reshape(-1), scale.shape)
        # torch wants 0 among the levels, which it is not where the few levels of few bits lie around 128.
        shift = int(zero[0]) if (zero == zero[0]).all() else 0
        zero, self._low, self._high = zero - shift, quantizer.q.qmin - shift, quantizer.q.qmax - shift
        self.register_buffer("grid", torch.as_tensor(np.array(scale, np.float32)))
        self.register_buffer("zero", torch.as_tensor(np.array(zero, np.int32)))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Return the weights as their integers and the scale give them, shape of `w`."""
        low, high, axis = self._low, self._high, self._q.axis
        if axis is None:
            rounded = torch.fake_quantize_per_tensor_affine(w, self.grid, self.zero, low, high)
        else:
            rounded = torch.fake_quantize_per_channel_affine(w, self.grid, self.zero, axis % w.dim(), low, high)
        return self.moved(rounded)

    def moved(self, w: torch.Tensor) -> torch.Tensor:
        """Return `w` times the share by which the scale has moved."""
        gain = self._scales.scale(self._name).reshape(-1) / self.grid
        if self._q.axis is None:
            return w * gain
        return w * gain.reshape([-1 if a == self._q.axis % w.dim() else 1 for a in range(w.dim())])


class FakeBias(torch.nn.Module):
    """Rounds a bias to whole steps of input scale times weight scale; the gradient passes unchanged."""

    def __init__(self, layer: TrainedLayer, scales: Scales) -> None:
        """`layer` has an integer bias; `scales` is shared by all quantizers of a graph."""
        super().__init__()
        assert layer.bias is not None  # noqa: S101 - who calls has looked
        self._scales, self._names = scales, (layer.bias.input_scale, layer.weight.scale)

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """Return `bias` as its integers give it, shape of `bias`."""
        into, weight = (self._scales.scale(name).detach() for name in self._names)
        step = into * weight
        return bias + (torch.round(bias.detach() / step) * step - bias.detach())


def quantizers_of(
    fake: FakeQuantized, *, learn: bool, power_of_two: bool
) -> tuple[Scales, dict[str, FakeWeights], dict[str, torch.nn.Module]]:
    """Return the scales of `fake`, what rounds weights, and what rounds activations and biases, by tensor names."""
    moving = set(fake.scales) - fake.fixed if learn else set()
    scales = Scales(fake.scales, learn=moving, power_of_two=power_of_two)
    weights = {la.weight.value: FakeWeights(la.weight, scales) for la in fake.layers}
    others: dict[str, torch.nn.Module] = {a.value: FakeQuantizer(a, scales) for a in fake.activations}
    others |= {la.bias.value: FakeBias(la, scales) for la in fake.layers if la.bias is not None}
    return scales, weights, others
