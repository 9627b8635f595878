"""Weight clustering: the weights of every layer take only a few values, so that the file packs well.

The weights stay float32 and run anywhere; a package is smaller because the same few bytes come again and again.

Source: Han et al. 2016, "Deep Compression" (arXiv 1510.00149) section 3.
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
from qcore.numerics.clusters import cluster_centres, clustered

CLUSTERED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SPARSE = 0.1  # share of zeros from which on they are meant


class ClusterStep(Config):
    """Options of the recipe step `cluster`.

    `clusters` distinct values for each weight tensor. `keep_zeros` makes 0 one of them, for zeros alone: `auto` where
    a tenth of the weights or more are zero, as behind `prune`. `exclude` names nodes to leave.
    """

    method: Literal["cluster"] = "cluster"
    clusters: int = Field(default=16, ge=2, le=256)
    keep_zeros: bool | Literal["auto"] = "auto"
    exclude: tuple[str, ...] = ()


def cluster(model: ir.Model, step: ClusterStep) -> Rewrite:
    """Return `model` with at most `clusters` distinct weights in every Conv, ConvTranspose, Gemm and MatMul.

    Weights that several layers share are clustered once. Biases are kept. `changed` names the layers.

    Raises:
        ModelError: no layer has constant weights, a weight is not finite, or `exclude` names no node.
    """
    out = editable_copy(model)
    if missing := set(step.exclude) - {node_name(n) for n in out.graph}:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    changed: list[str] = []
    skipped: list[Skipped] = []
    done: dict[ir.Value, ir.Value] = {}
    for node in [n for n in out.graph if n.op_type in CLUSTERED and n.domain == ""]:
        value, name = node.inputs[1], node_name(node)
        weight = constant_array(value)
        if name in step.exclude:
            skipped.append(Skipped(node=name, op_type=node.op_type, reason="excluded by the recipe"))
        elif value is None or weight is None or weight.dtype not in (np.float16, np.float32, np.float64):
            skipped.append(Skipped(node=name, op_type=node.op_type, reason="its weights are not float constants"))
        else:
            if value not in done:
                if not np.isfinite(weight).all():
                    raise ModelError(f"{name} has weights that are NaN or infinite; export the model again")
                keep = bool(np.mean(weight == 0) >= _SPARSE) if step.keep_zeros == "auto" else step.keep_zeros
                centres = cluster_centres(weight, step.clusters, keep_zeros=keep)
                few = clustered(weight, centres, keep_zeros=keep).astype(weight.dtype)
                done[value] = add_initializer(out.graph, f"{value.name}_clustered", few)
            node.replace_input_with(1, done[value])
            changed.append(name)
    if not changed:
        raise ModelError("no layer can be clustered: no Conv, Gemm or MatMul has float constant weights")
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))
