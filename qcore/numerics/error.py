"""How far two arrays are apart: the measures that reports and tests share."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qcore.numerics.affine import Float

SQNR_LIMIT = 300.0
"""What a report writes for equal arrays, in dB: JSON has no infinity, and float64 ends near there."""

_SUM_TOLERANCE = 1e-3  # float16 probabilities of 1000 classes add up to 1 within this
_SMALLEST_PROBABILITY = 1e-12  # below float32 softmax outputs that mean anything; keeps an 8-bit zero finite


def sqnr_db(reference: Float, approximation: Float) -> float:
    """Return the signal-to-quantization-noise ratio `10 log10(sum x^2 / sum (x - y)^2)` in dB.

    Infinite for equal arrays, minus infinity for a zero reference that is not reproduced. Shapes must be equal.
    """
    x = np.asarray(reference, np.float64)
    noise = float(np.sum((x - np.asarray(approximation, np.float64)) ** 2))
    signal = float(np.sum(x**2))
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """Return `10 log10(signal / noise)` for two powers that are not negative; see `sqnr_db` for the limits."""
    if noise == 0.0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0.0 else float("-inf")


def limited_db(signal: float, noise: float) -> float:
    """Return `ratio_db` cut to +-`SQNR_LIMIT`, for files that cannot hold an infinity; NaN counts as the lower end."""
    value = ratio_db(signal, noise) if np.isfinite(signal) and np.isfinite(noise) else -SQNR_LIMIT
    return min(max(value, -SQNR_LIMIT), SQNR_LIMIT)


def is_distribution(x: Float) -> bool:
    """Say whether every row of `x` (n, classes) already is a probability distribution, as behind a Softmax."""
    rows = np.asarray(x, np.float64)
    return bool(rows.size) and bool((rows >= 0).all() and (np.abs(rows.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())


def output_kl(reference_logits: Float, logits: Float) -> float:
    """Return the mean over samples of KL(softmax(reference) || softmax(logits)) in nats.

    Rows that already are distributions (judged by the reference, `is_distribution`) are taken as they are; a
    probability of the other side that was rounded to zero counts as 1e-12, so that the result stays finite.

    Args:
        reference_logits: (n, ...) float; everything behind the first dimension is one row of classes.
        logits: the same shape.

    Raises:
        ValueError: shapes differ, there is no sample, or a value is NaN or infinite.

    Source: Kullback and Leibler 1951; as a sensitivity score Cai et al. 2020 (arXiv 2001.00281).
    """
    p, q = _rows(reference_logits, logits)
    if is_distribution(p):
        p, q = (np.log(np.maximum(x, _SMALLEST_PROBABILITY)) for x in (p, q))
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    # The exact value is never negative; rounding may leave -1e-17.
    return max(float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))), 0.0)


def normalised_mse(reference: Float, approximation: Float) -> float:
    """Return `sum (x - y)^2 / sum x^2`, the inverse of the SQNR as a ratio; a zero reference gives 0 or infinity.

    Raises:
        ValueError: as `output_kl`.
    """
    x, y = _rows(reference, approximation)
    noise, signal = float(np.sum((x - y) ** 2)), float(np.sum(x**2))
    if noise == 0.0:
        return 0.0
    return noise / signal if signal > 0.0 else float("inf")


def output_error(
    reference: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, NDArray[Any]],
    task: Literal["classification", "none"],
) -> float:
    """Return how far the outputs of a model are from the reference: 0 where they are equal, larger is worse.

    For classifiers `output_kl` of the first output, if that has two classes or more; else the largest
    `normalised_mse` of all outputs.

    Args:
        reference: outputs of the float model by name, batch first.
        outputs: the same names and shapes.
        task: that of the data card.

    Raises:
        ValueError: names or shapes differ, or a value is NaN or infinite.
    """
    if reference.keys() != outputs.keys() or not reference:
        raise ValueError(f"outputs are {sorted(outputs)}, the reference has {sorted(reference)}; allowed: equal names")
    first = next(iter(reference))
    if task == "classification" and reference[first].ndim > 1 and reference[first].size > len(reference[first]):
        return output_kl(reference[first], outputs[first])
    return max(normalised_mse(x, outputs[name]) for name, x in reference.items())


def _rows(reference: Float, approximation: Float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as (n, values) in float64."""
    x, y = np.asarray(reference, np.float64), np.asarray(approximation, np.float64)
    if x.shape != y.shape or x.size == 0:
        raise ValueError(f"outputs have shape {y.shape}, the reference {x.shape}; allowed: equal and not empty")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("outputs hold NaN or infinity; allowed: finite values")
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
    return result
