"""Magnitude pruning: the smallest weights of every layer become zero; shapes stay as they are.

A sparse file is not faster on ordinary runtimes; it is smaller to download once it is compressed.

Source: Han et al. 2015 (arXiv 1506.02626); Zhu and Gupta 2017 (arXiv 1710.01878).
"""

from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name
from qcore.numerics.sparsity import magnitude_mask

PRUNED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class PruneStep(Config):
    """Options of the recipe step `prune`: the fraction of weights to zero in every layer, and nodes to leave."""

    method: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    exclude: tuple[str, ...] = ()


def prune(model: ir.Model, step: PruneStep) -> Rewrite:
    """Return `model` with exactly `round(sparsity * size)` weights of every Conv, Gemm and MatMul set to zero.

    Weights that several layers share are pruned once. Biases are kept.

    Raises:
        ModelError: no layer has constant weights.
    """
    out = editable_copy(model)
    changed: list[str] = []
    skipped: list[Skipped] = []
    pruned: dict[ir.Value, ir.Value] = {}
    for node in [n for n in out.graph if n.op_type in PRUNED and n.domain == ""]:
        value = node.inputs[1]
        weight = constant_array(value)
        reason = None
        if node_name(node) in step.exclude:
            reason = "excluded by the recipe"
        elif value is None or weight is None or not np.issubdtype(weight.dtype, np.floating):
            reason = "its weights are not float constants"
        if reason is not None or value is None or weight is None:
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=str(reason)))
            continue
        if value not in pruned:
            kept = np.where(magnitude_mask(weight, step.sparsity), weight, np.zeros_like(weight))
            pruned[value] = add_initializer(out.graph, f"{value.name}_pruned", kept)
        node.replace_input_with(1, pruned[value])
        changed.append(node_name(node))
    if not changed:
        raise ModelError("no layer can be pruned: no Conv, Gemm or MatMul has float constant weights")
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))
