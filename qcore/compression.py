"""One compression run: the steps of a recipe applied in order, and which of them are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, assert_never

import numpy as np
import onnx_ir as ir

from qcore.channel_pruning import prune_channels
from qcore.config import Config
from qcore.decomposition import decompose_to_budget
from qcore.errors import ConfigError
from qcore.graph.finite import refuse_non_finite_weights
from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.rewrite import Resized, Rewrite, Skipped
from qcore.methods.absorb_bias import AbsorbBiasStep, absorb_bias, activations_to_absorb
from qcore.methods.cluster import ClusterStep, cluster
from qcore.methods.correct_bias import CorrectBiasStep, correct_bias, correct_bias_analytically, inputs_of_layers
from qcore.methods.decompose import DecomposeStep
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.methods.equalize import EqualizeStep, equalize
from qcore.methods.finetune import Epoch, FinetuneStep, QatStep
from qcore.methods.half import Float16Step, to_float16
from qcore.methods.prune import PruneStep, prune
from qcore.methods.prune_channels import PruneChannelsStep
from qcore.methods.quantize import QuantizeStep, quantize
from qcore.methods.round_weights import RoundWeightsStep, round_weights
from qcore.methods.smooth import SmoothStep, smooth, tensors_to_smooth
from qcore.methods.weights import QuantizeWeightsStep, quantize_weights
from qcore.numerics.ranks import LayerRanks
from qcore.recipe import AFTER, BEFORE, FREE, TRAINING, FoldBatchnormStep, GemmHeadStep, Recipe, check_order
from qcore.recovery import Evidence, Tensors, channel_statistics, output_distance
from qcore.refinement import refine_layers
from qcore.target import TargetProfile

if TYPE_CHECKING:
    from qcore.training.finetune import Lessons, Schooling


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedStep:
    """What one step did: method, names that changed, nodes that were left alone and why.

    For a recovery step `error_before` and `error_after` are the distances of the quantized model from the float one on
    held-out samples, without and with the step, and `kept` says whether it is in the result; `reason` says why not
    where nothing was measured. For a step that trains they are the losses on the validation samples, `epochs` how it
    went from the state before training on, `best` the number of the epoch that is kept, and `samples` how many were
    learnt from. `layers` are those that `decompose` looked at, with the scores of their ranks; `resized` says what
    became smaller, where that is the aim of the step.
    """

    method: str
    changed: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    kept: bool = True
    error_before: float | None = None
    error_after: float | None = None
    reason: str | None = None
    epochs: tuple[Epoch, ...] = ()
    layers: tuple[LayerRanks, ...] = ()
    best: int | None = None
    samples: int = 0
    resized: tuple[Resized, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """The model after a recipe, what each step did, and the error on held-out samples where it was measured.

    `reference` is the float model that was quantized: with the channel scales of the result, where they were changed.
    `error` was measured before the steps behind `quantize` were made again from all samples.
    """

    model: ir.Model
    reference: ir.Model
    steps: tuple[AppliedStep, ...]
    error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What the runs of several recipes on one model share: float steps that were done, and who is told of each step.

    `told` gets the method, the number of steps done, and of how many; `within` the same of what a long step does. The
    float models in `done` stay in memory.
    `school` gives what a step at some position trains with; None where nothing trains.
    """

    done: dict[tuple[int, str, str], tuple[ir.Model, Rewrite]] = field(default_factory=dict)
    told: Callable[[str, int, int], None] = lambda method, done, total: None
    within: Callable[[str, int, int], None] = lambda what, done, total: None
    school: "Callable[[TRAINING, int], Schooling] | None" = None


