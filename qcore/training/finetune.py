"""Training of a model in a recipe: a float one, or a quantized one as it will be written.

ONNX in, ONNX out: the graph runs in torch under its own names, and what was trained goes back into the same
initializers.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qcore.canonical import Digest, sha256_bytes, sha256_json
from qcore.data.dataset import Dataset, layouts
from qcore.data.samples import Samples
from qcore.errors import ModelError
from qcore.graph.edit import editable_copy
from qcore.graph.fake_quant import FakeQuantized, fake_quantized, with_trained
from qcore.graph.grid import LAYERS
from qcore.graph.io import serialize_model
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.graph.unfold import folded_back, idle_biases, outputs_to_normalize, unfold_batchnorm
from qcore.methods.finetune import (
    FEWEST_FOR_STATISTICS,
    FEWEST_LABELS,
    Augment,
    Epoch,
    FinetuneStep,
    QatStep,
    TrainingStep,
)
from qcore.numerics.channels import channel_stats
from qcore.placement import channel_axis
from qcore.runtime.nodewise import expose
from qcore.target import TargetProfile
from qcore.training.course import Course, Feed, Teach
from qcore.training.executor import Executor, ExecutorOptions, build_executor
from qcore.training.fake_quant import quantizers_of
from qcore.training.kept import KeptClusters, kept_structure
from qcore.training.loop import Assignment, Journey, Trained, train
from qcore.training.objective import Objective, is_distribution
from qcore.training.processes import Processes, join, refuse_other_models
from qcore.training.sparsify import Sparse, SparsifiedWeights, sparse_weights, steps_until_whole
from qcore.training.teacher import teach_of
from qcore.training.weights import trainable_names, with_values

Array = NDArray[Any]
_MEASURED = 256  # samples that batch norms begin with
_LOOKED_AT = 64  # samples that show what the teacher makes


@dataclass(frozen=True, kw_only=True, slots=True)
class Schooling:
    """What training reads and where it keeps its state.

    `learn` and `judge` are samples, `feed` turns them into inputs of the model. `folder` exists and may be written to.
    `teacher` teaches in place of the float model that the recipe began with; None: that does. `checkpoint` is the file
    that a killed run goes on from; None: no file. `key` is the digest of data and code. `device` is "cpu", "cuda" or
    "auto". `told` gets what is done, how much of it, and of how much; `on_epoch` gets every epoch.
    """

    learn: Samples
    judge: Samples
    feed: Feed
    folder: Path
    teacher: ir.Model | None = None
    checkpoint: Path | None = None
    key: Digest = ""
    device: str = "auto"
    told: Callable[[str, int, int], None] = lambda what, done, total: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """A trained model, which tensors changed, and how the epochs went; `best` is the number of the one kept.

    `samples` were learnt from, in every epoch.
    """

    rewrite: Rewrite
    epochs: tuple[Epoch, ...]
    best: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Class:
    """Who learns what from whom: `start` is the model as it is, `teacher` who teaches, `key` the digest of both."""

    start: ir.Model
    teacher: ir.Model
    key: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extras:
    """What zeroes weights on the way, whether batches must be of one size, and whether a model teaches itself."""

    sparsified: SparsifiedWeights | None = None
    whole: bool = False
    itself: bool = False


def finetune(model: ir.Model, original: ir.Model, step: FinetuneStep, schooling: Schooling) -> Lessons:
    """Return the float `model` with its weights trained.

    Args:
        model: float; not changed.
        original: the teacher, unless `schooling` has another.
        step: how.
        schooling: from what.

    Raises:
        ModelError: the model has parts that cannot be trained, training diverged, or the teacher does not fit.
    """
    names = trainable_names(model)
    if not names:
        raise ModelError("the model has no float weights to train; train before it is quantized")
    constants = editable_copy(model).graph.initializers
    _refuse_other_floats(names, constants)
    kept = _kept({n: constant_array(constants.get(n)) for n in names}, step)
    sparse: dict[str, Sparse] = {}
    skipped: tuple[Skipped, ...] = ()
    if step.sparsify is not None:
        sparse, skipped = sparse_weights(editable_copy(model), step.sparsify, names, kept)
    open_model = _unfolded(model, step, schooling, kept)
    kept = {**kept, **sparse}
    # Their gradients are rounding errors, of which Adam would make whole steps that running means lag behind.
    idle = frozenset() if open_model is model else idle_biases(open_model)
    names = tuple(n for n in trainable_names(open_model) if n not in idle)
    options = ExecutorOptions(
        trainable=names, transforms=kept, intermediates=step.features, batch_statistics=open_model is not model
    )
    student = build_executor(open_model, options)
    weights = student.weights
    sparsified = None
    if step.sparsify is not None:
        held = tuple((s, weights[n]) for n, s in sparse.items())
        sparsified = SparsifiedWeights(step=step.sparsify, rate=step.learning_rate, weights=held)
    itself = model is original and schooling.teacher is None and step.sparsify is None
    extras = _Extras(sparsified=sparsified, whole=open_model is not model, itself=itself)
    known = _class(model, (model,), schooling.teacher or original)
    trained = _trained(student, _groups(student, names, step), known, (step, extras), schooling)
    if trained.best == 0:
        return _lessons(Rewrite(model=model), trained, schooling)
    student.load_state_dict(trained.state)
    found = with_values(open_model, {**student.values, **_effective(student, names, kept)})
    found = found if open_model is model else folded_back(found, editable_copy(model))
    return _lessons(Rewrite(model=found, changed=names, skipped=skipped), trained, schooling)


def quantization_aware(
    quantized: ir.Model,
    models: tuple[ir.Model, ir.Model],
    step: QatStep,
    formats: tuple[TargetProfile, int | None],
    schooling: Schooling,
) -> Lessons:
    """Return the QDQ model `quantized` with integers, scales and biases trained.

    Args:
        quantized: not changed.
        models: the float model that it was made from, whose zeros and shared values are kept, and the teacher, unless
            `schooling` has another.
        step: how.
        formats: the target, and the bits of weights where the recipe says so.
        schooling: from what.

    Raises:
        ModelError: as `finetune`.
    """
    target, bits = formats
    floats = _layer_weights(models[0])
    fake = _opened(quantized, floats, target, bits)
    if not fake.layers:
        raise ModelError("no quantized layer can be trained: " + (fake.skipped[0].reason if fake.skipped else "none"))
    scales, weights, rounded = quantizers_of(fake, learn=step.learn_scales, power_of_two=target.power_of_two_scales)
    names = tuple(n for n in trainable_names(fake.model) if not n.endswith("_scale"))
    kept = _kept({la.weight.value: floats[la.node] for la in fake.layers}, step)
    transforms = rounded | {n: torch.nn.Sequential(*([kept[n]] if n in kept else []), q) for n, q in weights.items()}
    options = ExecutorOptions(trainable=names, transforms=transforms, intermediates=step.features)
    student = build_executor(fake.model, options)
    groups = _groups(student, names, step)
    if step.learn_scales:
        moving = [p for p in scales.parameters() if p.requires_grad]
        groups.append({"params": moving, "lr": step.scale_learning_rate, "weight_decay": 0.0})
    known = _class(quantized, (quantized, models[0]), schooling.teacher or models[1])
    trained = _trained(student, groups, known, (step, _Extras()), schooling)
    rewrite = Rewrite(model=quantized, skipped=fake.skipped)
    if trained.best == 0:
        return _lessons(rewrite, trained, schooling)
    student.load_state_dict(trained.state)
    with torch.no_grad():
        found = {k: weights[k].moved(v) if k in weights else v for k, v in _effective(student, names, kept).items()}
    values = {k: v.detach().cpu().numpy() for k, v in found.items()}
    rewrite = replace(
        rewrite,
        model=with_trained(quantized, fake, {**values, **scales.arrays}),
        changed=tuple(la.node for la in fake.layers),
    )
    return _lessons(rewrite, trained, schooling)


def _refuse_other_floats(names: Collection[str], constants: Mapping[str, ir.Value]) -> None:
    for name in names:
        array = constant_array(constants.get(name))
        if array is not None and array.dtype != np.float32:
            raise ModelError(
                f"weight {name!r} is {array.dtype}; allowed for training: float32; train before weights become "
                "shorter, or export the model in float32"
            )


def _unfolded(
    model: ir.Model, step: FinetuneStep, schooling: Schooling, kept: Mapping[str, torch.nn.Module]
) -> ir.Model:
    """Return `model` with batch norms behind its convolutions if it shall learn with them, else `model` itself."""
    wanted = step.batch_norms
    if wanted is None:
        shared = any(isinstance(m, KeptClusters) for modules in kept.values() for m in modules.modules())
        many = schooling.learn.n >= FEWEST_LABELS and step.batch >= FEWEST_FOR_STATISTICS
        wanted = many and not shared
    names = outputs_to_normalize(editable_copy(model)) if wanted else ()
    if not names:
        return model
    places = np.linspace(0, schooling.learn.n - 1, min(_MEASURED, schooling.learn.n)).astype(np.int64)
    made = expose(model, names)(schooling.feed(schooling.learn, places)[0])
    stats = {name: channel_stats(made[name].astype(np.float32, copy=False)) for name in names}
    return unfold_batchnorm(model, {name: (s.mean, s.variance) for name, s in stats.items()})


def _class(start: ir.Model, made_from: tuple[ir.Model, ...], teacher: ir.Model) -> _Class:
    key = sha256_json([sha256_bytes(serialize_model(m)) for m in (*made_from, teacher)])
    return _Class(start=start, teacher=teacher, key=key)


def _layer_weights(model: ir.Model) -> dict[str, Array]:
    """Return the weights of layers by node name."""
    return {
        node_name(n): array
        for n in model.graph
        if n.op_type in LAYERS and (array := constant_array(n.inputs[1])) is not None
    }


def _opened(quantized: ir.Model, floats: Mapping[str, Array], target: TargetProfile, bits: int | None) -> FakeQuantized:
    def scheme(node: ir.Node) -> Any:
        array = floats[node_name(node)]
        depthwise = node.op_type == "Conv" and int_attribute(node, "group", 1) > 1 and array.shape[1] == 1
        return target.weight_scheme(channel_axis(node, array.ndim) or 0, depthwise=depthwise, bits=bits)

    return fake_quantized(quantized, floats, scheme, (*target.same_scale, *target.one_scale))


def _kept(weights: Mapping[str, Array | None], step: TrainingStep) -> dict[str, torch.nn.Module]:
    """Return what keeps the structure of those `weights` that have one, by name."""
    kept = {}
    for name, array in weights.items():
        if array is None or array.ndim < 2:
            continue
        modules = kept_structure(array, zeros=step.keep_zeros, clusters=step.keep_clusters)
        if modules:
            kept[name] = torch.nn.Sequential(*modules)
    return kept


def _groups(student: Executor, names: Collection[str], step: TrainingStep) -> list[dict[str, Any]]:
    """Return the trained tensors as an optimizer takes them, each with its own rate.

    The size of a tensor is the root of its mean square: equalized layers differ a thousandfold in it. One of zeros, a
    bias perhaps, learns at the rate of the middle one.
    """
    trained = set(names)
    weights = [p for name, p in student.weights.items() if name in trained]
    sizes = [float(p.detach().square().mean().sqrt()) for p in weights]
    middle = float(np.median([s for s in sizes if s] or [1.0]))
    return [{"params": [p], "lr": step.learning_rate * (s or middle)} for p, s in zip(weights, sizes, strict=True)]


def _effective(student: Executor, names: Any, kept: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return the trained values as the graph reads them, structure included."""
    with torch.no_grad():
        values = student.values
        return {n: kept[n](values[n]) if n in kept else values[n] for n in names}


