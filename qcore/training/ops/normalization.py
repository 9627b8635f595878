"""Normalizations, and Dropout, which like them differs between training and evaluation."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported, number
from qcore.training.parts import added_parts, in_parts


def batch_normalization(node: OpNode) -> Function:
    """Build BatchNormalization-15 with the running statistics.

    With `batch_statistics` it normalizes by those of the batch and moves the running ones, in place, towards them;
    their variance is torch's unbiased one. With training_mode=1 in the graph it does as ONNX says: the new statistics,
    with the biased variance, are outputs, and nothing is changed in place.
    """
    epsilon, momentum = node.real("epsilon", 1e-5), node.real("momentum", 0.9)
    if node.integer("training_mode"):
        return _batch_normalization_with_outputs(epsilon, momentum)
    if any(node.wants(i) for i in range(1, len(node.outputs))):
        raise Unsupported("statistics as outputs without training_mode")
    training, update = node.batch_statistics, 1.0 - momentum

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if training and in_parts():
            return _batch_norm_of_parts(x, (scale, bias), (mean, variance), update, epsilon)
        return F.batch_norm(x, mean, variance, scale, bias, training, update, epsilon)

    return run


def _batch_norm_of_parts(
    x: Tensor, affine: tuple[Tensor, Tensor], running: tuple[Tensor, Tensor], update: float, epsilon: float
) -> Tensor:
    """Return this process's part of a batch, normalized by the statistics of all parts."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    x = x.float()
    n = torch.full((1,), x.numel() / x.shape[1], device=x.device)
    sums = added_parts(torch.cat([x.sum(axes), n]))
    mean = sums[:-1] / sums[-1]
    shape = [1 if axis != 1 else -1 for axis in range(x.dim())]
    centred = x - mean.reshape(shape)
    variance = added_parts(centred.square().sum(axes)) / sums[-1]
    with torch.no_grad():
        running[0].lerp_(mean, update)
        running[1].lerp_(variance * (sums[-1] / (sums[-1] - 1)), update)
    factor = affine[0] * torch.rsqrt(variance + epsilon)
    return centred * factor.reshape(shape) + affine[1].reshape(shape)


def _batch_normalization_with_outputs(epsilon: float, momentum: float) -> Function:
    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        now_variance, now_mean = torch.var_mean(x, axes, correction=0)
        y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
        new_mean = mean * momentum + now_mean * (1.0 - momentum)
        return y, new_mean, variance * momentum + now_variance * (1.0 - momentum)

    return run


def instance_normalization(node: OpNode) -> Function:
    """Build InstanceNormalization-22: each channel of each sample by its own mean and variance."""
    epsilon = node.real("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # Groups of one channel: F.instance_norm refuses images of one pixel, which ONNX allows.
        return F.group_norm(x, x.shape[1], scale, bias, epsilon)

    return run


def group_normalization(node: OpNode) -> Function:
    """Build GroupNormalization-21 (one scale for each channel) and -18 (one for each group)."""
    epsilon, groups = node.real("epsilon", 1e-5), node.integer("num_groups", 1)
    for_each_group = node.opset < 21

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if for_each_group:
            size = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(size), bias.repeat_interleave(size)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return run


def layer_normalization(node: OpNode) -> Function:
    """Build LayerNormalization-17 over the axes from `axis` on; further outputs are the mean and 1 / deviation."""
    epsilon, axis = node.real("epsilon", 1e-5), node.integer("axis", -1)
    more = node.wants(1) or node.wants(2)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, shape, scale, bias, epsilon)
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    def run_with_statistics(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        axes = tuple(range(axis % x.dim(), x.dim()))
        variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
        return run(x, scale, bias), mean, torch.rsqrt(variance + epsilon)

    return run_with_statistics if more else run


def rms_normalization(node: OpNode) -> Function:
    """Build RMSNormalization-23 over the axes from `axis` on."""
    epsilon, axis = node.real("epsilon", 1e-5), node.integer("axis", -1)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape:
            return F.rms_norm(x, shape, scale, epsilon)
        return F.rms_norm(x, shape, None, epsilon) * scale

    return run


def lrn(node: OpNode) -> Function:
    """Build LRN-13: x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    alpha, beta, bias = node.real("alpha", 1e-4), node.real("beta", 0.75), node.real("bias", 1.0)
    size = node.integer("size", 1)

    def run(x: Tensor) -> Tensor:
        channels, before = x.shape[1], (size - 1) // 2
        squares = F.pad((x * x).transpose(1, -1), (before, size - 1 - before)).transpose(1, -1)
        total = squares[:, :channels]
        for shift in range(1, size):
            total = total + squares[:, shift : shift + channels]
        return x / (total * (alpha / size) + bias) ** beta

    return run


def lp_normalization(node: OpNode) -> Function:
    """Build LpNormalization-22: x by its p-norm along an axis; 0 where the norm is 0."""
    axis, p = node.integer("axis", -1), node.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))

    return run


def mean_variance_normalization(node: OpNode) -> Function:
    """Build MeanVarianceNormalization-13: (x - mean) / (deviation + 1e-9) over `axes`."""
    axes = node.integers("axes") or [0, 2, 3]

    def run(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (torch.sqrt(variance) + 1e-9)

    return run


def dropout(node: OpNode) -> Function:
    """Build Dropout-22: the identity, unless the program trains with dropout or the graph itself says training_mode.

    Random numbers come from torch's generator; the attribute `seed` is not looked at.
    """
    always = node.dropout

    def run(
        x: Tensor, ratio: float | list[float] | None = None, training: float | None = None
    ) -> tuple[Tensor, Tensor]:
        p = 0.5 if ratio is None else number(ratio)
        if not (always or (training is not None and number(training))) or p == 0:
            return x, torch.ones_like(x, dtype=torch.bool) if with_mask else x
        mask = torch.rand_like(x) >= p
        return x * mask / (1.0 - p), mask

    def run_alone(x: Tensor, ratio: float | list[float] | None = None, training: float | None = None) -> Tensor:
        return run(x, ratio, training)[0]

    with_mask = node.wants(1)
    return run if with_mask else run_alone


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "BatchNormalization": batch_normalization,
        "Dropout": dropout,
        "GroupNormalization": group_normalization,
        "InstanceNormalization": instance_normalization,
        "LRN": lrn,
        "LayerNormalization": layer_normalization,
        "LpNormalization": lp_normalization,
        "MeanVarianceNormalization": mean_variance_normalization,
        "RMSNormalization": rms_normalization,
    }
)
