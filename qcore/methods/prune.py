"""Magnitude pruning: the smallest weights of every layer become zero; shapes stay as they are.

A sparse file is not faster on ordinary runtimes; it is smaller to download once it is compressed. In a pattern such as
2:4 sparse matrix units can skip the zeros. They want it along the axis that a product sums over: for a convolution the
input channels, at every tap by itself (TensorRT, "Structured Sparsity"), so that the order of taps does not matter.

Source: Han et al. 2015 (arXiv 1506.02626); Zhu and Gupta 2017 (arXiv 1710.01878); Mishra et al. 2021 (arXiv
2104.08378).
"""

from typing import Literal, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.numerics.sparsity import magnitude_mask, pattern_mask

PRUNED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class PruneStep(Config):
    """Options of the recipe step `prune`: the fraction of weights to zero in every layer, and nodes to leave.

    `pattern` N:M instead of a fraction keeps N of every M neighbours along the inputs of a layer.
    """

    method: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    pattern: str | None = Field(default=None, pattern=r"^[1-9][0-9]?:[1-9][0-9]?$")
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.pattern is not None and "sparsity" in self.model_fields_set:
            raise ValueError("sparsity and pattern are both given; allowed: one of them")
        kept, of = self.kept or (1, 2)
        if kept >= of:
            raise ValueError(f"pattern {self.pattern} keeps everything; allowed: N:M with N < M")
        return self

    @property
    def kept(self) -> tuple[int, int] | None:
        """How many weights of how many neighbours `pattern` keeps; None without one."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)


def prune(model: ir.Model, step: PruneStep) -> Rewrite:
    """Return `model` with exactly `round(sparsity * size)` weights of every Conv, Gemm and MatMul set to zero.

    With a pattern N:M, all but N of every M neighbours along the axis of inputs. Layers that share weights share the
    zeros. Biases are kept.

    Raises:
        ModelError: no layer has constant weights that can be pruned so.
    """
    out = editable_copy(model)
    changed: list[str] = []
    skipped: list[Skipped] = []
    pruned: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in [n for n in out.graph if n.op_type in PRUNED and n.domain == ""]:
        value = node.inputs[1]
        weight = constant_array(value)
        reason = None
        if node_name(node) in step.exclude:
            reason = "excluded by the recipe"
        elif value is None or weight is None or not np.issubdtype(weight.dtype, np.floating):
            reason = "its weights are not float constants"
        elif step.kept is not None:
            reason = _pattern_refusal(node, weight, step.kept[1])
        if reason is not None or value is None or weight is None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=str(reason)))
            continue
        key = (value, 0 if step.kept is None else _input_axis(node, weight.ndim))
        if key not in pruned:
            kept = np.where(_mask(node, weight, step), weight, np.zeros_like(weight))
            pruned[key] = add_initializer(out.graph, f"{value.name}_pruned", kept)
        node.replace_input_with(1, pruned[key])
        changed.append(node_name(node))
    if not changed:
        why = f" (of {skipped[0].node}: {skipped[0].reason})" if skipped else ""
        raise ModelError(f"no layer can be pruned: no Conv, Gemm or MatMul has float constant weights that fit{why}")
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _mask(node: ir.Node, weight: NDArray[np.floating], step: PruneStep) -> NDArray[np.bool_]:
    if step.kept is None:
        return magnitude_mask(weight, step.sparsity)
    return pattern_mask(weight, *step.kept, axis=_input_axis(node, weight.ndim))


def _input_axis(node: ir.Node, dimensions: int) -> int:
    """Return the axis of a layer's weights that its products sum over, channels only."""
    match node.op_type:
        case "Conv":
            return 1
        case "ConvTranspose":
            return 0
        case "Gemm":
            return 1 if int_attribute(node, "transB", 0) else 0
        case _:
            return max(dimensions - 2, 0)


def _pattern_refusal(node: ir.Node, weight: NDArray[np.floating], of: int) -> str | None:
    """Return why no pattern over `of` inputs can be laid on the weights of `node`, or None."""
    if node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1:
        return "its input channels are in groups"
    inputs = weight.shape[_input_axis(node, weight.ndim)]
    return f"it has {inputs} inputs per output and tap, fewer than {of}" if inputs < of else None
