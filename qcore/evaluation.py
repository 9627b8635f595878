"""Evaluation: candidate and baseline on exactly the same samples, counted per sample.

Streaming: only arg-max indices and sums are kept, never outputs. Measuring time is the runtime's job; judging is the
gate's.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcore.errors import DataError, ModelError
from qcore.numerics.error import limited_db
from qcore.report import PairedCounts, Samples

Tensors = Mapping[str, NDArray[np.generic]]
Predict = Callable[[Tensors], Mapping[str, NDArray[np.generic]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """What one pass over the data gives: per-sample columns, counts (None without labels), and metrics."""

    samples: Samples
    paired: PairedCounts | None
    metrics: Mapping[str, float]

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.samples.index)


@dataclass(slots=True)
class _Columns:
    """Per-sample results while they grow."""

    index: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    baseline: list[int] = field(default_factory=list)
    candidate: list[int] = field(default_factory=list)
    powers: list[list[tuple[float, float]]] = field(default_factory=list)
    classes: int = 0


def evaluate(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, NDArray[np.int64] | None]],
) -> PairedResult:
    """Return the paired result of both models over `batches`.

    The arg-max of the first output, over all axes but the first, is the prediction; an output of one value per
    sample names no class, so nothing is counted right or agreeing for it. The output error covers every output.

    Args:
        candidate: named inputs to named outputs, batch first.
        baseline: the same inputs and output shape.
        batches: per batch sample numbers (n,), model inputs, and labels (n,) or None.

    Raises:
        ModelError: outputs differ in shape, or a model gives NaN or infinity.
        DataError: a label is not a class of the model, or there are no samples.
    """
    columns = _Columns()
    labelled = True
    for index, fed, labels in batches:
        theirs, ours = (
            _outputs(baseline(fed), "baseline", len(index)),
            _outputs(candidate(fed), "candidate", len(index)),
        )
        shapes = [{k: v.shape[1:] for k, v in side.items()} for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"candidate gives outputs {shapes[0]}, baseline {shapes[1]}; allowed: equal names and shapes; pass the "
                "model that the candidate was made from as baseline"
            )
        first = next(iter(theirs))
        classes = theirs[first].shape[1]
        columns.powers.append([(np.sum(v**2), np.sum((v - ours[k]) ** 2)) for k, v in theirs.items()])
        columns.index += index.tolist()
        columns.baseline += theirs[first].argmax(axis=1).tolist()
        columns.candidate += ours[first].argmax(axis=1).tolist()
        columns.classes = classes
        if labels is None:
            labelled = False
        else:
            _check_labels(labels, index, classes)
            columns.label += labels.tolist()
    if not columns.index:
        raise DataError("there are no samples to evaluate; allowed: at least 1; check the split in the data card")
    return _result(columns, labelled)


def _outputs(outputs: Mapping[str, NDArray[np.generic]], who: str, n: int) -> dict[str, NDArray[np.float64]]:
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
            "more; set `task: none` in the data card to compare the values themselves"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"sample {index[at]} has label {labels[at]}; the model has {classes} outputs, allowed: 0 to {classes - 1}; "
            "correct the labels or `classes`"
        )


def _result(columns: _Columns, labelled: bool) -> PairedResult:
    theirs, ours = np.array(columns.baseline), np.array(columns.candidate)
    metrics = {"output_sqnr_db": _worst_sqnr_db(columns)}
    if columns.classes > 1:
        metrics["agreement"] = float(np.mean(theirs == ours))
    paired = None
    if labelled:
        right, was_right = ours == np.array(columns.label), theirs == np.array(columns.label)
        paired = PairedCounts(
            both_right=int(np.sum(right & was_right)),
            only_candidate_right=int(np.sum(right & ~was_right)),
            only_baseline_right=int(np.sum(~right & was_right)),
            both_wrong=int(np.sum(~right & ~was_right)),
        )
        metrics |= {
            "top1": float(np.mean(right)),
            "baseline_top1": float(np.mean(was_right)),
            "top1_delta": (paired.only_candidate_right - paired.only_baseline_right) / paired.n,
        }
    samples = Samples(
        index=tuple(columns.index),
        label=tuple(columns.label) if labelled else None,
        baseline=tuple(columns.baseline),
        candidate=tuple(columns.candidate),
    )
    return PairedResult(samples=samples, paired=paired, metrics=metrics)


def _worst_sqnr_db(columns: _Columns) -> float:
    """Return the SQNR of the worst output; equal outputs have no noise and get the ceiling of the report."""
    totals = np.sum(np.array(columns.powers, np.float64), axis=0)
    return min(limited_db(float(signal), float(noise)) for signal, noise in totals)


def golden_samples(predict: Predict, fed: Tensors) -> bytes:
    """Return an `.npz` of `fed` as `input:<name>` and the outputs as `output:<name>`.

    A device runs the inputs through the installed model and compares. The same arrays give the same bytes.
    """
    arrays = {f"input:{k}": v for k, v in sorted(fed.items())}
    arrays |= {f"output:{k}": v for k, v in sorted(predict(fed).items())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
