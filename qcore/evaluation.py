"""Evaluation: candidate, baseline and a released champion on exactly the same samples, counted per sample.

Streaming: of outputs only what a `Tally` holds is kept. Measuring time is the runtime's job; judging is the gate's.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcore.derived import (
    agreements,
    area_metrics,
    champion_metrics,
    class_counts,
    class_metrics,
    confusion,
    means,
    paired_counts,
)
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
    champion_paired: PairedCounts | None
    details: ClassDetails | None
    metrics: Mapping[str, float]
    user_metrics: Mapping[str, Direction]

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.samples.index)


MODELS = ("baseline", "candidate", "champion")
"""The models of an evaluation, in the order in which outputs are held; the last one may be missing."""


@dataclass(slots=True)
class _Columns:
    """Per-sample results while they grow."""

    index: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    baseline: list[int] = field(default_factory=list)
    candidate: list[int] = field(default_factory=list)
    champion: list[int] = field(default_factory=list)
    values: dict[str, list[list[float]]] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    top5: PairedCounts | None = None
    champion_top5: PairedCounts | None = None
    bins: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    classes: int = 0


@dataclass(frozen=True, slots=True)
class _Seen:
    """One batch: sample numbers, flat outputs of `MODELS`, and the truth."""

    index: NDArray[np.int64]
    outputs: tuple[Flat, ...]
    truth: Array | None

    @property
    def first(self) -> tuple[NDArray[np.float64], ...]:
        """The baseline's first output, and the output of that name of the other models."""
        name = next(iter(self.outputs[0]))
        return tuple(side[name] for side in self.outputs)


def evaluate(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, Array | None]],
    question: Question = CLASSES,
    champion: Predict | None = None,
) -> PairedResult:
    """Return the paired result of all models over `batches`; see `count_samples`."""
    return result_of(count_samples(candidate, baseline, batches, question, champion))


def count_samples(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, Array | None]],
    question: Question = CLASSES,
    champion: Predict | None = None,
) -> Tally:
    """Return what is kept of all models' answers over `batches`.

    The first output, over all axes but the first, is the prediction: its arg-max names the class, its values are those
    of a regression or the score of an anomaly. An output of one value per sample names no class. The output error
    covers every output.

    Args:
        candidate: named inputs to named outputs, batch first.
        baseline: the same inputs and output shape.
        batches: per batch sample numbers (n,), model inputs, and the truth or None: class numbers (n,), targets
            (n, outputs) of a regression, or 0 and 1 (n,) for anomalies.
        question: the task and further metrics.
        champion: a released model with the same inputs and output shapes, None without one.

    Raises:
        ModelError: outputs differ in shape, or a model gives NaN or infinity.
        DataError: the truth does not fit the model, or there are no samples.
    """
    columns = _Columns()
    models = (baseline, candidate) if champion is None else (baseline, candidate, champion)
    for index, fed, truth in batches:
        answers = tuple(predict(fed) for predict in models)
        outputs = tuple(_outputs(a, who, len(index)) for a, who in zip(answers, MODELS, strict=False))
        _refuse_other_shapes(outputs)
        seen = _Seen(index, outputs, truth)
        columns.index += index.tolist()
        for name, value in outputs[0].items():
            _add(columns, f"power of {name}", np.sum(value**2))
            for noise, side in zip(NOISE, outputs[1:], strict=False):
                _add(columns, f"{noise}{name}", np.sum((value - side[name]) ** 2))
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
        champion=tuple(columns.champion),
        values={k: Values(**dict(zip(MODELS, map(tuple, v), strict=False))) for k, v in columns.values.items()},
        sums=columns.sums,
        top5=columns.top5,
        champion_top5=columns.champion_top5,
        bins={k: tuple((int(a), int(b), int(c)) for a, b, c in v) for k, v in columns.bins.items()},
    )


NOISE = ("noise of ", "champion's noise of ")
"""What the squared errors of candidate and champion against the baseline are summed as, before the output's name."""


