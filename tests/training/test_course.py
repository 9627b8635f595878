"""What training reads: orders, moves, parts of a batch, and what the teacher said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning import write_blobs

pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.data.dataset import open_dataset
from qcore.data.samples import open_samples
from qcore.methods.finetune import Augment
from qcore.training.course import Course, ask_teacher, augmented, drawn, exam, lessons


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture
def course(tmp_path: Path) -> Course:
    data = open_dataset(write_blobs(tmp_path), "train")
    return Course(
        samples=open_samples(data, tmp_path),
        feed=lambda samples, places: ({"x": samples.read(places).x[""]}, samples.read(places).y),
        teach=lambda x: {"y": x["x"].sum(axis=(1, 2, 3))[:, None]},
        layout="NCHW",
        augment=Augment(),
        batch=48,
        seed=5,
        folder=tmp_path,
    )


def flat(parts: list) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([p.x["x"] for p in parts]), np.concatenate([p.y for p in parts])


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(course: Course) -> None:
    all_x, all_y = flat(list(exam(course)))
    seen = []
    for epoch in (1, 2):
        x, y = flat(list(lessons(course, epoch)))
        order = [int(np.flatnonzero((all_x == row).all(axis=(1, 2, 3)))[0]) for row in x]
        assert sorted(order) == list(range(160))
        assert np.array_equal(all_y[order], y)
        seen.append(order)
        again, _ = flat(list(lessons(course, epoch)))
        assert np.array_equal(again, x)
    assert seen[0] != seen[1]
    assert [len(p.y) for p in lessons(course, 1)] == [48, 48, 48, 16]


@pytest.mark.parametrize("augment", [Augment(), Augment(pad_crop=2, flip=True)])
@pytest.mark.parametrize("world", [2, 3, 20])
def test_processes_divide_each_batch_and_its_mean(course: Course, world: int, augment: Augment) -> None:
    course = replace(course, batch=16, augment=augment)
    whole = list(lessons(course, 1))
    parts = [list(lessons(replace(course, rank=r, world=world), 1)) for r in range(world)]
    for k, lesson in enumerate(whole):
        counted = [p[k] for p in parts if p[k].share]
        assert np.array_equal(np.concatenate([p.x["x"] for p in counted]), lesson.x["x"])
        assert np.array_equal(np.concatenate([p.y for p in counted]), lesson.y)
        mean = sum(p[k].share * p[k].x["x"].mean() for p in parts) / world
        assert mean == pytest.approx(lesson.x["x"].mean(), abs=1e-6)
        assert all(len(p[k].x["x"]) for p in parts)  # nobody gets nothing: gradients are added up by all


@given(pad=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 99))
def test_moves_stay_in_bounds_and_follow_the_seed(pad: int, flip: bool, seed: int) -> None:
    augment = Augment(pad_crop=pad, flip=flip)
    moves = drawn(augment, 50, np.random.default_rng(seed))
    assert moves.shape == (50, 3)
    assert moves.min() >= 0
    assert moves[:, :2].max() <= 2 * pad
    assert moves[:, 2].max() <= int(flip)
    assert np.array_equal(moves, drawn(augment, 50, np.random.default_rng(seed)))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_image_moves_by_what_was_drawn_and_is_mirrored_behind_that(layout: str) -> None:
    pad, x = 2, np.random.default_rng(0).standard_normal((4, 3, 5, 6)).astype(np.float32)
    moves = np.array([[2, 2, 0], [0, 2, 0], [2, 4, 0], [3, 1, 1]])
    got = augmented(x if layout == "NCHW" else x.transpose(0, 2, 3, 1), moves, layout, pad)
    got = got if layout == "NCHW" else got.transpose(0, 3, 1, 2)
    assert np.array_equal(got[0], x[0])  # in the middle: not moved
    assert np.array_equal(got[1][:, 2:], x[1][:, :-2])
    assert not got[1][:, :2].any()
    assert np.array_equal(got[2][:, :, :-2], x[2][:, :, 2:])
    moved = np.zeros_like(x[3])
    moved[:, :-1, 1:] = x[3][:, 1:, :-1]
    assert np.array_equal(got[3], moved[:, :, ::-1])


def test_what_is_no_image_is_not_moved() -> None:
    x = np.ones((2, 7), np.float32)
    assert augmented(x, np.array([[0, 0, 1]] * 2), "NC", 3) is x


def test_augmentation_changes_lessons_and_not_exams(course: Course) -> None:
    moved = replace(course, augment=Augment(pad_crop=1, flip=True))
    assert not np.array_equal(next(lessons(moved, 1)).x["x"], next(lessons(course, 1)).x["x"])
    assert np.array_equal(next(lessons(moved, 1)).x["x"], next(lessons(moved, 1)).x["x"])
    assert not np.array_equal(next(lessons(moved, 1)).x["x"], next(lessons(moved, 2)).x["x"])
    assert np.array_equal(flat(list(exam(moved)))[0], flat(list(exam(course)))[0])


def test_what_the_teacher_said_once_is_what_it_would_say(course: Course) -> None:
    asked = []

    def teach(x: dict) -> dict:
        asked.append(len(x["x"]))
        return course.teach(x)

    live = [p.teacher["y"] for p in lessons(course, 1)]
    kept = replace(course, teach=teach)
    told = []
    ask_teacher(kept, lambda done, total: told.append((done, total)))
    assert asked == [48, 48, 48, 16]
    assert told[-1] == (160, 160)
    for k, lesson in enumerate(lessons(kept, 1)):
        assert np.array_equal(lesson.teacher["y"], live[k])
    assert len(asked) == 4


def test_the_teacher_sees_the_very_samples_that_the_student_sees(course: Course) -> None:
    moved = replace(course, augment=Augment(pad_crop=2))
    ask_teacher(moved, silent)
    assert not moved.kept
    for lesson in lessons(moved, 1):
        assert np.array_equal(lesson.teacher["y"], course.teach(lesson.x)["y"])


def test_without_a_teacher_there_is_nothing_to_ask(course: Course) -> None:
    alone = replace(course, teach=None)
    ask_teacher(alone, silent)
    assert next(lessons(alone, 1)).teacher == {}
