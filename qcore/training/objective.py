"""What training makes small: distance from labels, from the float model's outputs, or both.

Source: Hinton et al. 2015 (arXiv 1503.02531) for soft targets; Romero et al. 2015 (arXiv 1412.6550) for features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

_SMALLEST = 1e-8
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A loss: `teacher_weight` of the teacher's outputs and the rest of labels, and as much of `features` on top.

    `output` is the output that is compared, None for those `compared` (or all) by squared error. `others` are
    outputs beside `output`, which labels say nothing of: they shall be what the teacher's are. `distribution` says
    that it holds probabilities and not logits. Squared errors are shares of `power`, the mean square of what the
    teacher makes, by name: a fixed number, so that the loss of a batch is the mean over its samples, however divided.
    """

    output: str | None
    distribution: bool
    teacher_weight: float
    temperature: float
    features: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    power: Mapping[str, float] = field(default_factory=dict)
    compared: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether the float model must run."""
        return self.teacher_weight > 0 or bool(self.features) or bool(self.others)


def loss_of(
    objective: Objective, made: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], y: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean loss of a batch, ().

    Args:
        objective: what counts.
        made: the student's outputs and features by name, samples first.
        teacher: the same of the teacher; not read if it has no weight.
        y: (n,) int64 class numbers; not read if labels have no weight.
    """
    parts = []
    if objective.output is None:
        outputs = objective.compared or tuple(k for k in teacher if k not in objective.features)
        parts = [_squared(objective, k, made, teacher) for k in outputs]
    else:
        logits = _logits(made[objective.output], objective)
        if objective.teacher_weight > 0:
            soft = _logits(teacher[objective.output], objective)
            parts.append(objective.teacher_weight * divergence(soft, logits, objective.temperature))
        if objective.teacher_weight < 1 and y is not None:
            parts.append((1 - objective.teacher_weight) * functional.cross_entropy(logits, y))
    parts += [_squared(objective, k, made, teacher) for k in (*objective.others, *objective.features)]
    return torch.stack([p.float() for p in parts]).sum()


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over samples of T^2 KL(softmax(teacher / T) || softmax(student / T)), ()."""
    log_p = functional.log_softmax(teacher / temperature, dim=1)
    log_q = functional.log_softmax(student / temperature, dim=1)
    # Rounding makes of none a little less than none.
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).clamp_min(0) * temperature**2


def is_distribution(x: torch.Tensor) -> bool:
    """Say whether every row of `x` (n, classes) is a probability distribution already, as behind a Softmax."""
    return bool((x >= 0).all()) and bool(((x.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all())


def _logits(x: torch.Tensor, objective: Objective) -> torch.Tensor:
    x = x.reshape(len(x), -1)
    return x.clamp_min(_SMALLEST).log() if objective.distribution else x


def _squared(
    objective: Objective, name: str, made: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    return (made[name] - wanted[name]).square().mean() / max(objective.power.get(name, 1.0), _SMALLEST)
