"""Magnitude pruning: the smallest weights of every layer become zero; shapes stay as they are.

A sparse file is not faster on ordinary runtimes; it is smaller to download once it is compressed. In a pattern such as
2:4 sparse matrix units can skip the zeros. They want it along the axis that a product sums over: for a convolution the
input channels, at every tap by itself (TensorRT, "Structured Sparsity"), so that the order of taps does not matter.

Source: Han et al. 2015 (arXiv 1506.02626); Zhu and Gupta 2017 (arXiv 1710.01878); Mishra et al. 2021 (arXiv
2104.08378).
"""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy
from qcore.graph.prunable import Prunable, prunable_layers
from qcore.graph.rewrite import Rewrite
from qcore.graph.traverse import node_name
from qcore.numerics.sparsity import joint_masks, lamp_scores, magnitude_mask, pattern_mask, pattern_of


class PruneStep(Config):
    """Options of the recipe step `prune`: the fraction of weights to zero, and nodes to leave.

    With `scope` layer the fraction is that of every layer, with `scope` model that of all layers together: those whose
    small weights matter less lose more (LAMP). `pattern` N:M instead of a fraction keeps N of every M neighbours along
    the inputs of a layer.
    """

    method: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    scope: Literal["layer", "model"] = "layer"
    pattern: str | None = Field(default=None, pattern=r"^[1-9][0-9]?:[1-9][0-9]?$")
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = self.model_fields_set & {"sparsity", "scope"}
        if self.pattern is not None and given:
            raise ValueError(f"{sorted(given)[0]} and pattern are both given; allowed: one of them")
        if self.pattern is not None:
            pattern_of(self.pattern)
        return self


def prune(model: ir.Model, step: PruneStep) -> Rewrite:
    """Return `model` with exactly `round(sparsity * size)` weights of every Conv, Gemm and MatMul set to zero.

    With `scope` model, of all together; with a pattern N:M, all but N of every M neighbours along the axis of inputs.
    Layers that share weights share the zeros. Biases are kept.

    Raises:
        ModelError: no layer has constant weights that can be pruned so.
    """
    out = editable_copy(model)
    of = None if step.pattern is None else pattern_of(step.pattern)[1]
    layers, skipped = prunable_layers(out, exclude=step.exclude, of=of)
    if not layers:
        why = f" (of {skipped[0].node}: {skipped[0].reason})" if skipped else ""
        raise ModelError(f"no layer can be pruned: no Conv, Gemm or MatMul has float constant weights that fit{why}")
    own: dict[tuple[ir.Value, int], Prunable] = {}
    for layer in layers:
        own.setdefault(_key(layer, step), layer)
    masks = dict(zip(own, _masks(list(own.values()), step), strict=True))
    pruned = {
        key: add_initializer(
            out.graph, f"{la.weight.name}_pruned", np.where(masks[key], la.array, np.zeros_like(la.array))
        )
        for key, la in own.items()
    }
    for layer in layers:
        layer.node.replace_input_with(1, pruned[_key(layer, step)])
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(node_name(la.node) for la in layers), skipped=skipped)


def _key(layer: Prunable, step: PruneStep) -> tuple[ir.Value, int]:
    """Return what layers share that shall have the same zeros."""
    return layer.weight, 0 if step.pattern is None else layer.axis


def _masks(layers: Sequence[Prunable], step: PruneStep) -> list[NDArray[np.bool_]]:
    if step.pattern is not None:
        kept, of = pattern_of(step.pattern)
        return [pattern_mask(la.array, kept, of, axis=la.axis) for la in layers]
    if step.scope == "model":
        return joint_masks([lamp_scores(la.array) for la in layers], step.sparsity)
    return [magnitude_mask(la.array, step.sparsity) for la in layers]
