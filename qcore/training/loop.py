"""The training loop: one loop for fine-tuning, distillation and quantization-aware training.

It keeps the state that did best on samples that it does not learn from, the first state included. After every epoch
all that the rest depends on is written down; a run that was killed goes on there and ends with the same numbers.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qcore.canonical import Digest
from qcore.errors import ModelError
from qcore.methods.finetune import Epoch, TrainingStep
from qcore.training.checkpoint import State, load_checkpoint, not_a_checkpoint, save_checkpoint
from qcore.training.course import Arrays, Course, Lesson, ask_teacher, exam, lessons
from qcore.training.executor import Executor
from qcore.training.objective import Objective, loss_of
from qcore.training.processes import Processes, add_gradients, add_up, of_first

Told = Callable[[str, int, int], None]
AfterGradient = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """`state` is the best one by name of the tensor in the executor; `best` the number of its epoch."""

    state: Mapping[str, torch.Tensor]
    epochs: tuple[Epoch, ...]
    best: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Journey:
    """Where a run keeps its state (None: nowhere), under which key, and who is told of it.

    `told` gets what is done, steps done, and of how many; `on_epoch` every epoch. `after_gradient` are called with the
    number of the step and of all steps, when gradients are there and before they are used. `first` is the number of the
    first epoch whose state may be kept; 0 is the state before training.
    """

    checkpoint: Path | None = None
    key: Digest = ""
    told: Told = lambda what, done, total: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    after_gradient: tuple[AfterGradient, ...] = ()
    first: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What is asked of a student: `learn` from, `judge` by, make `objective` small, as `step` says.

    `processes` share the work; `journey` says where state is kept and who is told.
    """

    learn: Course
    judge: Course
    objective: Objective
    step: TrainingStep
    processes: Processes
    journey: Journey


@dataclass(slots=True)
class _Run:
    """All that changes while training goes on."""

    task: Assignment
    student: Executor
    optimizer: torch.optim.Optimizer
    average: dict[str, torch.Tensor]
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)


def train(student: Executor, groups: list[dict[str, Any]], task: Assignment) -> Trained:
    """Return the best state of `student` over all epochs.

    Args:
        student: is trained, and ends in its last state.
        groups: of parameters, as torch's optimizers take them, with `lr`.
        task: all the rest.

    Raises:
        ModelError: a loss is NaN or infinite.
    """
    torch.set_flush_denormal(True)  # momenta of dead weights would cost half the time of a step
    try:
        return _trained(student, groups, task)
    finally:
        torch.set_flush_denormal(False)  # all arithmetic of the process would be without them


def _trained(student: Executor, groups: list[dict[str, Any]], task: Assignment) -> Trained:
    step, journey = task.step, task.journey
    rates = [g["lr"] for g in groups]
    student.to(task.processes.device)
    run = _Run(task=task, student=student, optimizer=_optimizer(step, groups), average={}, rates=rates)
    saved = _found(task)
    if saved is not None:
        try:
            _resume(run, saved)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as e:  # of another shape
            raise not_a_checkpoint(journey.checkpoint or Path(), e) from e
        journey.told("going on behind epoch", len(run.epochs) - 1, step.epochs)
    if _goes_on(run):
        ask_teacher(task.judge, lambda done, n: journey.told("asking the teacher, validation", done, n))
        ask_teacher(task.learn, lambda done, n: journey.told("asking the teacher", done, n))
    if saved is None:
        _judge(run, None, time.monotonic())
        run.state = _copied(student)
    for epoch in run.epochs:
        journey.on_epoch(epoch)
    while _goes_on(run):
        _epoch(run)
        journey.on_epoch(run.epochs[-1])
        if journey.checkpoint is not None and task.processes.rank == 0:
            save_checkpoint(journey.checkpoint, journey.key, _saved(run))
    return Trained(state=run.state, epochs=tuple(run.epochs), best=run.best)


def _found(task: Assignment) -> State | None:
    """Return the state that a killed run left; the first process reads it for all."""
    path, saved = task.journey.checkpoint, None
    if path is not None and task.processes.rank == 0:
        saved = load_checkpoint(path, task.journey.key)
    return of_first(saved, task.processes)


def _goes_on(run: _Run) -> bool:
    step = run.task.step
    best = max(run.best, run.task.journey.first)
    patient = not step.patience or len(run.epochs) - 1 - best < step.patience
    return len(run.epochs) <= step.epochs and patient


def _optimizer(step: TrainingStep, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if step.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=step.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=step.weight_decay)


def rate_at(step: TrainingStep, done: int, total: int) -> float:
    """Return the share of the learning rate in step `done` (from 0) of `total`."""
    rise = math.ceil(step.warmup * total)
    if done < rise:
        return (done + 1) / (rise + 1)
    along = (done - rise) / max(1, total - rise)
    match step.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * along))
        case "linear":
            return 1 - along
        case "constant":
            return 1.0


