"""What training reads: batches of shuffled, augmented samples, with what the teacher says of them.

The order of an epoch and every random move follow from seed, epoch and step alone, so a run that is taken up again,
or shared by several processes, sees the same samples. Of samples that never change the teacher is asked once, in their
order: what it says then does not depend on where a run was taken up.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcore.data.samples import Samples
from qcore.methods.finetune import Augment

Arrays = dict[str, NDArray[np.generic]]
Feed = Callable[[Samples, NDArray[np.int64]], tuple[Arrays, NDArray[np.int64] | None]]
"""From places in a split to named inputs of the model and labels."""
Teach = Callable[[Mapping[str, NDArray[np.generic]]], Arrays]
_MOST_KEPT = 1 << 32  # bytes of teacher outputs that are kept on disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """One step: places, named inputs, labels or None, the teacher's outputs, and the share of the whole batch.

    With several processes each gets its part of the batch; `share` is how much of the batch's mean it stands for. A
    process for which no sample is left gets one that does not count: `share` 0.
    """

    places: NDArray[np.int64]
    x: Arrays
    y: NDArray[np.int64] | None
    teacher: Arrays
    share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A split to learn from or to judge by.

    `teach` is None where no teacher is needed. `layout` is that of the model's inputs. `rank` and `world` say which
    part of every batch this process takes. With `whole` the last batch of an epoch is left out if it is smaller than
    the others. `kept` holds what the teacher said, see `ask_teacher`.
    """

    samples: Samples
    feed: Feed
    teach: Teach | None
    layout: str
    augment: Augment
    batch: int
    seed: int
    folder: Path
    rank: int = 0
    world: int = 1
    whole: bool = False
    kept: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        if self.whole:
            return max(1, self.samples.n // self.batch)
        return math.ceil(self.samples.n / self.batch)

    @property
    def plain(self) -> bool:
        """Whether every epoch shows the same values."""
        return not (self.augment.pad_crop or self.augment.flip)


def lessons(course: Course, epoch: int) -> Iterator[Lesson]:
    """Yield the batches of an epoch, shuffled; the next one is prepared while this one is worked on."""
    order = np.random.default_rng([course.seed, epoch]).permutation(course.samples.n)
    yield from _ahead(course, order, epoch)


def exam(course: Course) -> Iterator[Lesson]:
    """Yield all samples in their order, as they are."""
    yield from _ahead(course, np.arange(course.samples.n), None)


def _ahead(course: Course, order: NDArray[np.int64], epoch: int | None) -> Iterator[Lesson]:
    def prepared(step: int) -> Lesson | None:
        return _lesson(course, order, step, epoch) if step < course.steps else None

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(prepared, 0)
        for step in range(course.steps):
            lesson = following.result()
            following = reader.submit(prepared, step + 1)
            if lesson is not None:
                # Here and not ahead: it takes all cores, as the student does, and would slow both down.
                yield replace(lesson, teacher=_taught(course, lesson))


def _lesson(course: Course, order: NDArray[np.int64], step: int, epoch: int | None) -> Lesson:
    """Return this process's part of batch `step`; with `epoch` None nothing is moved at random."""
    whole = order[step * course.batch : (step + 1) * course.batch]
    start, stop = (len(whole) * r // course.world for r in (course.rank, course.rank + 1))
    share = (stop - start) * course.world / len(whole)
    part = slice(start, stop) if stop > start else slice(0, 1)
    x, y = course.feed(course.samples, whole[part])
    if epoch is not None and not course.plain:
        moves = drawn(course.augment, len(whole), np.random.default_rng([course.seed, epoch, step]))
        x = {k: augmented(v, moves[part], course.layout, course.augment.pad_crop) for k, v in x.items()}
    return Lesson(places=whole[part], x=x, y=y, teacher={}, share=share)


def drawn(augment: Augment, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the random moves of `n` images, (n, 3): down and right by 0 to 2 * pad_crop, and whether mirrored."""
    shifts = rng.integers(0, 2 * augment.pad_crop + 1, (n, 2))
    flips = rng.integers(0, 2, (n, 1)) if augment.flip else np.zeros((n, 1), np.int64)
    return np.concatenate([shifts, flips], axis=1)


def augmented(x: NDArray[np.generic], moves: NDArray[np.int64], layout: str, pad: int) -> NDArray[np.generic]:
    """Return images moved by `moves` with zeros where nothing was; what is no image (not 4-D) stays as it is.

    Args:
        x: (n, ...), images in `layout`.
        moves: of `drawn`.
        layout: NCHW or NHWC.
        pad: the most pixels of a move.
    """
    if x.ndim != 4 or layout not in ("NCHW", "NHWC"):
        return x
    rows, columns = layout.index("H"), layout.index("W")
    widths = [(0, 0)] * 4
    widths[rows] = widths[columns] = (pad, pad)
    padded = np.pad(x, widths)
    out = np.empty_like(x)
    for k, (down, right, mirrored) in enumerate(moves):
        window = [slice(None)] * 3
        window[rows - 1] = slice(down, down + x.shape[rows])
        window[columns - 1] = slice(right, right + x.shape[columns])
        image = padded[k][tuple(window)]
        out[k] = np.flip(image, columns - 1) if mirrored else image
    return out


def ask_teacher(course: Course, told: Callable[[int, int], None]) -> None:
    """Keep what the teacher says of every sample, in files, where samples do not change and the files are not large.

    Args:
        course: gets `kept`.
        told: the number of samples done, and of how many.
    """
    n = course.samples.n
    if course.teach is None or not course.plain:
        return
    for start in range(0, n, course.batch):
        places = np.arange(start, min(start + course.batch, n))
        made = course.teach(course.feed(course.samples, places)[0])
        if start == 0:
            if any(v.ndim == 0 or len(v) != len(places) for v in made.values()):
                return
            if sum(v[0].nbytes for v in made.values()) * n > _MOST_KEPT:
                return
            for k, (name, v) in enumerate(made.items()):
                file = course.folder / f"teacher-{k}.raw"
                course.kept[name] = np.memmap(file, v.dtype, "w+", shape=(n, *v.shape[1:]))
        for name, v in made.items():
            course.kept[name][places] = v
        told(int(places[-1]) + 1, n)


def _taught(course: Course, lesson: Lesson) -> Arrays:
    if course.teach is None:
        return {}
    return {name: np.asarray(v[lesson.places]) for name, v in course.kept.items()} or course.teach(lesson.x)
