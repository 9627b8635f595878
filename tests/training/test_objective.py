"""What training makes small, against the formulas in numpy."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.training.objective import Objective, divergence, is_distribution, loss_of  # noqa: E402

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.standard_normal((2, 7, 4)) * 2
Y = np.array([0, 3, 1, 1, 2, 0, 3])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


def objective(**fields: object) -> Objective:
    return Objective(**{"output": "y", "distribution": False, "teacher_weight": 1.0, "temperature": 1.0, **fields})


def loss(wanted: Objective, made: dict, teacher: dict, y: np.ndarray | None = None) -> float:
    tensors = [{k: torch.tensor(v) for k, v in side.items()} for side in (made, teacher)]
    return float(loss_of(wanted, *tensors, None if y is None else torch.tensor(y)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_the_divergence(temperature: float) -> None:
    got = loss(objective(temperature=temperature), {"y": STUDENT}, {"y": TEACHER})
    assert got == pytest.approx(kl(TEACHER, STUDENT, temperature), rel=1e-5)
    assert loss(objective(temperature=temperature), {"y": TEACHER + 3}, {"y": TEACHER}) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_its_gradient_is_the_difference_of_probabilities(temperature: float) -> None:
    logits = torch.tensor(STUDENT, requires_grad=True)
    divergence(torch.tensor(TEACHER), logits, temperature).backward()
    expected = temperature * (softmax(STUDENT / temperature) - softmax(TEACHER / temperature)) / len(STUDENT)
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_labels_have_the_rest_of_the_loss(weight: float) -> None:
    cross_entropy = -np.log(softmax(STUDENT)[np.arange(7), Y]).mean()
    expected = weight * kl(TEACHER, STUDENT, 1.0) + (1 - weight) * cross_entropy
    got = loss(objective(teacher_weight=weight), {"y": STUDENT}, {"y": TEACHER} if weight else {}, Y)
    assert got == pytest.approx(expected, rel=1e-5)
    assert objective(teacher_weight=weight).needs_teacher == (weight > 0)


def test_probabilities_are_compared_as_the_logits_they_come_from() -> None:
    made, taught = {"y": softmax(STUDENT)}, {"y": softmax(TEACHER)}
    assert loss(objective(distribution=True), made, taught) == pytest.approx(kl(TEACHER, STUDENT, 1.0), rel=1e-5)
    assert is_distribution(torch.tensor(made["y"]))
    assert not is_distribution(torch.tensor(STUDENT))
    sure = {"y": np.eye(4)[Y]}  # a zero is a probability, too
    assert np.isfinite(loss(objective(distribution=True), sure, taught))


def test_maps_of_one_pixel_are_classes_too() -> None:
    flat = loss(objective(), {"y": STUDENT}, {"y": TEACHER})
    assert loss(objective(), {"y": STUDENT[..., None, None]}, {"y": TEACHER[..., None, None]}) == pytest.approx(flat)


def test_features_and_outputs_without_classes_are_shares_of_a_power() -> None:
    made, taught = {"y": STUDENT, "f": STUDENT * 2}, {"y": TEACHER, "f": TEACHER}
    power = {"y": 4.0, "f": 0.5}
    squares = {"y": ((STUDENT - TEACHER) ** 2).mean() / 4.0, "f": ((STUDENT * 2 - TEACHER) ** 2).mean() / 0.5}
    assert loss(objective(output=None, power=power), {"y": STUDENT}, {"y": TEACHER}) == pytest.approx(squares["y"])
    both = loss(objective(features=("f",), power=power), made, taught)
    assert both == pytest.approx(kl(TEACHER, STUDENT, 1.0) + squares["f"], rel=1e-5)
    assert objective(teacher_weight=0.0, features=("f",)).needs_teacher


@pytest.mark.parametrize("output", ["y", None])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(output: str | None) -> None:
    wanted = objective(output=output, temperature=2.0, power={"y": 3.0})
    parts = [loss(wanted, {"y": STUDENT[s]}, {"y": TEACHER[s]}) * len(STUDENT[s]) for s in (slice(0, 3), slice(3, 7))]
    assert sum(parts) / 7 == pytest.approx(loss(wanted, {"y": STUDENT}, {"y": TEACHER}))