def _trained(
    student: Executor,
    groups: list[dict[str, Any]],
    known: _Class,
    how: tuple[TrainingStep, _Extras],
    schooling: Schooling,
) -> Trained:
    step, extras = how
    teach = teach_of(known.teacher, known.start, step.features)
    _refuse_other_sizes(student, teach, schooling)
    objective = _objective(teach, str(known.start.graph.outputs[0].name), (step, extras.itself), schooling)
    processes = join(schooling.device)
    refuse_other_models(known.key, processes)
    learn = _course(teach if objective.needs_teacher else None, step, schooling, processes)
    learn = replace(learn, whole=extras.whole)
    task = Assignment(
        learn=learn,
        judge=replace(
            learn,
            samples=schooling.judge,
            augment=Augment(),
            whole=False,
            folder=schooling.folder / "judge",
            kept={},
        ),
        objective=objective,
        step=step,
        processes=processes,
        journey=Journey(
            checkpoint=schooling.checkpoint,
            key=sha256_json([schooling.key, known.key, step.sha256, processes.world]),
            told=schooling.told,
            on_epoch=schooling.on_epoch,
            after_gradient=() if extras.sparsified is None else (extras.sparsified,),
            first=0 if extras.sparsified is None else _first_whole(extras.sparsified, step.epochs, learn.steps),
        ),
    )
    task.judge.folder.mkdir(exist_ok=True)
    return train(student, groups, task)


