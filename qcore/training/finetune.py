"""Training of a model in a recipe: a float one, or a quantized one as it will be written.

ONNX in, ONNX out: the graph runs in torch under its own names, and what was trained goes back into the same
initializers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qcore.canonical import Digest, sha256_json
from qcore.data.dataset import layouts
from qcore.data.samples import Samples
from qcore.errors import ModelError
from qcore.graph.fake_quant import FakeQuantized, fake_quantized, with_trained
from qcore.graph.grid import LAYERS
from qcore.graph.rewrite import Rewrite
from qcore.graph.traverse import constant_array, int_attribute, node_name
from qcore.methods.finetune import FEWEST_LABELS, Augment, Epoch, FinetuneStep, QatStep, TrainingStep
from qcore.placement import channel_axis
from qcore.runtime.nodewise import expose
from qcore.target import TargetProfile
from qcore.training.course import Course, Feed
from qcore.training.executor import Executor, ExecutorOptions, build_executor
from qcore.training.fake_quant import quantizers_of
from qcore.training.kept import kept_structure
from qcore.training.loop import Assignment, Journey, Trained, train
from qcore.training.objective import Objective, is_distribution
from qcore.training.processes import Processes, join
from qcore.training.weights import trainable_names, with_values

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schooling:
    """What training reads and where it keeps its state.

    `learn` and `judge` are samples, `feed` turns them into inputs of the model. `folder` exists and may be written to;
    `checkpoint` is the file that a killed run goes on from, None: none. `key` is the digest of model and data. `device`
    is "cpu", "cuda" or "auto".
    """

    learn: Samples
    judge: Samples
    feed: Feed
    folder: Path
    checkpoint: Path | None = None
    key: Digest = ""
    device: str = "auto"
    told: Callable[[str, int, int], None] = lambda what, done, total: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """A trained model, which tensors changed, and how the epochs went; `best` is the number of the one kept."""

    rewrite: Rewrite
    epochs: tuple[Epoch, ...]
    best: int
    samples: int


def finetune(model: ir.Model, original: ir.Model, step: FinetuneStep, schooling: Schooling) -> Lessons:
    """Return the float `model` with its weights trained.

    Args:
        model: float; not changed.
        original: the teacher, where one is asked for.
        step: how.
        schooling: from what.

    Raises:
        ModelError: the model has parts that cannot be trained, or training diverged.
    """
    names = trainable_names(model)
    if not names:
        raise ModelError("the model has no float weights to train; train before it is quantized")
    kept = _kept(model, names, step)
    student = build_executor(model, ExecutorOptions(trainable=names, transforms=kept, intermediates=step.features))
    groups = [{"params": _parameters(student, names), "lr": step.learning_rate}]
    trained = _trained(student, groups, (model, original), step, schooling)
    if trained.best == 0:
        return _lessons(Rewrite(model=model), trained, schooling)
    student.load_state_dict(trained.state)
    values = _effective(student, names, kept)
    return _lessons(Rewrite(model=with_values(model, values), changed=names), trained, schooling)


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
        models: the float model that it was made from, and the teacher.
        step: how.
        formats: the target, and the bits of weights where the recipe says so.
        schooling: from what.

    Raises:
        ModelError: as `finetune`.
    """
    target, bits = formats
    fake = _opened(quantized, models[0], target, bits)
    if not fake.layers:
        raise ModelError("no quantized layer can be trained: " + (fake.skipped[0].reason if fake.skipped else "none"))
    scales, rounded = quantizers_of(fake, learn=step.learn_scales, power_of_two=target.power_of_two_scales)
    names = tuple(n for n in trainable_names(fake.model) if not n.endswith("_scale"))
    kept = _kept(fake.model, [la.weight.value for la in fake.layers], step)
    transforms = {n: torch.nn.Sequential(*(m for m in (kept.get(n), q) if m is not None)) for n, q in rounded.items()}
    options = ExecutorOptions(trainable=names, transforms=transforms, intermediates=step.features)
    student = build_executor(fake.model, options)
    groups = [{"params": _parameters(student, names), "lr": step.learning_rate}]
    if step.learn_scales:
        rate = step.learning_rate * step.scale_learning_rate
        moving = [p for p in scales.parameters() if p.requires_grad]
        groups.append({"params": moving, "lr": rate, "weight_decay": 0.0})
    trained = _trained(student, groups, (quantized, models[1]), step, schooling)
    rewrite = Rewrite(model=quantized, skipped=fake.skipped)
    if trained.best == 0:
        return _lessons(rewrite, trained, schooling)
    student.load_state_dict(trained.state)
    values = {k: v.detach().cpu().numpy() for k, v in _effective(student, names, kept).items()}
    learnt = {**values, **(scales.arrays if step.learn_scales else {})}
    rewrite = replace(
        rewrite, model=with_trained(quantized, fake, learnt), changed=tuple(la.node for la in fake.layers)
    )
    return _lessons(rewrite, trained, schooling)


