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
_AT_ONCE = 1 << 22  # weights
_TINY = 1e-9
MORE_DAMPING = (1e-3, 1e-1, 10.0)


def round_second_order(weights: Matrix, metric: Matrix, scale: Matrix, levels: tuple[int, int]) -> Matrix:
    """Return integers Q such that `scale * Q` stands for `weights`.

    Args:
        weights: (groups, outputs, inputs), what is wanted.
        metric: H, (groups, inputs, inputs), symmetric and positive semidefinite but for rounding.
        scale: (groups, outputs), positive.
        levels: lowest and highest integer.
    """
    groups, outputs, k = weights.shape
    size = np.einsum("gii->g", np.abs(metric)) / k
    metric = metric + (_TINY * size + 1e-12)[:, None, None] * np.eye(k)  # an input that is always zero
    order = np.argsort(-np.diagonal(metric, axis1=1, axis2=2), axis=1, kind="stable")
    rows = np.arange(groups)[:, None]
    h = metric[rows[:, :, None], order[:, :, None], order[:, None, :]]
    factor = _inverse_factor(h)
    result = np.empty(weights.shape)
    step = max(1, _AT_ONCE // (groups * k))
    for start in range(0, outputs, step):  # outputs do not touch each other: scratch memory stays bounded
        part = slice(start, start + step)
        w = np.take_along_axis(weights[:, part], order[:, None, :], axis=2) / scale[:, part, None]
        q, plain = _descend(w, h, _propagate(w, factor, levels), levels), np.clip(np.rint(w), *levels)
        # What is passed on can end in a worse valley than nothing: rarely, with few inputs.
        q = np.where((_lost(w, plain, h) < _lost(w, q, h))[:, :, None], plain, q)
        np.put_along_axis(result[:, part], np.broadcast_to(order[:, None, :], q.shape), q, axis=2)
    return result


def _lost(w: Matrix, q: Matrix, h: Matrix) -> Matrix:
    """Return the objective of each output, (groups, outputs)."""
    d = w - q
    return np.asarray(((d @ h) * d).sum(axis=2))


def _propagate(w: Matrix, factor: Matrix, levels: tuple[int, int]) -> Matrix:
    """Round input by input and let the inputs that follow make up for the error."""
    k = w.shape[2]
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