def _epoch(run: _Run) -> None:
    """Learn from all samples once, judge, and keep the state if it is the best so far."""
    task, step, device = run.task, run.task.step, run.task.processes.device
    journey = task.journey
    started, number = time.monotonic(), len(run.epochs)
    total = step.epochs * task.learn.steps
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    losses = torch.zeros((), device=device)
    run.student.train()
    for k, lesson in enumerate(lessons(task.learn, number)):
        done = (number - 1) * task.learn.steps + k
        for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
            group["lr"] = rate * rate_at(step, done, total)
        run.optimizer.zero_grad(set_to_none=True)
        loss = _loss(run, lesson) * lesson.share
        loss.backward()
        add_gradients(parameters, task.processes)
        for call in journey.after_gradient:
            call(done, total)
        if step.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, step.clip_norm)
        run.optimizer.step()
        _average(run)
        losses += loss.detach()
        journey.told("training", done + 1, total)
    mean = float(add_up(losses, task.processes)) / task.learn.steps / task.processes.world
    _refuse_diverged(run, "loss", mean, number)
    last = _swapped(run)
    _judge(run, mean, started)
    if number == journey.first or (
        number > journey.first and run.epochs[-1].validation < run.epochs[run.best].validation
    ):
        run.best, run.state = number, _copied(run.student)
    _put(run.student, last)


def _loss(run: _Run, lesson: Lesson) -> torch.Tensor:
    device, precision = run.task.processes.device, run.task.step.precision
    short = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    with torch.autocast(device.type, torch.bfloat16, enabled=short):
        made = run.student(_moved(lesson.x, device))
    made = {name: v.float() if v.dtype == torch.bfloat16 else v for name, v in made.items()}
    return loss_of(run.task.objective, made, _moved(lesson.teacher, device), _labels(lesson, device))


def _moved(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}


def _labels(lesson: Lesson, device: torch.device) -> torch.Tensor | None:
    return None if lesson.y is None else torch.from_numpy(lesson.y).to(device)


def _judge(run: _Run, loss: float | None, started: float) -> None:
    """Note how the student does on the samples that judge."""
    task, device = run.task, run.task.processes.device
    run.student.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for lesson in exam(task.judge):
            n = len(next(iter(lesson.x.values())))
            if not lesson.share:
                continue
            made, y = run.student(_moved(lesson.x, device)), _labels(lesson, device)
            mean = float(loss_of(task.objective, made, _moved(lesson.teacher, device), y))
            sums += torch.tensor([n * mean, _right(made, y, task.objective), n], dtype=torch.float64, device=device)
    total, right, count = (float(v) for v in add_up(sums, task.processes))
    _refuse_diverged(run, "validation loss", total / count, len(run.epochs))
    labelled = task.judge.samples.data.labels is not None and task.objective.output is not None
    run.epochs.append(
        Epoch(
            number=len(run.epochs),
            loss=loss,
            validation=total / count,
            accuracy=right / count if labelled else None,
            seconds=time.monotonic() - started,
        )
    )


def _refuse_diverged(run: _Run, what: str, loss: float, epoch: int) -> None:
    """Refuse a loss that is no number: what was trained is of no use, and would be the next time."""
    if math.isfinite(loss):
        return
    journey = run.task.journey
    if journey.checkpoint is not None and run.task.processes.rank == 0:
        journey.checkpoint.unlink(missing_ok=True)
    if epoch == 0:
        raise ModelError(f"the {what} is {loss} before training; allowed: finite numbers; check the model")
    raise ModelError(f"the {what} is {loss} in epoch {epoch}; nothing was written; lower learning_rate")


def _right(made: Mapping[str, torch.Tensor], y: torch.Tensor | None, objective: Objective) -> int:
    if y is None or objective.output is None:
        return 0
    return int((made[objective.output].reshape(len(y), -1).argmax(1) == y).sum())


def _average(run: _Run) -> None:
    ema = run.task.step.ema
    if not ema:
        return
    with torch.no_grad():
        for name, p in run.student.named_parameters():
            if p.requires_grad:
                kept = run.average.setdefault(name, p.detach().clone())
                kept.lerp_(p, 1 - ema)


def _swapped(run: _Run) -> dict[str, torch.Tensor]:
    """Put the averaged weights in place, if there are any, and return what was there."""
    last = {name: p.detach().clone() for name, p in run.student.named_parameters() if name in run.average}
    _put(run.student, run.average)
    return last


def _put(student: Executor, values: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _copied(student: Executor) -> dict[str, torch.Tensor]:
    return {name: v.detach().cpu().clone() for name, v in student.state_dict().items()}


def _saved(run: _Run) -> State:
    return {
        "student": _copied(run.student),
        "optimizer": run.optimizer.state_dict(),
        "average": run.average,
        "best": run.best,
        "state": run.state,
        "epochs": [asdict(e) for e in run.epochs],
    }


def _resume(run: _Run, saved: State) -> None:
    run.student.load_state_dict(saved["student"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.average = {k: v.to(run.task.processes.device) for k, v in saved["average"].items()}
    run.best, run.state = saved["best"], saved["state"]
    run.epochs = [Epoch(**e) for e in saved["epochs"]]
