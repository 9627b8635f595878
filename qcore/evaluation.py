"""Evaluation: candidate and baseline on exactly the same samples, counted per sample.

Streaming: only arg-max indices and sums are kept, never outputs. Measuring time is the runtime's job; judging is the
gate's.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcore.errors import DataError, ModelError
from qcore.numerics.error import ratio_db
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


def evaluate(
    candidate: Predict,
    baseline: Predict,
    batches: Iterable[tuple[NDArray[np.int64], Tensors, NDArray[np.int64] | None]],
) -> PairedResult:
    """Return the paired result of both models over `batches`.

    The first output is compared: its arg-max over all axes but the first is the prediction.

    Args:
        candidate: named inputs to named outputs, batch first.
        baseline: the same inputs and output shape.
        batches: per batch sample numbers (n,), model inputs, and labels (n,) or None.

    Raises:
        ModelError: outputs differ in shape, or a model gives NaN or infinity.
        DataError: a label is not a class of the model, or there are no samples.
    """
    columns = _Columns()
    signal = noise = 0.0
    labelled = True
    for index, fed, labels in batches:
        n = len(index)
        theirs, ours = _output(baseline(fed), "baseline", n), _output(candidate(fed), "candidate", n)
        if theirs.shape != ours.shape:
            raise ModelError(
                f"candidate gives outputs {ours.shape}, baseline {theirs.shape}; allowed: equal shapes; pass the "
                "model that the candidate was made from as baseline"
            )
        signal += float(np.sum(theirs**2))
        noise += float(np.sum((theirs - ours) ** 2))
        columns.index += index.tolist()
        columns.baseline += theirs.argmax(axis=1).tolist()
        columns.candidate += ours.argmax(axis=1).tolist()
        if labels is None:
            labelled = False
        else:
            _check_labels(labels, index, theirs.shape[1])
            columns.label += labels.tolist()
    if not columns.index:
        raise DataError("there are no samples to evaluate; allowed: at least 1; check the split in the data card")
    return _result(columns, labelled, ratio_db(signal, noise))


def _output(outputs: Mapping[str, NDArray[np.generic]], who: str, n: int) -> NDArray[np.float64]:
    name, value = next(iter(outputs.items()))
    flat = value.reshape(len(value), -1)[:n].astype(np.float64)  # a fixed batch is filled up with repeats
    if not np.isfinite(flat).all():
        raise ModelError(f"{who} gives NaN or infinity in output {name!r}; allowed: finite values; check the model")
    return flat


def _check_labels(labels: NDArray[np.int64], index: NDArray[np.int64], classes: int) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"sample {index[at]} has label {labels[at]}; the model has {classes} outputs, allowed: 0 to {classes - 1}; "
            "correct the labels or `classes`"
        )


def _result(columns: _Columns, labelled: bool, output_sqnr_db: float) -> PairedResult:
    theirs, ours = np.array(columns.baseline), np.array(columns.candidate)
    # Equal outputs have no noise; a finite ceiling keeps the report valid JSON.
    metrics = {
        "agreement": float(np.mean(theirs == ours)),
        "output_sqnr_db": min(max(output_sqnr_db, -300.0), 300.0) if not math.isnan(output_sqnr_db) else -300.0,
    }
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


def golden_samples(predict: Predict, fed: Tensors) -> bytes:
    """Return an `.npz` of `fed` as `input:<name>` and the outputs as `output:<name>`.

    A device runs the inputs through the installed model and compares. The same arrays give the same bytes.
    """
    arrays = {f"input:{k}": v for k, v in sorted(fed.items())}
    arrays |= {f"output:{k}": v for k, v in sorted(predict(fed).items())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
