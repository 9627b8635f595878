"""Activation functions, and Softmax with its relatives."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.elementwise import plain
from qcore.training.ops.node import Function, OpFunction, OpNode


def relu(node: OpNode) -> Function:
    """Build Relu-14."""
    return torch.relu_ if node.may_overwrite else torch.relu


def leaky_relu(node: OpNode) -> Function:
    """Build LeakyRelu-16."""
    alpha = node.real("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


def prelu(node: OpNode) -> Function:
    """Build PRelu-16: the slope is broadcast to the input."""
    return lambda x, slope: torch.where(x < 0, x * slope, x)


def elu(node: OpNode) -> Function:
    """Build Elu-22."""
    alpha = node.real("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def selu(node: OpNode) -> Function:
    """Build Selu-22: gamma * Elu(x, alpha)."""
    alpha, gamma = node.real("alpha", 1.67326319217681884765625), node.real("gamma", 1.05070102214813232421875)
    return lambda x: F.elu(x, alpha) * gamma


def celu(node: OpNode) -> Function:
    """Build Celu-12."""
    alpha = node.real("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def hard_sigmoid(node: OpNode) -> Function:
    """Build HardSigmoid-22: alpha * x + beta, held in [0, 1]."""
    alpha, beta = node.real("alpha", 0.2), node.real("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


def swish(node: OpNode) -> Function:
    """Build Swish-24: x * sigmoid(alpha * x)."""
    alpha = node.real("alpha", 1.0)
    return F.silu if alpha == 1.0 else lambda x: x * torch.sigmoid(x * alpha)


def swiglu(node: OpNode) -> Function:
    """Build SwiGLU-28: A * sigmoid(alpha * A) * B."""
    activation = swish(node)
    return lambda a, b: activation(a) * b


def gelu(node: OpNode) -> Function:
    """Build Gelu-20, exact or by tanh."""
    approximate = node.choice("approximate", ("none", "tanh"))
    return lambda x: F.gelu(x, approximate=approximate)


def softplus(node: OpNode) -> Function:
    """Build Softplus-22: log(1 + exp(x)) without overflow."""
    return lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


def thresholded_relu(node: OpNode) -> Function:
    """Build ThresholdedRelu-22: x where it is above alpha, else 0."""
    alpha = node.real("alpha", 1.0)
    return lambda x: F.threshold(x, alpha, 0.0)


def shrink(node: OpNode) -> Function:
    """Build Shrink-9: values beyond lambd move by bias towards zero, the others become zero."""
    bias, lambd = node.real("bias", 0.0), node.real("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        moved = torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, torch.zeros_like(x)))
        return moved.to(x.dtype)

    return run


def softmax(node: OpNode) -> Function:
    """Build Softmax-13 over one axis."""
    axis = node.integer("axis", -1)
    return lambda x: torch.softmax(x, axis)


def log_softmax(node: OpNode) -> Function:
    """Build LogSoftmax-13 over one axis."""
    axis = node.integer("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


def hardmax(node: OpNode) -> Function:
    """Build Hardmax-13: 1 at the first maximum along an axis, else 0."""
    axis = node.integer("axis", -1)
    return lambda x: torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "Celu": celu,
        "Elu": elu,
        "Gelu": gelu,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": plain(F.hardswish),
        "Hardmax": hardmax,
        "LeakyRelu": leaky_relu,
        "LogSoftmax": log_softmax,
        "Mish": plain(F.mish),
        "PRelu": prelu,
        "Relu": relu,
        "Selu": selu,
        "Shrink": shrink,
        "Softmax": softmax,
        "Softplus": softplus,
        "Softsign": plain(F.softsign),
        "SwiGLU": swiglu,
        "Swish": swish,
        "ThresholdedRelu": thresholded_relu,
    }
)