def _refuse_other_shapes(outputs: tuple[Flat, ...]) -> None:
    shapes = [{k: v.shape[1:] for k, v in side.items()} for side in outputs]
    for who, found in zip(MODELS, shapes, strict=False):
        if found != shapes[0]:
            remedy = "pass the model that the candidate was made from as baseline"
            if who == "champion":
                remedy = "a champion that answers something else cannot be compared; evaluate without --champion"
            raise ModelError(
                f"{who} gives outputs {found}, baseline {shapes[0]}; allowed: equal names and shapes; {remedy}"
            )


def _add(columns: _Columns, name: str, value: float) -> None:
    columns.sums[name] = columns.sums.get(name, 0) + exact(value)


def _append(columns: _Columns, name: str, given: Sequence[Array]) -> None:
    """Append a batch to the columns `name`, one array (n,) per model."""
    grown = columns.values.setdefault(name, [[] for _ in given])
    for column, values in zip(grown, given, strict=True):
        column += values.tolist()


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
    theirs = seen.first[0]
    columns.classes = classes = theirs.shape[1]
    named = [side.argmax(axis=1) for side in seen.first]
    if classes > 1:
        grown = (columns.baseline, columns.candidate, columns.champion)
        for column, classes_named in zip(grown, named, strict=False):
            column += classes_named.tolist()
    if seen.truth is None:
        return
    labels = seen.truth.astype(np.int64)
    _check_labels(labels, seen.index, classes)
    columns.label += labels.tolist()
    for name, outputs, top in zip(MODELS[:2], seen.first, named, strict=False):
        bins = probability_bins(top_probability(outputs, theirs), top == labels)
        columns.bins[name] = columns.bins[name] + bins if name in columns.bins else bins
    if classes > TOP:
        among = [_among_top(side, labels) for side in seen.first]
        columns.top5 = _plus(columns.top5, paired_counts(among[1], among[0]))
        if len(among) > 2:
            columns.champion_top5 = _plus(columns.champion_top5, paired_counts(among[1], among[2]))


def _plus(total: PairedCounts | None, counts: PairedCounts) -> PairedCounts:
    return counts if total is None else added([total, counts])