def _refuse_other_sizes(student: Executor, teach: Teach, schooling: Schooling) -> None:
    """Refuse a teacher whose outputs or features have other sizes than the student's: broadcasting is no lesson."""
    x, _ = schooling.feed(schooling.judge, np.arange(1))
    with torch.no_grad():
        ours = student.eval()({name: torch.from_numpy(v) for name, v in x.items()})
    for name, made in teach(x).items():
        if tuple(ours[name].shape[1:]) != made.shape[1:]:
            raise ModelError(
                f"{name!r} of the teacher has size {made.shape[1:]}, the student's {tuple(ours[name].shape[1:])}; "
                "allowed: the same; pass another teacher, or other features"
            )


def _first_whole(sparsified: SparsifiedWeights, epochs: int, steps: int) -> int:
    """Return the number of the first epoch at whose end all weights are zero that shall be."""
    return steps_until_whole(sparsified.step, epochs * steps) // steps + 1


def _course(teach: Teach | None, step: TrainingStep, schooling: Schooling, processes: Processes) -> Course:
    return Course(
        samples=schooling.learn,
        feed=schooling.feed,
        teach=teach,
        layout=layouts(schooling.learn.data)[1],
        augment=step.augment,
        batch=step.batch,
        seed=step.seed,
        folder=schooling.folder,
        rank=processes.rank,
        world=processes.world,
    )


