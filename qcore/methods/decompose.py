"""Tensor decomposition: a layer becomes a chain of small ones that multiply less.

Which layers, which chains and which ranks is found by measuring (`qcore/decomposition.py`); here are the options, the
layers that may be written so, the candidates of each, and the rewrite.

Sources are those of `qcore/numerics/factors.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import onnx_ir as ir
from pydantic import Field, model_validator

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.chain import (
    FACTORABLE,
    FactorLayer,
    factor_layer,
    layer_refusal,
    replace_bias,
    replace_by_chain,
    replace_weight,
)
from qcore.graph.edit import drop_unused_initializers, editable_copy
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.shapes import single_sample
from qcore.graph.traverse import node_name
from qcore.numerics.factors import Array, Factors, Kind, channel_tails, factorize, output_share, reconstruct
from qcore.numerics.ranks import (
    RankScore,
    chain_macs,
    chain_parameters,
    kinds_for,
    layer_macs,
    ranks_within,
)

SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
"""Shares of a layer's multiplications that its candidates may need."""
EXPLORED_SWEEPS = 12
_MOST_WORK = 1 << 29  # weights times rank: alternating least squares take seconds from there on
_KEPT_MACS = 0.5


class DecomposeStep(Config):
    """Options of the recipe step `decompose`.

    `macs` is the share of the model's multiply-accumulates that may be left, `size` that of its weights; one of them,
    0.5 of `macs` without either. `kinds` are the chains to try. Ranks are multiples of `multiple`: vector kernels
    compute 16 channels (AVX-512; 8 on AVX2) at the price of one. `samples` measure the scores, `positions` of each
    feature map tell what a convolution reads. `exclude` names nodes to leave.
    """

    method: Literal["decompose"] = "decompose"
    macs: float | None = Field(default=None, gt=0, lt=1)
    size: float | None = Field(default=None, gt=0, lt=1)
    kinds: tuple[Kind, ...] = Field(default=("svd", "spatial", "tucker2", "cp", "depthwise"), min_length=1)
    multiple: int = Field(default=16, ge=1)
    samples: int = Field(default=64, ge=1)
    positions: int = Field(default=64, ge=1)
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.macs is not None and self.size is not None:
            raise ValueError("macs and size are both given; allowed: one budget; leave one out")
        return self

    @property
    def kept(self) -> float:
        """The share of multiply-accumulates, or of weights if `size` is given, that may be left."""
        return self.size or self.macs or _KEPT_MACS


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLayer:
    """What a layer becomes: `factors`, and its bias (outputs,); None leaves the bias as it is."""

    factors: Factors
    bias: Array | None = None


def layers_to_decompose(model: ir.Model, step: DecomposeStep) -> tuple[tuple[FactorLayer, ...], tuple[Skipped, ...]]:
    """Return the layers of `model` that may become chains, in graph order, and the others with the reason.

    Raises:
        ModelError: `exclude` names no node.
    """
    copy = editable_copy(model)
    sized = {node_name(n): n for n in single_sample(copy).graph}
    if missing := set(step.exclude) - sized.keys():
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    layers: list[FactorLayer] = []
    skipped: list[Skipped] = []
    for node in [n for n in copy.graph if n.op_type in FACTORABLE and n.domain == ""]:
        reason = "excluded by the recipe" if node_name(node) in step.exclude else layer_refusal(node)
        if reason is None and step.size is not None and len(list(node.inputs[1].uses())) > 1:  # type: ignore[union-attr]
            reason = "it shares its weights, so factors of its own would make the file larger"
        layer = factor_layer(node, sized[node_name(node)]) if reason is None else None
        if layer is not None:
            layers.append(layer)
        else:
            reason = reason or "its shape is not known for one sample"
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=reason))
    return tuple(layers), tuple(skipped)


def candidates(layer: FactorLayer, gram: Array | None, step: DecomposeStep) -> tuple[tuple[RankScore, Array], ...]:
    """Return for every share the chain of least error within it, and the weights that it amounts to.

    A chain counts only if it is cheaper than the layer in multiplications and in weights, also where channels are
    padded to `multiple`: that is what vector kernels do, so a chain that saves on paper alone is none.

    Args:
        layer: to decompose.
        gram: as in `factors.factorize`.
        step: options.
    """
    shape, w = layer.shape, layer.weight
    tails = channel_tails(w, gram)
    found: dict[tuple[Kind, tuple[int, ...]], tuple[RankScore, Array]] = {}
    best: list[tuple[RankScore, Array]] = []
    for share in SHARES:
        for kind in (k for k in kinds_for(shape) if k in step.kinds):
            ranks = ranks_within(kind, shape, share * shape.macs, step.multiple, tails)
            if ranks is None or (kind, ranks) in found or not _pays(kind, ranks, layer, step):
                continue
            v = reconstruct(factorize(kind, w, ranks, gram, sweeps=EXPLORED_SWEEPS))
            macs, parameters = chain_macs(kind, ranks, shape), chain_parameters(kind, ranks, shape)
            score = RankScore(kind=kind, ranks=ranks, macs=macs, parameters=parameters, share=output_share(w, v, gram))
            found[kind, ranks] = (score, v)
        within = [f for f in found.values() if f[0].macs <= share * shape.macs]
        if within and (chosen := min(within, key=lambda f: f[0].share)) not in best:
            best.append(chosen)
    return tuple(best)


def _pays(kind: Kind, ranks: tuple[int, ...], layer: FactorLayer, step: DecomposeStep) -> bool:
    shape = layer.shape
    if kind in ("cp", "depthwise") and shape.parameters * ranks[0] > _MOST_WORK:
        return False
    fewer = chain_parameters(kind, ranks, shape) < shape.parameters
    return fewer and chain_macs(kind, ranks, shape, step.multiple) < layer_macs(shape, step.multiple)


def with_weight(model: ir.Model, node: str, weight: Array, bias: Array | None) -> ir.Model:
    """Return `model` with other weights (outputs, inputs, height, width) in one layer, and a bias where it is given.

    The outputs are those of the chain that the weights come from; the graph stays as it is.
    """
    copy = editable_copy(model)
    layer = next(n for n in copy.graph if node_name(n) == node)
    replace_weight(copy.graph, layer, weight)
    if bias is not None:
        replace_bias(copy.graph, layer, bias)
    drop_unused_initializers(copy.graph)
    return copy


def decompose(model: ir.Model, new: Mapping[str, NewLayer]) -> Rewrite:
    """Return `model` with a chain in the place of every layer named in `new`; `changed` names the layers.

    Names of the nodes of a chain are those of the layer and `chain.PARTS`.
    """
    out = editable_copy(model)
    changed = []
    for node in [n for n in out.graph if node_name(n) in new]:
        name = node_name(node)
        layer = new[name]
        if layer.bias is not None:
            replace_bias(out.graph, node, layer.bias)
        replace_by_chain(out.graph, node, layer.factors)
        changed.append(name)
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed))
