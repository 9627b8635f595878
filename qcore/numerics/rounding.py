"""Second-order rounding: integers for a layer's weights, chosen together so that its outputs stay.

Rounding each weight to the nearest level minimizes the error of the weights. What counts is the error of the outputs,
`tr (W - Q) H (W - Q)'` with H the second moment of the layer's inputs: the error of one weight can be made up for by
others whose inputs move with its own.

Source: Frantar et al. 2022 (arXiv 2210.17323, GPTQ) section 3; Nagel et al. 2020 (arXiv 2004.10568) eq. 13 for the
objective; the closing sweeps are coordinate descent on it.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
BLOCK = 64
SWEEPS = 4
MORE_DAMPING = (1e-3, 1e-1, 10.0)


def round_second_order(
    weights: Matrix, moments: Matrix, scale: Matrix, levels: tuple[int, int], damping: float
) -> Matrix:
    """Return integers Q such that `scale * Q` stands for `weights`.

    Args:
        weights: (groups, outputs, inputs), what is wanted.
        moments: (groups, inputs, inputs), second moments of the inputs of each group, symmetric.
        scale: (groups, outputs), positive.
        levels: lowest and highest integer.
        damping: share of the mean diagonal of `moments` that is added to it.
    """
    groups, _, k = weights.shape
    h = moments + np.eye(k) * (damping * np.maximum(np.trace(moments, axis1=1, axis2=2), 0) / k + 1e-12)[:, None, None]
    order = np.argsort(-np.diagonal(h, axis1=1, axis2=2), axis=1, kind="stable")
    rows = np.arange(groups)[:, None]
    h = h[rows[:, :, None], order[:, :, None], order[:, None, :]]
    w = np.take_along_axis(weights, order[:, None, :], axis=2) / scale[:, :, None]
    q = _descend(w, h, _propagate(w, h, levels), levels)
    result = np.empty_like(q)
    np.put_along_axis(result, np.broadcast_to(order[:, None, :], q.shape), q, axis=2)
    return result


def _propagate(w: Matrix, h: Matrix, levels: tuple[int, int]) -> Matrix:
    """Round input by input and let the inputs that follow make up for the error."""
    k = w.shape[2]
    factor = _inverse_factor(h)
    w, q = w.copy(), np.empty_like(w)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = np.empty((*w.shape[:2], end - start))
        for j in range(start, end):
            q[:, :, j] = np.clip(np.rint(w[:, :, j]), *levels)
            errors[:, :, j - start] = (w[:, :, j] - q[:, :, j]) / factor[:, None, j, j]
            w[:, :, j:end] -= errors[:, :, j - start, None] * factor[:, None, j, j:end]
        w[:, :, end:] -= errors @ factor[:, start:end, end:]
    return q


def _inverse_factor(h: Matrix) -> Matrix:
    """Return the upper Cholesky factor of the inverse of `h`, damped further where rounding left it indefinite."""
    k = h.shape[1]
    size = np.abs(np.diagonal(h, axis1=1, axis2=2)).mean(axis=1)[:, None, None] * np.eye(k)
    for extra in (0.0, *MORE_DAMPING):
        try:
            return np.swapaxes(np.linalg.cholesky(np.linalg.inv(h + extra * size)), 1, 2)
        except np.linalg.LinAlgError:
            continue
    return np.broadcast_to(np.eye(k), h.shape).copy()  # nothing is passed on: nearest rounding


def _descend(w: Matrix, h: Matrix, q: Matrix, levels: tuple[int, int]) -> Matrix:
    """Move single integers while that lowers the objective."""
    gradient = (q - w) @ h
    for _ in range(SWEEPS):
        changed = False
        for j in range(w.shape[2]):
            best = np.clip(np.rint(q[:, :, j] - gradient[:, :, j] / h[:, None, j, j]), *levels)
            step = best - q[:, :, j]
            if step.any():
                changed = True
                gradient += step[:, :, None] * h[:, None, j, :]
                q[:, :, j] = best
        if not changed:
            break
    return q