def _among_top(outputs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each sample whether its label is among the five largest outputs, of equals the first."""
    own = outputs[np.arange(len(labels)), labels][:, None]
    before = (outputs > own) | ((outputs == own) & (np.arange(outputs.shape[1]) < labels[:, None]))
    result: NDArray[np.bool_] = before.sum(axis=1) < TOP
    return result


def _count_errors(columns: _Columns, seen: _Seen, centre: NDArray[np.float64] | None) -> None:
    theirs = seen.first[0]
    if seen.truth is None or centre is None:
        raise DataError("a regression has no targets; allowed: an array `y` of floats; set `task: none` without one")
    if seen.truth.shape != theirs.shape:
        raise DataError(
            f"targets have {seen.truth.shape[1]} values per sample, the model's first output {theirs.shape[1]}; "
            "allowed: equal numbers; correct `y` in the data card"
        )
    targets = seen.truth.astype(np.float64)
    off = [np.abs(side - targets) for side in seen.first]
    _append(columns, ERROR, [side.mean(axis=1) for side in off])
    for who, side in zip(MODELS, off, strict=False):
        _add(columns, f"squares of {who}", np.sum(side**2))
    _add(columns, "spread", np.sum((targets - centre) ** 2))
    columns.classes = targets.shape[1]


def _count_anomalies(columns: _Columns, seen: _Seen) -> None:
    theirs = seen.first[0]
    if theirs.shape[1] != 1:
        raise DataError(
            f"the model's first output has {theirs.shape[1]} values per sample; allowed for anomalies: 1, larger for "
            "what is odd; set another `task` in the data card"
        )
    if seen.truth is None:
        raise DataError("anomaly scores have no labels; allowed: an array `y` of 0 and 1; set `task: none` without one")
    columns.label += seen.truth.astype(np.int64).tolist()
    columns.classes = 1
    _append(columns, ANOMALY, [side[:, 0] for side in seen.first])


def _named(x: float) -> str:
    return "NaN" if np.isnan(x) else "infinity" if x > 0 else "minus infinity"


def _score(columns: _Columns, metric: UserMetric, answers: tuple[Tensors, ...], seen: _Seen) -> None:
    n = len(seen.index)
    given = []
    for outputs, who in zip(answers, MODELS, strict=False):
        scores = np.asarray(metric.score({k: v[:n] for k, v in outputs.items()}, seen.truth))
        if scores.shape != (n,) or scores.dtype.kind not in "fiub":
            raise DataError(
                f"metric {metric.name} gives {scores.dtype} of shape {scores.shape} for {n} samples; allowed: a finite "
                "number per sample; correct the function"
            )
        if not (finite := np.isfinite(scores)).all():
            place = int(np.argmin(finite))
            raise DataError(
                f"metric {metric.name} gives {_named(scores[place])} for sample {seen.index[place]} with the outputs "
                f"of the {who}; allowed: a finite number per sample; correct the function"
            )
        given.append(scores.astype(np.float64))
    _append(columns, metric.name, given)


def _outputs(outputs: Mapping[str, Array], who: str, n: int) -> Flat:
    """Return every output as (n, values); a fixed batch that was filled up with repeats is cut to its samples."""
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.size == 0 or value.dtype.kind not in "fiub" or len(value) < n:
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
    metrics = {"output_sqnr_db": _worst_sqnr_db(tally.sums, NOISE[0])}
    if any(name.startswith(NOISE[1]) for name in tally.sums):
        metrics["champion_output_sqnr_db"] = _worst_sqnr_db(tally.sums, NOISE[1])
    if tally.baseline:
        metrics |= agreements(tally.baseline, tally.candidate, tally.champion or None)
    paired = champion_paired = details = None
    if tally.task == "classification" and tally.label:
        label, theirs, ours = (np.array(c, np.int64) for c in (tally.label, tally.baseline, tally.candidate))
        paired, details = paired_counts(ours == label, theirs == label), _class_details(tally)
        metrics |= class_metrics(paired, details)
        if tally.champion:
            champion_paired = paired_counts(ours == label, np.array(tally.champion, np.int64) == label)
            metrics |= champion_metrics(champion_paired, tally.champion_top5)
    for name, values in tally.values.items():
        if name in tally.user_metrics:
            metrics |= means(name, values)
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
        champion=tally.champion or None,
    )
    return PairedResult(
        samples=samples,
        paired=paired,
        champion_paired=champion_paired,
        details=details,
        metrics=metrics,
        user_metrics=tally.user_metrics,
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
    values, spread = tally.n * tally.classes, rounded(tally.sums["spread"])
    metrics = {k.replace(ERROR, "mae"): v for k, v in means(ERROR, tally.values[ERROR]).items()}
    for prefix, side in (("", "candidate"), ("baseline_", "baseline"), ("champion_", "champion")):
        if f"squares of {side}" not in tally.sums:
            continue
        squares = rounded(tally.sums[f"squares of {side}"])
        metrics[f"{prefix}rmse"] = math.sqrt(squares / values)
        if spread > 0:
            metrics[f"{prefix}r2"] = 1 - squares / spread
    return metrics


def _worst_sqnr_db(sums: Mapping[str, int], noise: str) -> float:
    """Return the SQNR of the worst output; equal outputs have no noise and get the ceiling of the report."""
    names = [name.removeprefix("power of ") for name in sums if name.startswith("power of ")]
    return min(limited_db(rounded(sums[f"power of {n}"]), rounded(sums[f"{noise}{n}"])) for n in names)


def golden_samples(predict: Predict, fed: Tensors) -> bytes:
    """Return an `.npz` of `fed` as `input:<name>` and the outputs as `output:<name>`.

    A device runs the inputs through the installed model and compares. The same arrays give the same bytes.
    """
    arrays = {f"input:{k}": v for k, v in sorted(fed.items())}
    arrays |= {f"output:{k}": v for k, v in sorted(predict(fed).items())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