def _opened(quantized: ir.Model, reference: ir.Model, target: TargetProfile, bits: int | None) -> FakeQuantized:
    floats = {
        node_name(n): array
        for n in reference.graph
        if n.op_type in LAYERS and (array := constant_array(n.inputs[1])) is not None
    }

    def scheme(node: ir.Node) -> Any:
        array = floats[node_name(node)]
        depthwise = node.op_type == "Conv" and int_attribute(node, "group", 1) > 1 and array.shape[1] == 1
        return target.weight_scheme(channel_axis(node, array.ndim) or 0, depthwise=depthwise, bits=bits)

    return fake_quantized(quantized, floats, scheme, (*target.same_scale, *target.one_scale))


def _kept(model: ir.Model, names: Any, step: TrainingStep) -> dict[str, torch.nn.Module]:
    """Return what keeps the structure of the weights `names` that have one."""
    kept = {}
    for name in names:
        value = model.graph.initializers.get(name)
        array = constant_array(value)
        if array is None or array.ndim < 2:
            continue
        modules = kept_structure(array, zeros=step.keep_zeros, clusters=step.keep_clusters)
        if modules:
            kept[name] = torch.nn.Sequential(*modules)
    return kept


def _parameters(student: Executor, names: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in student.weights.items() if name in set(names)]


def _effective(student: Executor, names: Any, kept: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return the trained values as the graph reads them, structure included."""
    with torch.no_grad():
        values = student.values
        return {n: kept[n](values[n]) if n in kept else values[n] for n in names}


def _trained(
    student: Executor,
    groups: list[dict[str, Any]],
    models: tuple[ir.Model, ir.Model],
    step: TrainingStep,
    schooling: Schooling,
) -> Trained:
    processes = join(schooling.device)
    objective = _objective(models[1], step, schooling)
    task = Assignment(
        learn=_course(models[1], objective, step, (schooling, schooling.learn), processes),
        judge=_course(
            models[1],
            objective,
            step.model_copy(update={"augment": Augment()}),
            (schooling, schooling.judge),
            processes,
        ),
        objective=objective,
        step=step,
        processes=processes,
        journey=Journey(
            checkpoint=schooling.checkpoint,
            key=sha256_json([schooling.key, step.sha256, processes.world]),
            told=schooling.told,
            on_epoch=schooling.on_epoch,
        ),
    )
    return train(student, groups, task)


def _objective(teacher: ir.Model, step: TrainingStep, schooling: Schooling) -> Objective:
    """Return what is made small, after a look at what the teacher says of one sample."""
    data = schooling.learn.data
    labelled = data.labels is not None
    share = step.teacher_weight
    if share is None:
        share = 0.5 if labelled and data.n >= FEWEST_LABELS else 1.0
    if share < 1 and not labelled:
        raise ModelError(
            f"teacher_weight is {share}, but split {data.split!r} of {data.card.name} has no labels; allowed: 1 or "
            "leave it out"
        )
    x, _ = schooling.feed(schooling.judge, np.arange(min(8, schooling.judge.n)))
    first = str(teacher.graph.outputs[0].name)
    made = torch.from_numpy(np.asarray(expose(teacher, [])(x)[first], np.float32))
    classes = data.card.task == "classification" and made.dim() > 1 and made.numel() > len(made)
    return Objective(
        output=first if classes else None,
        distribution=classes and is_distribution(made.reshape(len(made), -1)),
        teacher_weight=share,
        temperature=step.temperature,
        features=step.features,
    )


def _course(
    teacher: ir.Model,
    objective: Objective,
    step: TrainingStep,
    source: tuple[Schooling, Samples],
    processes: Processes,
) -> Course:
    schooling, samples = source
    return Course(
        samples=samples,
        feed=schooling.feed,
        teach=expose(teacher, step.features) if objective.needs_teacher else None,
        layout=layouts(samples.data)[1],
        augment=step.augment,
        batch=step.batch,
        seed=step.seed,
        folder=schooling.folder,
        rank=processes.rank,
        world=processes.world,
    )


def _lessons(rewrite: Rewrite, trained: Trained, schooling: Schooling) -> Lessons:
    return Lessons(rewrite=rewrite, epochs=trained.epochs, best=trained.best, samples=schooling.learn.n)
