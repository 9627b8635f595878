"""What training steps of a recipe learn from: splits of a data card, opened for reading in any order."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import ConfigError, DataError
from qcore.steps.guard import OnEpoch, Progress, silent, unseen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qcore.data.card import Split
    from qcore.data.dataset import Dataset
    from qcore.data.samples import Samples
    from qcore.recipe import TRAINING
    from qcore.training.course import Feed
    from qcore.training.finetune import Schooling

logger = logging.getLogger(__name__)
School = Callable[["TRAINING", int], "Schooling"]
EXAM = "evaluation"
JUDGES = 10  # without a validation split one sample in so many judges
_CHECKPOINT = "checkpoint"
_NO_TORCH = "training needs torch, which is not installed; run `pip install -c constraints.txt .[train]`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What training needs besides a recipe: the data card, the split that is learnt from where the card has no split of
    the step's `train`, the device ("cpu", "cuda" or "auto"), and who is told.
    """  # noqa: D205

    data: Path
    split: str
    device: str = "auto"
    progress: Progress = silent
    on_epoch: OnEpoch = unseen


@contextlib.contextmanager
def parted() -> Iterator[None]:
    """Let this process part from the others that trained with it when the block ends, however it ends."""
    try:
        yield
    finally:
        if find_spec("torch") is not None:
            from qcore.training.processes import leave

            leave()


def checkpoint_of(out: Path, position: int) -> Path:
    """Return the file in which the training step at `position` of a recipe that writes `out` keeps its state."""
    return out.with_name(f"{out.name}.{position}.{_CHECKPOINT}")


def refuse_hopeless(out: Path, wanted: "Sequence[TRAINING]", device: str) -> None:
    """Refuse before the first step what training or writing would be refused for at the end.

    Args:
        out: where the model goes.
        wanted: the steps that train.
        device: as asked for.

    Raises:
        ConfigError: torch or the device is missing, or nothing can be written where `out` lies.
        ModelError: a teacher cannot be read.
    """
    from qcore.graph.io import load_model

    for step in wanted:
        if step.teacher is not None:
            load_model(Path(step.teacher))
    if find_spec("torch") is None:
        raise ConfigError(_NO_TORCH)
    from qcore.training.processes import join

    folder = next(p for p in out.resolve().parents if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qcore-"):
            pass
    except OSError as e:
        raise ConfigError(f"output {out} cannot be written: {e.strerror}; pass another path") from e
    join(device)


def school_of(raw: bytes, training: Training, *, out: Path, folder: Path) -> School:
    """Return what gives each training step of a recipe its samples and its teacher.

    Args:
        raw: the model.
        training: from what.
        out: the state of a run is kept beside it.
        folder: for what samples are unpacked to.

    Raises:
        ConfigError: torch is not installed.
    """
    from qcore.canonical import sha256_json
    from qcore.data.samples import open_samples
    from qcore.graph.io import load_model
    from qcore.trials import source_sha256

    if find_spec("torch") is None:
        raise ConfigError(_NO_TORCH)
    feed = _feed(raw)

    def school(step: "TRAINING", position: int) -> "Schooling":
        from qcore.training.finetune import Schooling

        learn, judge = splits(training.data, training.split, step)
        places = [folder / f"{position}-{what}" for what in ("learn", "judge")]
        for place in places:
            place.mkdir()
        return Schooling(
            learn=open_samples(learn, places[0]),
            judge=open_samples(judge, places[1]),
            feed=feed,
            folder=places[0],
            teacher=None if step.teacher is None else load_model(Path(step.teacher)),
            checkpoint=checkpoint_of(out, position),
            key=sha256_json([learn.sha256, judge.sha256, source_sha256()]),
            device=training.device,
            told=lambda what, done, total: training.progress(f"{step.method}: {what}", done, total),
            on_epoch=training.on_epoch,
        )

    return school


def splits(data: Path, split: str, step: "TRAINING", level: int = logging.WARNING) -> "tuple[Dataset, Dataset]":
    """Return what `step` learns from and what judges it: a split of the card each, or parts of one.

    That another split judges than the card says is logged at `level`.

    Raises:
        DataError: the two share samples, or what is learnt from those of the split `evaluation`, or there are fewer
            than two.
    """
    from qcore.data.card import load_card
    from qcore.data.dataset import one_class, open_dataset, shared_samples

    known = load_card(data)[0].splits
    named = step.model_fields_set
    own = step.train in known or "train" in named
    learn = open_dataset(data, step.train if own else split)
    if not own:
        logger.log(
            level,
            "%s has no split %r: %d samples of %r are learnt from; add %r to the card, with more samples",
            learn.card.name,
            step.train,
            learn.n,
            learn.split,
            step.train,
        )
    _refuse_learning_the_exam(data, learn, known)
    if step.validation in known or "validation" in named:
        judge = open_dataset(data, step.validation)
        one = one_class(judge)
        if one is not None and one_class(learn) is None and "validation" not in named:
            logger.log(
                level,
                "split %r of %s holds class %d only, which cannot judge; one sample in %d of %r judges instead",
                judge.split,
                judge.card.name,
                one,
                JUDGES,
                learn.split,
            )
            return _divided(learn)
        if shared := shared_samples(learn, judge):
            raise DataError(
                f"splits {learn.split!r} and {judge.split!r} share {shared} samples, so training would judge itself by "
                "what it learns; correct the card"
            )
        return learn, judge
    return _divided(learn)


def _refuse_learning_the_exam(data: Path, learn: "Dataset", known: "Mapping[str, Split]") -> None:
    """Refuse to learn from samples that reports are made of: they would say how well the model remembers."""
    from qcore.data.dataset import open_dataset, shared_samples

    if EXAM not in known:
        return
    exam = open_dataset(data, EXAM)
    if shared := shared_samples(learn, exam):
        raise DataError(
            f"splits {learn.split!r} and {EXAM!r} share {shared} samples, so the model would be evaluated on what it "
            "has learnt; correct the card, or name another split to learn from"
        )


def _divided(learn: "Dataset") -> "tuple[Dataset, Dataset]":
    """Return what is learnt from and what judges, of one split."""
    if learn.n < 2:
        raise DataError(f"split {learn.split!r} has {learn.n} sample; allowed: 2 or more, since some must judge")
    held = set(range(min(JUDGES, learn.n) - 1, learn.n, JUDGES))
    return _part(learn, [k for k in range(learn.n) if k not in held]), _part(learn, sorted(held))


def _part(data: "Dataset", places: list[int]) -> "Dataset":
    from qcore.canonical import sha256_json

    indices = tuple(data.indices[k] for k in places)
    labels = None if data.labels is None else tuple(data.labels[k] for k in places)
    return replace(data, indices=indices, labels=labels, sha256=sha256_json({"of": data.sha256, "places": places}))


def _feed(raw: bytes) -> "Feed":
    """Return what makes inputs of the model from samples."""
    from qcore.runtime import ort

    loaded = ort.load(raw)
    if loaded.fixed_batch is not None:
        raise ConfigError(
            f"the model insists on batches of {loaded.fixed_batch}; allowed for training: any number; export "
            "it with a symbolic first dimension"
        )

    def feed(
        samples: "Samples", places: "NDArray[np.int64]"
    ) -> "tuple[dict[str, NDArray[np.generic]], NDArray[np.int64] | None]":
        batch = samples.read(places)
        return ort.samples(loaded, batch), batch.y

    return feed
