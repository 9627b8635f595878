"""Evaluation: candidate and baseline on exactly the same samples, counted per sample.

Streaming: of outputs only what a `Tally` holds is kept. Measuring time is the runtime's job; judging is the gate's.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcore.derived import area_metrics, class_counts, class_metrics, confusion, mean, paired_counts
from qcore.errors import DataError, ModelError
from qcore.numerics.error import limited_db
from qcore.numerics.reliability import UNIT, probability_bins, top_probability
from qcore.report import (
    ByModel,
    ClassDetails,
    Direction,
    PairedCounts,
    ProbabilityBin,
    Samples,
    Task,
    Values,
)
from qcore.tally import Tally, added, exact, rounded

Array = NDArray[np.generic]
Tensors = Mapping[str, Array]
Predict = Callable[[Tensors], Mapping[str, Array]]
Score = Callable[[Mapping[str, Array], Array | None], Array]
Flat = dict[str, NDArray[np.float64]]

TOP = 5
ERROR, ANOMALY = "absolute_error", "score"
"""Names of the columns that regression and anomaly scores have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserMetric:
    """A metric of the user's own: `score(outputs, truth)` gives a number per sample, and their mean is the metric."""

    name: str
    direction: Direction
    score: Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is measured: the task, metrics of the user, and the mean target (outputs,) that R2 compares with."""

    task: Task = "classification"
    centre: NDArray[np.float64] | None = None
    metrics: tuple[UserMetric, ...] = ()


CLASSES = Question()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """What one pass over the data gives: per-sample columns, counts and details of labelled classes, and metrics."""

    samples: Samples
    paired: PairedCounts | None
    details: ClassDetails | None
    metrics: Mapping[str, float]
    user_metrics: Mapping[str, Direction]

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.samples.index)


Pair = tuple[list[float], list[float]]


@dataclass(slots=True)
class _Columns:
    """Per-sample results while they grow."""

    index: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    baseline: list[int] = field(default_factory=list)
    candidate: list[int] = field(default_factory=list)
    values: dict[str, Pair] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    top5: PairedCounts | None = None
    bins: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    classes: int = 0


@dataclass(frozen=True, slots=True)
class _Seen:
    """One batch: sample numbers, flat outputs of baseline and candidate, the first output's name, and the truth."""

    index: NDArray[np.int64]
    theirs: Flat
    ours: Flat
    truth: Array | None

    @property
    def first(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The first output of baseline and candidate."""
        name = next(iter(self.theirs))
        return self.theirs[name], self.ours[name]


def evaluate(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, Array | None]],
    question: Question = CLASSES,
) -> PairedResult:
    """Return the paired result of both models over `batches`; see `count_samples`."""
    return result_of(count_samples(candidate, baseline, batches, question))


def count_samples(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, Array | None]],
    question: Question = CLASSES,
) -> Tally:
    """Return what is kept of both models' answers over `batches`.

    The first output, over all axes but the first, is the prediction: its arg-max names the class, its values are those
    of a regression or the score of an anomaly. An output of one value per sample names no class. The output error
    covers every output.

    Args:
        candidate: named inputs to named outputs, batch first.
        baseline: the same inputs and output shape.
        batches: per batch sample numbers (n,), model inputs, and the truth or None: class numbers (n,), targets
            (n, outputs) of a regression, or 0 and 1 (n,) for anomalies.
        question: the task and further metrics.

    Raises:
        ModelError: outputs differ in shape, or a model gives NaN or infinity.
        DataError: the truth does not fit the model, or there are no samples.
    """
    columns = _Columns()
    for index, fed, truth in batches:
        answers = baseline(fed), candidate(fed)
        theirs, ours = _outputs(answers[0], "baseline", len(index)), _outputs(answers[1], "candidate", len(index))
        shapes = [{k: v.shape[1:] for k, v in side.items()} for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"candidate gives outputs {shapes[0]}, baseline {shapes[1]}; allowed: equal names and shapes; pass the "
                "model that the candidate was made from as baseline"
            )
        seen = _Seen(index, theirs, ours, truth)
        columns.index += index.tolist()
        for name, value in theirs.items():
            _add(columns, f"power of {name}", np.sum(value**2))
            _add(columns, f"noise of {name}", np.sum((value - ours[name]) ** 2))
        _count(columns, seen, question)
        for metric in question.metrics:
            _score(columns, metric, answers, seen)
    if not columns.index:
        raise DataError("there are no samples to evaluate; allowed: at least 1; check the split in the data card")
    return Tally(
        task=question.task,
        classes=columns.classes,
        user_metrics={m.name: m.direction for m in question.metrics},
        index=tuple(columns.index),
        label=tuple(columns.label),
        baseline=tuple(columns.baseline),
        candidate=tuple(columns.candidate),
        values={k: Values(baseline=tuple(b), candidate=tuple(c)) for k, (b, c) in columns.values.items()},
        sums=columns.sums,
        top5=columns.top5,
        bins={k: tuple((int(a), int(b), int(c)) for a, b, c in v) for k, v in columns.bins.items()},
    )


def _add(columns: _Columns, name: str, value: float) -> None:
    columns.sums[name] = columns.sums.get(name, 0) + exact(value)


def _append(columns: _Columns, name: str, baseline: Array, candidate: Array) -> None:
    theirs, ours = columns.values.setdefault(name, ([], []))
    theirs += baseline.tolist()
    ours += candidate.tolist()


def _count(columns: _Columns, seen: _Seen, question: Question) -> None:
    """Count one batch as its task asks."""
    match question.task:
        case "classification" | "none":
            _count_classes(columns, seen)
        case "regression":
            _count_errors(columns, seen, question.centre)
        case "anomaly":
            _count_anomalies(columns, seen)


def _count_classes(columns: _Columns, seen: _Seen) -> None:
    theirs, ours = seen.first
    columns.classes = classes = theirs.shape[1]
    named = [theirs.argmax(axis=1), ours.argmax(axis=1)]
    if classes > 1:
        columns.baseline += named[0].tolist()
        columns.candidate += named[1].tolist()
    if seen.truth is None:
        return
    labels = seen.truth.astype(np.int64)
    _check_labels(labels, seen.index, classes)
    columns.label += labels.tolist()
    for name, outputs, top in (("baseline", theirs, named[0]), ("candidate", ours, named[1])):
        bins = probability_bins(top_probability(outputs, theirs), top == labels)
        columns.bins[name] = columns.bins[name] + bins if name in columns.bins else bins
    if classes > TOP:
        counts = paired_counts(_among_top(ours, labels), _among_top(theirs, labels))
        columns.top5 = counts if columns.top5 is None else added([columns.top5, counts])


def _among_top(outputs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each sample whether its label is among the five largest outputs, of equals the first."""
    own = outputs[np.arange(len(labels)), labels][:, None]
    before = (outputs > own) | ((outputs == own) & (np.arange(outputs.shape[1]) < labels[:, None]))
    result: NDArray[np.bool_] = before.sum(axis=1) < TOP
    return result


def _count_errors(columns: _Columns, seen: _Seen, centre: NDArray[np.float64] | None) -> None:
    theirs, ours = seen.first
    if seen.truth is None or centre is None:
        raise DataError("a regression has no targets; allowed: an array `y` of floats; set `task: none` without one")
    if seen.truth.shape != theirs.shape:
        raise DataError(
            f"targets have {seen.truth.shape[1]} values per sample, the model's first output {theirs.shape[1]}; "
            "allowed: equal numbers; correct `y` in the data card"
        )
    targets = seen.truth.astype(np.float64)
    off = [np.abs(side - targets) for side in (theirs, ours)]
    _append(columns, ERROR, off[0].mean(axis=1), off[1].mean(axis=1))
    _add(columns, "squares of baseline", np.sum(off[0] ** 2))
    _add(columns, "squares of candidate", np.sum(off[1] ** 2))
    _add(columns, "spread", np.sum((targets - centre) ** 2))
    columns.classes = targets.shape[1]


def _count_anomalies(columns: _Columns, seen: _Seen) -> None:
    theirs, ours = seen.first
    if theirs.shape[1] != 1:
        raise DataError(
            f"the model's first output has {theirs.shape[1]} values per sample; allowed for anomalies: 1, larger for "
            "what is odd; set another `task` in the data card"
        )
    if seen.truth is None:
        raise DataError("anomaly scores have no labels; allowed: an array `y` of 0 and 1; set `task: none` without one")
    columns.label += seen.truth.astype(np.int64).tolist()
    columns.classes = 1
    _append(columns, ANOMALY, theirs[:, 0], ours[:, 0])


def _score(columns: _Columns, metric: UserMetric, answers: tuple[Tensors, Tensors], seen: _Seen) -> None:
    n = len(seen.index)
    given = []
    for outputs in answers:
        scores = np.asarray(metric.score({k: v[:n] for k, v in outputs.items()}, seen.truth))
        if scores.shape != (n,) or scores.dtype.kind not in "fiub" or not np.isfinite(scores).all():
            raise DataError(
                f"metric {metric.name} gives {scores.dtype} of shape {scores.shape} for {n} samples; allowed: a finite "
                "number per sample; correct the function"
            )
        given.append(scores.astype(np.float64))
    _append(columns, metric.name, *given)


def _outputs(outputs: Mapping[str, Array], who: str, n: int) -> Flat:
    """Return every output as (n, values); a fixed batch that was filled up with repeats is cut to its samples."""
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.ndim == 0 or value.dtype.kind not in "fiub" or len(value) < n:
            raise ModelError(
                f"output {name!r} of the {who} is not one row of numbers per sample; allowed: tensors whose first "
                "dimension is the batch; remove the output from the model"
            )
    flat = {k: v.reshape(len(v), -1)[:n].astype(np.float64) for k, v in outputs.items()}
    for name, value in flat.items():
        if not np.isfinite(value).all():
            raise ModelError(f"{who} gives NaN or infinity in output {name!r}; allowed: finite values; check the model")
    return flat


def _check_labels(labels: NDArray[np.int64], index: NDArray[np.int64], classes: int) -> None:
    if classes < 2:
        raise DataError(
            "the model gives one value per sample, which names no class; allowed for classification: 2 values or "
            "more; set `task` to none, regression or anomaly in the data card"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"sample {index[at]} has label {labels[at]}; the model has {classes} outputs, allowed: 0 to {classes - 1}; "
            "correct the labels or `classes`"
        )


def result_of(tally: Tally) -> PairedResult:
    """Return metrics and columns of what was counted; equal tallies give equal results."""
    metrics = {"output_sqnr_db": _worst_sqnr_db(tally.sums)}
    paired = details = None
    if tally.baseline:
        metrics["agreement"] = float(np.mean(np.array(tally.baseline) == np.array(tally.candidate)))
    if tally.task == "classification" and tally.label:
        label, theirs, ours = (np.array(c, np.int64) for c in (tally.label, tally.baseline, tally.candidate))
        paired, details = paired_counts(ours == label, theirs == label), _class_details(tally)
        metrics |= class_metrics(paired, details)
    for name, values in tally.values.items():
        if name in tally.user_metrics:
            metrics |= {name: mean(values.candidate), f"baseline_{name}": mean(values.baseline)}
    if tally.task == "regression":
        metrics |= _error_metrics(tally)
    if tally.task == "anomaly":
        if len(kinds := set(tally.label)) == 1:
            raise DataError(f"all samples of the split have label {kinds.pop()}; allowed: both 0 and 1; choose others")
        metrics |= area_metrics(tally.label, tally.values[ANOMALY])
    samples = Samples(
        index=tally.index,
        label=tally.label or None,
        baseline=tally.baseline or None,
        candidate=tally.candidate or None,
        values=tally.values,
    )
    return PairedResult(
        samples=samples, paired=paired, details=details, metrics=metrics, user_metrics=tally.user_metrics
    )


def _class_details(tally: Tally) -> ClassDetails:
    label, theirs, ours = (np.array(c, np.int64) for c in (tally.label, tally.baseline, tally.candidate))
    return ClassDetails(
        classes=class_counts(label, theirs, ours),
        baseline=ByModel(confusion=confusion(label, theirs), reliability=_reliability(tally.bins["baseline"])),
        candidate=ByModel(confusion=confusion(label, ours), reliability=_reliability(tally.bins["candidate"])),
        top5=tally.top5,
    )


def _reliability(bins: tuple[tuple[int, int, int], ...]) -> tuple[ProbabilityBin, ...]:
    return tuple(
        ProbabilityBin(count=n, right=right, confidence=total / UNIT / n if n else 0.0) for n, right, total in bins
    )


def _error_metrics(tally: Tally) -> dict[str, float]:
    values = tally.n * tally.classes
    metrics: dict[str, float] = {}
    for prefix, side in (("", "candidate"), ("baseline_", "baseline")):
        squares, spread = rounded(tally.sums[f"squares of {side}"]), rounded(tally.sums["spread"])
        metrics[f"{prefix}mae"] = mean(getattr(tally.values[ERROR], side))
        metrics[f"{prefix}rmse"] = math.sqrt(squares / values)
        if spread > 0:
            metrics[f"{prefix}r2"] = 1 - squares / spread
    return metrics


def _worst_sqnr_db(sums: Mapping[str, int]) -> float:
    """Return the SQNR of the worst output; equal outputs have no noise and get the ceiling of the report."""
    names = [name.removeprefix("power of ") for name in sums if name.startswith("power of ")]
    return min(limited_db(rounded(sums[f"power of {n}"]), rounded(sums[f"noise of {n}"])) for n in names)


def golden_samples(predict: Predict, fed: Tensors) -> bytes:
    """Return an `.npz` of `fed` as `input:<name>` and the outputs as `output:<name>`.

    A device runs the inputs through the installed model and compares. The same arrays give the same bytes.
    """
    arrays = {f"input:{k}": v for k, v in sorted(fed.items())}
    arrays |= {f"output:{k}": v for k, v in sorted(predict(fed).items())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