def _objective(teach: Teach, output: str, how: tuple[TrainingStep, bool], schooling: Schooling) -> Objective:
    """Return what is made small, after a look at what the teacher says of some samples."""
    (step, itself), data = how, schooling.learn.data
    x, _ = schooling.feed(schooling.judge, np.arange(min(_LOOKED_AT, schooling.judge.n)))
    made = teach(x)
    floats = tuple(k for k, v in made.items() if v.dtype.kind == "f" and k not in step.features)
    if not floats:
        raise ModelError(f"output {output!r} holds {made[output].dtype}, which teaches nothing; allowed: float outputs")
    first = torch.from_numpy(np.asarray(made[output], np.float32))
    classes = output in floats and data.card.task == "classification" and first.dim() > 1 and first.numel() > len(first)
    share = _teachers_share(step, schooling, classes, itself)
    if share < 1:
        for split in (data, schooling.judge.data):
            _refuse_other_labels(split, first.numel() // len(first))
    return Objective(
        output=output if classes else None,
        distribution=classes and is_distribution(first.reshape(len(first), -1)),
        teacher_weight=share,
        temperature=step.temperature,
        features=step.features,
        others=tuple(k for k in floats if k != output) if classes else (),
        compared=floats,
        power={name: float(np.mean(np.square(v, dtype=np.float64))) for name, v in made.items()},
    )


def _teachers_share(step: TrainingStep, schooling: Schooling, classes: bool, itself: bool) -> float:
    """Return the teacher's part of the loss; the rest is for labels. From itself a model learns nothing new."""
    data, share = schooling.learn.data, step.teacher_weight
    why = f"split {data.split!r} of {data.card.name} has no labels" if data.labels is None else None
    if why is None and not classes:
        why = "the model's first output names no classes, so labels cannot teach it"
    if share is None:
        many = why is None and data.n >= FEWEST_LABELS
        return (0.0 if itself else 0.5) if many else 1.0
    if share < 1 and why is not None:
        raise ModelError(f"teacher_weight is {share}, but {why}; allowed: 1, or leave it out")
    return share


def _refuse_other_labels(data: Dataset, classes: int) -> None:
    wrong = next((y for y in data.labels or () if not 0 <= y < classes), None)
    if wrong is not None:
        raise ModelError(
            f"split {data.split!r} of {data.card.name} has class {wrong}, the model tells {classes} classes apart; "
            f"allowed: 0 to {classes - 1}; correct the labels, or set teacher_weight: 1"
        )


def _lessons(rewrite: Rewrite, trained: Trained, schooling: Schooling) -> Lessons:
    return Lessons(rewrite=rewrite, epochs=trained.epochs, best=trained.best, samples=schooling.learn.n)
