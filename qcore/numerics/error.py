"""How far two arrays are apart: the measures that reports and tests share."""

import numpy as np

from qcore.numerics.affine import Float


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
