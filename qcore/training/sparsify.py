"""Zeros that come while a model is trained: which weights are left out is chosen anew every few steps.

The optimizer goes on holding the weights that are left out; those that are needed after all come back. They get no
gradient of their own, but what movement scores add up is the gradient that they would have got.

Movement adds up `-gradient x weight`: half of what a step of gradient descent would change the square of a weight by.
So its score begins with half the square of the weight, and tells how large the weight would be, had it been trained
without being left out. Begun at zero, as in the paper, which fine-tunes for another task, it is noise where a model has
learnt its task already (digits, half of the weights: 11 % instead of 94 %). Gradients count relative to their size, as
in Adam.

Source: Zhu and Gupta 2017 (arXiv 1710.01878) equation 1 for the schedule; Sanh et al. 2020 (arXiv 2005.07683) section 3
for movement.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qcore.errors import ModelError
from qcore.graph.prunable import prunable_layers
from qcore.graph.rewrite import Skipped
from qcore.methods.finetune import Sparsify
from qcore.numerics.sparsity import joint_masks, lamp_scores, magnitude_mask, pattern_mask, pattern_of

Mask = NDArray[np.bool_]
_SMALLEST = 1e-12


class Sparse(torch.nn.Module):
    """Leaves out some weights; their gradient arrives all the same, for the scores. `SparsifiedWeights` uses it up."""

    def __init__(self, w: NDArray[np.floating], axis: int, inner: torch.nn.Module) -> None:
        """Begin with all weights.

        Args:
            w: the weights before training.
            axis: of them that a layer sums over.
            inner: what else is done to them, before.
        """
        super().__init__()
        self.axis, self.inner = axis, inner
        self.mask: torch.Tensor
        self.score: torch.Tensor
        start = torch.from_numpy(np.array(w, np.float32))
        self.size = float(start.square().mean().sqrt())
        self.register_buffer("mask", torch.ones_like(start))
        self.register_buffer("score", start.square() / 2)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Return `w` with zeros where the mask has them; the gradient passes unchanged."""
        w = self.inner(w)
        return w + (w * self.mask - w).detach()


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifiedWeights:
    """What is called when gradients are there: keeps score, chooses, and holds the weights that are left out still.

    `rate` is that at which weights learn, as a share of their size.
    """

    step: Sparsify
    rate: float
    weights: tuple[tuple[Sparse, torch.nn.Parameter], ...]

    def __call__(self, done: int, total: int) -> None:
        """Take step `done` (from 0) of `total`."""
        with torch.no_grad():
            if self.step.score == "movement":
                for sparse, p in self.weights:
                    g = _gradient(p)
                    pace = self.rate * sparse.size / g.square().mean().sqrt().clamp_min(_SMALLEST)
                    sparse.score.sub_(pace * g * p)
            if chooses(self.step, done, total):
                masks = chosen(
                    self.step, [self._scored(s, p) for s, p in self.weights], reached(self.step, done, total)
                )
                for (sparse, _), mask in zip(self.weights, masks, strict=True):
                    sparse.mask.copy_(torch.from_numpy(mask))
            for sparse, p in self.weights:
                _gradient(p).mul_(sparse.mask)

    def _scored(self, sparse: Sparse, p: torch.nn.Parameter) -> tuple[NDArray[np.floating], int]:
        score = (2 * sparse.score.clamp_min(0)).sqrt() if self.step.score == "movement" else sparse.inner(p).abs()
        return score.cpu().numpy(), sparse.axis


def sparse_weights(
    model: ir.Model, step: Sparsify, names: Iterable[str], kept: Mapping[str, torch.nn.Module]
) -> tuple[dict[str, Sparse], tuple[Skipped, ...]]:
    """Return what leaves out weights of `model`, by their names, and the layers that keep theirs, with reasons.

    Args:
        model: float model.
        step: options.
        names: of the weights that are trained.
        kept: what keeps the structure that weights have already, by name.

    Raises:
        ModelError: no layer that is trained can be pruned so.
    """
    of = None if step.pattern is None else pattern_of(step.pattern)[1]
    layers, skipped = prunable_layers(model, exclude=step.exclude, of=of)
    trained = set(names)
    found = {
        str(la.weight.name): Sparse(la.array, la.axis, kept.get(str(la.weight.name), torch.nn.Identity()))
        for la in reversed(layers)
        if la.weight.name in trained
    }
    if not found:
        why = f" (of {skipped[0].node}: {skipped[0].reason})" if skipped else ""
        raise ModelError(f"no layer can be pruned: none that is trained has float constant weights that fit{why}")
    return found, skipped


def steps_until_whole(step: Sparsify, total: int) -> int:
    """Return the number (from 0) of the step, of `total`, in which weights are chosen for the last time."""
    return min(math.floor(step.end * total), total - 1)


def chooses(step: Sparsify, done: int, total: int) -> bool:
    """Say whether weights are chosen in step `done` of `total`."""
    last, first = steps_until_whole(step, total), math.floor(step.start * total)
    return done == last or (first <= done < last and (done - first) % step.every == 0)


def reached(step: Sparsify, done: int, total: int) -> float:
    """Return the share of the aim that is due in step `done`: 0 to 1."""
    if step.schedule == "constant":
        return 1.0
    last, first = steps_until_whole(step, total), math.floor(step.start * total)
    return 1.0 if done >= last else 1 - (1 - (done - first) / (last - first)) ** 3


def chosen(step: Sparsify, scored: Sequence[tuple[NDArray[np.floating], int]], share: float) -> list[Mask]:
    """Return which weights stay.

    Args:
        step: options.
        scored: of each layer the scores, which are sizes of weights, and the axis that it sums over.
        share: of the aim that is due.
    """
    if step.pattern is not None:
        kept, of = pattern_of(step.pattern)
        now = of - round((of - kept) * share)
        return [np.ones(s.shape, bool) if now == of else pattern_mask(s, now, of, axis=a) for s, a in scored]
    sparsity = step.sparsity * share
    if step.scope == "layer":
        return [magnitude_mask(s, sparsity) for s, _ in scored]
    return joint_masks([lamp_scores(s) for s, _ in scored], sparsity)


def _gradient(p: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
