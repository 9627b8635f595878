"""The training loop: rates, what is kept, when it stops, and that a killed run ends with the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import parsed, small_net, write_blobs

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.data.dataset import open_dataset  # noqa: E402
from qcore.data.samples import open_samples  # noqa: E402
from qcore.errors import ModelError  # noqa: E402
from qcore.methods.finetune import Augment, Epoch, FinetuneStep  # noqa: E402
from qcore.training.course import Course  # noqa: E402
from qcore.training.executor import build_executor  # noqa: E402
from qcore.training.loop import Assignment, Journey, Trained, rate_at, train  # noqa: E402
from qcore.training.objective import Objective  # noqa: E402
from qcore.training.processes import Processes  # noqa: E402

LABELS = Objective(output="y", distribution=False, teacher_weight=0.0, temperature=1.0)


@dataclass
class Class:
    """A student and what it is asked; `run` trains it from the start."""

    folder: Path
    step: FinetuneStep = field(default_factory=lambda: FinetuneStep(epochs=4, batch=40, learning_rate=0.1))
    teach: Callable[[Any], Any] | None = None
    objective: Objective = LABELS
    journey: Journey = field(default_factory=Journey)
    student: Any = None

    def course(self, split: str) -> Course:
        folder = self.folder / split
        folder.mkdir(exist_ok=True)
        return Course(
            samples=open_samples(open_dataset(self.folder / "blobs.yaml", split), folder),
            feed=lambda s, places: ({"x": s.read(places).x[""]}, s.read(places).y),
            teach=self.teach,
            layout="NCHW",
            augment=self.step.augment if split == "train" else Augment(),
            batch=self.step.batch,
            seed=self.step.seed,
            folder=folder,
        )

    def run(self) -> tuple[Trained, dict[str, torch.Tensor]]:
        """Return what training gave, and the last state of the student."""
        student = self.student = build_executor(parsed(small_net()))
        groups = [{"params": list(student.weights.values()), "lr": self.step.learning_rate}]
        task = Assignment(
            learn=self.course("train"),
            judge=self.course("validation"),
            objective=self.objective,
            step=self.step,
            processes=Processes(rank=0, world=1, device=torch.device("cpu")),
            journey=self.journey,
        )
        return train(student, groups, task), {k: v.clone() for k, v in student.state_dict().items()}


@pytest.fixture
def lesson(tmp_path: Path) -> Class:
    write_blobs(tmp_path)
    return Class(folder=tmp_path)


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_rise_and_then_follow_their_schedule(schedule: str) -> None:
    step = FinetuneStep(schedule=schedule, warmup=0.1)
    rates = [rate_at(step, k, 100) for k in range(100)]
    np.testing.assert_allclose(rates[:10], [(k + 1) / 11 for k in range(10)])
    along = np.arange(90) / 90
    expected = {"cosine": (1 + np.cos(np.pi * along)) / 2, "linear": 1 - along, "constant": np.ones(90)}
    np.testing.assert_allclose(rates[10:], expected[schedule], atol=1e-12)
    assert min(rates) > 0
    assert rate_at(step, 0, 1) > 0
    assert rate_at(FinetuneStep(warmup=0, schedule=schedule), 0, 10) == 1


def test_it_learns_and_keeps_the_best_state(lesson: Class) -> None:
    got, last = lesson.run()
    losses = [e.validation for e in got.epochs]
    assert [e.number for e in got.epochs] == [0, 1, 2, 3, 4]
    assert losses[got.best] == min(losses) < losses[0] / 2
    assert got.epochs[0].loss is None
    assert got.epochs[got.best].accuracy > 0.6 > 0.5 > got.epochs[0].accuracy
    assert (got.best == 4) == equal(got.state, last)


@pytest.fixture
def hurt(lesson: Class) -> Class:
    """A student that knows all that its teacher does, and is driven away from it."""
    perfect = build_executor(parsed(small_net())).eval()

    def teach(x: Any) -> Any:
        with torch.no_grad():
            return {"y": perfect({"x": torch.from_numpy(x["x"])})["y"].numpy()}

    def push(done: int, total: int) -> None:
        for k, p in enumerate(lesson.student.parameters()):
            p.grad += 1 + k

    lesson.teach, lesson.objective = teach, replace(LABELS, teacher_weight=1.0)
    lesson.journey = Journey(after_gradient=(push,))
    return lesson


def test_the_state_before_training_is_kept_where_training_only_hurts(hurt: Class) -> None:
    before = {k: v.clone() for k, v in build_executor(parsed(small_net())).state_dict().items()}
    got, last = hurt.run()
    assert got.best == 0
    assert got.epochs[0].validation == pytest.approx(0, abs=1e-6)
    assert equal(got.state, before)
    assert not equal(last, before)


@pytest.mark.parametrize("patience", [1, 2, 0])
def test_it_stops_when_patience_ends(hurt: Class, patience: int) -> None:
    hurt.step = hurt.step.model_copy(update={"patience": patience})
    got, _ = hurt.run()
    assert len(got.epochs) - 1 == (patience or 4)


def test_averaged_weights_are_judged_and_kept_but_not_trained_on(lesson: Class) -> None:
    plain, last = lesson.run()
    seen: list[dict[str, torch.Tensor]] = []

    def see(done: int, total: int) -> None:
        seen.append({k: v.clone() for k, v in lesson.student.state_dict().items()})  # before step `done`

    lesson.step = lesson.step.model_copy(update={"ema": 0.7})
    lesson.journey = Journey(after_gradient=(see,))
    got, last_too = lesson.run()
    assert [e.loss for e in got.epochs] == [e.loss for e in plain.epochs]  # the steps are the same
    assert equal(last_too, last)
    assert got.epochs[-1].validation != plain.epochs[-1].validation
    assert got.best == 4
    average = seen[1]
    for p in [*seen[2:], last]:
        average = {k: 0.7 * average[k] + 0.3 * p[k] for k in average}
    for name, value in got.state.items():
        torch.testing.assert_close(value, average[name])


def test_a_loss_that_is_no_number_is_refused_and_its_state_removed(lesson: Class) -> None:
    path = lesson.folder / "checkpoint"
    lesson.journey = Journey(checkpoint=path, key="k")
    lesson.step = lesson.step.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30, "clip_norm": 0.0})
    with pytest.raises(ModelError, match=r"loss is (nan|inf) in epoch \d; nothing was written; lower learning_rate"):
        lesson.run()
    assert not path.exists()


def test_a_model_that_gives_no_numbers_is_refused_before_training(lesson: Class) -> None:
    lesson.teach = lambda x: {"y": np.full((len(x["x"]), 3), np.inf, np.float32)}
    lesson.objective = replace(LABELS, teacher_weight=0.5)
    with pytest.raises(ModelError, match="before training; allowed: finite numbers; check the model"):
        lesson.run()


@pytest.mark.parametrize(
    "options",
    [{}, {"ema": 0.8, "augment": Augment(pad_crop=1, flip=True)}, {"optimizer": "sgd", "schedule": "linear"}],
    ids=["adamw", "ema", "sgd"],
)
def test_a_killed_run_ends_with_the_same_numbers(lesson: Class, options: dict[str, Any]) -> None:
    lesson.step = lesson.step.model_copy(update=options)
    whole, last = lesson.run()
    path, steps = lesson.folder / "checkpoint", []

    def killed(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise KeyboardInterrupt

    lesson.journey = Journey(checkpoint=path, key="k", on_epoch=killed)
    with pytest.raises(KeyboardInterrupt):
        lesson.run()
    told: list[Epoch] = []
    after = (lambda done, total: steps.append(done),)
    lesson.journey = Journey(checkpoint=path, key="k", on_epoch=told.append, after_gradient=after)
    again, last_again = lesson.run()
    assert steps == list(range(8, 16))  # 4 steps an epoch, of which the first two are done
    assert equal(again.state, whole.state)
    assert equal(last_again, last)
    assert again.best == whole.best
    assert [(e.number, e.loss, e.validation, e.accuracy) for e in told] == [
        (e.number, e.loss, e.validation, e.accuracy) for e in whole.epochs
    ]
    lesson.journey = replace(lesson.journey, after_gradient=(lambda done, total: pytest.fail("nothing is left to do"),))
    assert equal(lesson.run()[0].state, whole.state)


def test_the_same_run_gives_the_same_numbers(lesson: Class) -> None:
    first, second = lesson.run()[0], lesson.run()[0]
    assert equal(first.state, second.state)
    lesson.step = lesson.step.model_copy(update={"seed": 1})
    assert not equal(lesson.run()[0].state, first.state)


def test_progress_counts_all_steps(lesson: Class) -> None:
    told: list[tuple[str, int, int]] = []
    lesson.journey = Journey(told=lambda *what: told.append(what))
    lesson.run()
    assert told == [("training", k, 16) for k in range(1, 17)]