def compress(
    model: ir.Model, recipe: Recipe, target: TargetProfile, evidence: Evidence | None, shared: Shared | None = None
) -> Compressed:
    """Return `model` after all steps of `recipe` that are kept; the argument is not changed.

    Args:
        model: float model.
        recipe: steps in order.
        target: profile of the device.
        evidence: what calibration data say; None where no step needs any.
        shared: of several recipes on the same `model` and `evidence`.

    Raises:
        ConfigError: a step needs calibration data and there are none.
        ModelError: a weight is NaN or infinite.
    """
    check_order(recipe)
    refuse_non_finite_weights(model)
    shared = shared or Shared()
    asked = asked_of(target, recipe)
    run = _Run(recipe=recipe, target=asked, evidence=evidence, original=model, reference=model, shared=shared)
    applied, reference = [], model
    kept: list[AFTER] = []
    for position, step in enumerate(recipe.steps):
        shared.told(step.method, position, len(recipe.steps))
        match step:
            case EqualizeStep() | SmoothStep() | AbsorbBiasStep():
                model, done = _prepare(run, model, step)
            case DecomposeStep():
                model, done = _decomposed(run, model, step)
            case QuantizeStep():
                reference, rewrite = model, _quantized(run, model)
                model, done = _plainly(step.method, rewrite)
            case CorrectBiasStep() | RoundWeightsStep():
                model, done = _mend(run, model, reference, step)
                kept += [step] if done.kept else []
            case FinetuneStep():
                model, done = _finetuned(run, model, step, position)
                run = replace(run, reference=model, distances={})
            case QatStep():
                model, kept = (_of_all_samples(run, model, reference, kept) if kept else model), []
                model, done = _aware(run, (model, reference), step, position)
            case PruneChannelsStep():
                trials = partial(shared.within, f"{step.method}, trials")
                make = partial(prune_channels, model, step, _known(run), told=trials)
                model, done = _plainly(step.method, _once(run, model, step, make))
            case _:
                make = partial(apply_step, model, step, target)
                model, done = _plainly(step.method, _once(run, model, step, make))
        applied.append(done)
    if kept:
        model = _of_all_samples(run, model, reference, kept)
    shared.told(recipe.steps[-1].method, len(recipe.steps), len(recipe.steps))
    judged = [s for s in applied if s.error_after is not None and not s.epochs]
    measured = [s.error_after if s.kept else s.error_before for s in judged]
    return Compressed(model=model, reference=reference, steps=tuple(applied), error=measured[-1] if measured else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One recipe being applied; quantized models and distances are kept, since recovery steps ask for them again.

    `reference` is what recovery comes close to: `original`, or what training made of it.
    """

    recipe: Recipe
    target: TargetProfile
    evidence: Evidence | None
    original: ir.Model
    reference: ir.Model
    shared: Shared
    quantized: dict[int, tuple[ir.Model, Rewrite]] = field(default_factory=dict)
    distances: dict[int, tuple[ir.Model, float]] = field(default_factory=dict)


def asked_of(target: TargetProfile, recipe: Recipe) -> TargetProfile:
    """Return `target` with one scale per tensor where the recipe asks for that."""
    step = recipe.quantize_step
    if step is None or step.per_channel is None or step.per_channel == target.weights_per_channel:
        return target
    if step.per_channel:
        raise ConfigError(
            f"recipe {recipe.name} asks for a scale per channel, which {target.name} cannot use; allowed: per_channel: "
            "false, or leave it out"
        )
    return target.model_copy(update={"weights_per_channel": False})


def _known(run: _Run) -> Evidence:
    if run.evidence is None:
        raise ConfigError(f"recipe {run.recipe.name} needs calibration data; run `qcore compress` with --data")
    return run.evidence


def _quantized(run: _Run, model: ir.Model) -> Rewrite:
    step = run.recipe.quantize_step
    assert step is not None  # noqa: S101 - check_order has looked
    if id(model) not in run.quantized:
        run.quantized[id(model)] = (model, quantize(model, step, run.target, _known(run).table(model)))
    return run.quantized[id(model)][1]


def _distance(run: _Run, model: ir.Model) -> float:
    if id(model) not in run.distances:
        run.distances[id(model)] = (model, output_distance(model, run.reference, _known(run)))
    return run.distances[id(model)][1]


def _once(run: _Run, model: ir.Model, step: Config, make: Callable[[], Rewrite]) -> Rewrite:
    """Return what `make` gives for a float step on `model`, made once for all recipes that share it."""
    key = (id(model), step.sha256, run.target.sha256)
    if key not in run.shared.done:
        run.shared.done[key] = (model, make())  # the model too: as long as it lives, its id is its own
    return run.shared.done[key][1]


def _decomposed(run: _Run, model: ir.Model, step: DecomposeStep) -> tuple[ir.Model, AppliedStep]:
    made = decompose_to_budget(model, step, _known(run), run.shared.within)
    changed, skipped = made.rewrite.changed, made.rewrite.skipped
    done = AppliedStep(method=step.method, changed=changed, skipped=skipped, layers=made.layers)
    return made.rewrite.model, done


def _unjudged(run: _Run, step: BEFORE | AFTER) -> AppliedStep | None:
    """Return the step as it was left out because no samples are held out to judge it, or None."""
    evidence = _known(run)
    if evidence.held_out:
        return None
    have = f"{len(evidence.fit)} batches of {evidence.batch}" if evidence.batch > 1 else f"{len(evidence.fit)} samples"
    reason = f"not judged: of {have} none can be held out; at least 4 are needed"
    return AppliedStep(method=step.method, changed=(), skipped=(), kept=False, reason=reason)


def _plainly(method: str, rewrite: Rewrite) -> tuple[ir.Model, AppliedStep]:
    """Return the model of a step that nobody judges, and the step as it went."""
    done = AppliedStep(method=method, changed=rewrite.changed, skipped=rewrite.skipped, resized=rewrite.resized)
    return rewrite.model, done


def _prepare(run: _Run, model: ir.Model, step: BEFORE) -> tuple[ir.Model, AppliedStep]:
    if (left := _unjudged(run, step)) is not None:
        return model, left
    rewrite = _once(run, model, step, lambda: _prepared(run, model, step))
    before, after = (_distance(run, _quantized(run, m).model) for m in (model, rewrite.model))
    return _better(step.method, (model, before), (rewrite, after))


def _prepared(run: _Run, model: ir.Model, step: BEFORE) -> Rewrite:
    evidence = _known(run)
    match step:
        case EqualizeStep():
            return equalize(model, step, run.target, channel_statistics(model, evidence))
        case SmoothStep():
            stats = channel_statistics(model, evidence, dict.fromkeys(tensors_to_smooth(model), -1))
            return smooth(model, {k: np.maximum(-v.low, v.high) for k, v in stats.items()}, step)
        case AbsorbBiasStep():
            return absorb_bias(model, step, channel_statistics(model, evidence, activations_to_absorb(model)))
        case _:
            assert_never(step)


def _mend(run: _Run, model: ir.Model, reference: ir.Model, step: AFTER) -> tuple[ir.Model, AppliedStep]:
    if (left := _unjudged(run, step)) is not None:
        return model, left
    rewrite = _mended(run, model, reference, step, _known(run).fit)
    before, after = _distance(run, model), _distance(run, rewrite.model)
    return _better(step.method, (model, before), (rewrite, after))


def _mended(run: _Run, model: ir.Model, reference: ir.Model, step: AFTER, samples: tuple[Tensors, ...]) -> Rewrite:
    evidence, quantize_step = _known(run), run.recipe.quantize_step
    assert quantize_step is not None  # noqa: S101 - check_order has looked
    floats = run.target.bias == "float"
    if isinstance(step, CorrectBiasStep) and step.kind == "analytic":
        maps = channel_statistics(reference, evidence, dict.fromkeys(inputs_of_layers(reference, "Conv"), 1))
        rows = channel_statistics(reference, evidence, dict.fromkeys(inputs_of_layers(reference, "Gemm", "MatMul"), -1))
        return correct_bias_analytically(model, reference, maps, rows, float_biases=floats)
    exact = run.target.power_of_two_scales
    bits = run.target.weight_scheme(0, bits=quantize_step.weight_bits).width
    refine = (
        correct_bias if isinstance(step, CorrectBiasStep) else partial(round_weights, step=step, bits=bits, exact=exact)
    )
    some = evidence.some(samples, step.samples)
    return refine_layers(model, reference, some, refine, step.positions, float_biases=floats)


def _school(run: _Run, step: TRAINING, position: int) -> "Schooling":
    if run.shared.school is None:
        raise ConfigError(
            f"recipe {run.recipe.name} trains (step {step.method}), which needs samples to learn from; run `qcore "
            "compress` or `qcore finetune` with --data"
        )
    return run.shared.school(step, position)


def _finetuned(run: _Run, model: ir.Model, step: FinetuneStep, position: int) -> tuple[ir.Model, AppliedStep]:
    school = _school(run, step, position)
    from qcore.training.finetune import finetune  # torch is an extra, and slow to import

    return _taught(step, model, finetune(model, run.original, step, school))


def _aware(run: _Run, models: tuple[ir.Model, ir.Model], step: QatStep, position: int) -> tuple[ir.Model, AppliedStep]:
    school, quantize_step = _school(run, step, position), run.recipe.quantize_step
    assert quantize_step is not None  # noqa: S101 - check_order has looked
    from qcore.training.finetune import quantization_aware

    formats = (run.target, quantize_step.weight_bits)
    return _taught(step, models[0], quantization_aware(models[0], (models[1], run.original), step, formats, school))


def _taught(step: TRAINING, before: ir.Model, lessons: "Lessons") -> tuple[ir.Model, AppliedStep]:
    """Return the model as training left it, and how that went."""
    start, best = lessons.epochs[0], lessons.epochs[lessons.best]
    kept = lessons.best > 0
    done = AppliedStep(
        method=step.method,
        changed=lessons.rewrite.changed,
        skipped=lessons.rewrite.skipped,
        kept=kept,
        error_before=start.validation,
        error_after=best.validation if kept else min(e.validation for e in lessons.epochs[1:]),
        epochs=lessons.epochs,
        best=lessons.best,
        samples=lessons.samples,
    )
    return (lessons.rewrite.model if kept else before), done


def _of_all_samples(run: _Run, model: ir.Model, reference: ir.Model, kept: list[AFTER]) -> ir.Model:
    """Return the model with the `kept` steps behind quantize made again from all samples, held-out ones too.

    Held-out samples have done their work when it is decided what is kept; a third more samples make rounding better.
    Where the steps did not use all the others, the model stays as it is.
    """
    evidence = _known(run)
    everything = evidence.everything
    if not kept or len(everything) == len(evidence.fit):
        return model
    if any(len(evidence.some(evidence.fit, step.samples)) < len(evidence.fit) for step in kept):
        return model
    model = _quantized(run, reference).model
    for step in kept:
        model = _mended(run, model, reference, step, everything).model
    return model


def _better(method: str, before: tuple[ir.Model, float], after: tuple[Rewrite, float]) -> tuple[ir.Model, AppliedStep]:
    """Return the model with the smaller error, and the step as it went."""
    rewrite, kept = after[0], after[1] < before[1]
    done = AppliedStep(
        method=method,
        changed=rewrite.changed if kept else (),
        skipped=rewrite.skipped,
        kept=kept,
        error_before=before[1],
        error_after=after[1],
    )
    return rewrite.model if kept else before[0], done


def apply_step(
    model: ir.Model,
    step: FREE,
    target: TargetProfile,
) -> Rewrite:
    """Return `model` after one step that needs no data."""
    match step:
        case FoldBatchnormStep():
            return fold_batchnorm(model)
        case GemmHeadStep():
            return conv_head_to_gemm(model)
        case PruneStep():
            return prune(model, step)
        case ClusterStep():
            return cluster(model, step)
        case QuantizeDynamicStep():
            return quantize_dynamic(model, step, target)
        case QuantizeWeightsStep():
            return quantize_weights(model, step)
        case Float16Step():
            return to_float16(model, step)
        case _:
            assert_never(step)
