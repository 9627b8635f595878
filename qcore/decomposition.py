"""Which layers of a model become chains of factors, and of what rank: measured on samples, one layer at a time.

A layer's weights are replaced by what its factors amount to, which gives the outputs of the chain without a new graph;
how far the outputs of the whole model move is the score of that rank (`output_error`: KL for classifiers). One
threshold on the scores of all layers then holds the budget (`numerics/ranks.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.errors import ConfigError, ModelError
from qcore.graph.chain import FactorLayer, bias_of
from qcore.graph.cost import node_macs
from qcore.graph.edit import editable_copy
from qcore.graph.io import serialize_model
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, node_name
from qcore.graph.windows import window_of
from qcore.methods.decompose import DecomposeStep, NewLayer, candidates, decompose, layers_to_decompose, with_weight
from qcore.numerics.error import output_error
from qcore.numerics.factors import Array, factorize, reconstruct, refine
from qcore.numerics.ranks import LayerRanks, RankScore, choose, cost, monotone
from qcore.numerics.refine import LayerMoments, MomentSums
from qcore.numerics.windows import windows_at
from qcore.recovery import Evidence, Tensors
from qcore.runtime.nodewise import expose
from qcore.runtime.ort import Predict, load_unfused

Told = Callable[[str, int, int], None]
_MOST_MOMENTS = (
    1 << 24
)  # numbers in the moments of layers that are looked at together: 128 MiB, three times while summing
_MOST_INPUTS = 5000  # inputs times taps of a layer whose moments are taken; larger ones count all inputs alike


@dataclass(frozen=True, kw_only=True, slots=True)
class Decomposed:
    """The model with its chains, and for every layer that could have been one: its scores and what was chosen.

    `before` and `after` are the model's multiply-accumulates, or weights where the budget is one of size.
    """

    rewrite: Rewrite
    layers: tuple[LayerRanks, ...]
    before: int
    after: int


def decompose_to_budget(model: ir.Model, step: DecomposeStep, evidence: Evidence, told: Told) -> Decomposed:
    """Return `model` with chains of factors that hold the budget of `step` at the least score.

    Args:
        model: float model.
        step: options.
        evidence: samples; those to fit give moments and scores.
        told: called with what is done, how much of it, and of how much.

    Raises:
        ConfigError: no choice of ranks holds the budget.
        ModelError: the model gives NaN or infinity on the samples.
    """
    layers, skipped = layers_to_decompose(model, step)
    scored = _scores(model, layers, step, evidence, told)
    size = step.size is not None
    before = _total(model, layers, size=size)
    rest = before - sum(cost(la, size=size) for la in scored)
    chosen = choose(scored, step.kept * before - rest, size=size)
    if chosen is None:
        ways = [[la, *(replace(la, chosen=k) for k in range(len(la.scores)))] for la in scored]
        least = rest + sum(min(cost(way, size=size) for way in of_layer) for of_layer in ways)
        raise ConfigError(
            f"decompose cannot keep {step.kept:.0%} of the {'weights' if size else 'multiplications'}: the smallest "
            f"ranks leave {least / before:.0%}; allow more, lower multiple ({step.multiple}), or add kinds"
        )
    ranked = {la.node: la.choice for la in chosen}
    new: dict[str, NewLayer] = {}
    decomposed = model
    wanted = [(la, choice) for la in layers if (choice := ranked[node_name(la.node)]) is not None]
    for k, (layer, choice) in enumerate(wanted):
        told("factors", k, len(wanted))
        new[node_name(layer.node)] = _factored(layer, choice, _paired(layer, model, decomposed, step, evidence))
        decomposed = decompose(model, new).model
    told("factors", len(wanted), len(wanted))
    after = rest + sum(cost(la, size=size) for la in chosen)
    left = [_left_alone(la) for la in chosen if la.choice is None]
    return Decomposed(
        rewrite=Rewrite(model=decomposed, changed=tuple(new), skipped=(*skipped, *left)),
        layers=chosen,
        before=before,
        after=after,
    )


def _left_alone(layer: LayerRanks) -> Skipped:
    reason = "the budget holds without it" if layer.scores else "no chain of these kinds and ranks is cheaper"
    return Skipped(node=layer.node, op_type=layer.op_type, reason=reason)


def _total(model: ir.Model, layers: Sequence[FactorLayer], *, size: bool) -> int:
    if not size:
        return sum(node_macs(model).values())
    arrays = [constant_array(v) for v in editable_copy(model).graph.initializers.values()]
    return sum(a.size for a in arrays if a is not None and a.dtype.kind == "f")


def _scores(
    model: ir.Model, layers: Sequence[FactorLayer], step: DecomposeStep, evidence: Evidence, told: Told
) -> list[LayerRanks]:
    """Return the layers with the measured scores of their candidates."""
    samples = evidence.some(evidence.fit, step.samples)
    reference = _outputs(model, samples)
    scored = []
    for k, (layer, moments) in enumerate(_with_moments(model, layers, step, evidence)):
        told("scores", k, len(layers))
        name, measured = node_name(layer.node), []
        gram = None if moments is None else moments.covariance[0]
        for score, weight in candidates(layer, gram, step):
            moved = _outputs(with_weight(model, name, weight, _moved_bias(layer, moments, weight)), samples)
            try:
                error = output_error(reference, moved, evidence.task)
            except ValueError as e:
                raise ModelError(f"outputs cannot be compared: {e}; check the model and the preprocessing") from e
            measured.append(replace(score, score=error))
        scored.append(
            LayerRanks(
                node=name,
                op_type=layer.node.op_type,
                macs=layer.shape.macs,
                parameters=layer.shape.parameters,
                scores=monotone(measured),
            )
        )
    told("scores", len(layers), len(layers))
    return scored


def _outputs(model: ir.Model, samples: Sequence[Tensors]) -> dict[str, NDArray[np.generic]]:
    predict = load_unfused(serialize_model(model)).predict
    parts = [predict(sample) for sample in samples]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _factored(layer: FactorLayer, choice: RankScore, moments: LayerMoments | None) -> NewLayer:
    """Return the chosen factors, brought closer to what the layer should give, and the bias that goes along.

    The layers before it are chains already, so it reads something else than the original does.
    """
    if moments is None:
        return NewLayer(factors=factorize(choice.kind, layer.weight, choice.ranks))
    gram = moments.covariance[0]
    factors = refine(factorize(choice.kind, layer.weight, choice.ranks, gram), moments.cross[0], gram)
    return NewLayer(factors=factors, bias=_moved_bias(layer, moments, reconstruct(factors)))


def _moved_bias(layer: FactorLayer, moments: LayerMoments | None, weight: Array) -> Array | None:
    """Return the bias that keeps the mean of every output for another `weight`, None where there is no place for it."""
    bias, replaceable = bias_of(layer.node)
    if bias is None or not replaceable or moments is None:
        return None
    alpha = float_attribute(layer.node, "alpha", 1.0) if layer.node.op_type == "Gemm" else 1.0
    moved: Array = bias + alpha * (moments.mean_out[0] - weight.reshape(len(weight), -1) @ moments.mean_in[0])
    return moved


def _with_moments(
    model: ir.Model, layers: Sequence[FactorLayer], step: DecomposeStep, evidence: Evidence
) -> Iterator[tuple[FactorLayer, LayerMoments | None]]:
    """Yield the layers with the moments of what they read; None for those that read too many values.

    The samples run once for as many layers as fit in memory together.
    """
    group: list[FactorLayer] = []
    room = _MOST_MOMENTS
    for layer in layers:
        need = _inputs(layer) ** 2
        if group and need > room:
            yield from _moments(model, group, step, evidence)
            group, room = [], _MOST_MOMENTS
        group.append(layer)
        room -= need
    if group:
        yield from _moments(model, group, step, evidence)


def _moments(
    model: ir.Model, layers: Sequence[FactorLayer], step: DecomposeStep, evidence: Evidence
) -> Iterator[tuple[FactorLayer, LayerMoments | None]]:
    sums = {node_name(la.node): _sums(la) for la in layers if _inputs(la) <= _MOST_INPUTS}
    read = _reader(model, layers, evidence)
    for k, batch in enumerate(evidence.fit):
        made = read(batch)
        for la in (la for la in layers if node_name(la.node) in sums):
            _add(sums[node_name(la.node)], la, made, made, (step.positions, k))
        del made
    for la in layers:
        found = sums.pop(node_name(la.node), None)
        moments = None if found is None else found.moments(centred=bias_of(la.node)[1])
        if moments is not None and not np.isfinite(moments.covariance).all():
            raise ModelError(f"{node_name(la.node)} reads NaN or infinity; check the model and the preprocessing")
        yield la, moments


def _paired(
    layer: FactorLayer, model: ir.Model, changed: ir.Model, step: DecomposeStep, evidence: Evidence
) -> LayerMoments | None:
    """Return the moments of what `layer` reads in the `changed` model, and of what it gives in the original one."""
    if _inputs(layer) > _MOST_INPUTS:
        return None
    sums = _sums(layer)
    original, now = (_reader(m, [layer], evidence) for m in (model, changed))
    for k, batch in enumerate(evidence.fit):
        _add(sums, layer, original(batch), now(batch), (step.positions, k))
    return sums.moments(centred=bias_of(layer.node)[1])


def _inputs(layer: FactorLayer) -> int:
    return int(layer.weight[0].size)


def _sums(layer: FactorLayer) -> MomentSums:
    return MomentSums(1, len(layer.weight), _inputs(layer))


def _reader(model: ir.Model, layers: Sequence[FactorLayer], evidence: Evidence) -> Predict:
    """Return the function from inputs of `model` to what `layers` read, by tensor name."""
    fed = evidence.fit[0].keys() if evidence.fit else ()
    names = tuple(dict.fromkeys(str(la.node.inputs[0].name) for la in layers if la.node.inputs[0] is not None))
    predict = expose(model, [name for name in names if name not in fed])
    return lambda batch: {**batch, **predict(batch)}


def _add(sums: MomentSums, layer: FactorLayer, wanted: Tensors, made: Tensors, sampled: tuple[int, int]) -> None:
    """Add what sampled outputs of `layer` see in `made`, and what they are where the layer reads `wanted`."""
    source = layer.node.inputs[0]
    assert source is not None  # noqa: S101 - layer_refusal has looked
    original, now = (_rows(layer, np.asarray(t[str(source.name)], np.float32), *sampled) for t in (wanted, made))
    flat = layer.weight.reshape(len(layer.weight), -1).astype(np.float32)
    sums.add(now[None], (original @ flat.T)[None])


def _rows(layer: FactorLayer, x: NDArray[np.float32], positions: int, seed: int) -> NDArray[np.float32]:
    """Return what sampled outputs see, (rows, inputs)."""
    node = layer.node
    if node.op_type != "Conv":
        x = x.T if node.op_type == "Gemm" and int_attribute(node, "transA", 0) else x
        return x.reshape(-1, x.shape[-1])
    weight = constant_array(node.inputs[1])
    assert weight is not None  # noqa: S101 - layer_refusal has looked
    x = x if x.ndim == 4 else x[:, :, None, :]
    window = window_of(node, weight.shape[2:], (x.shape[2], x.shape[3]))
    height, width = layer.shape.out
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(height * width)[:positions] for _ in range(len(x))])
    seen: NDArray[np.float32] = windows_at(x, window, chosen // width, chosen % width, 1)[0]
    return seen
