"""Low-rank factors of a layer's weights: a short chain of small layers in the place of a large one.

Weights are (outputs, inputs, kernel height, kernel width); a matrix has a kernel of 1 x 1 and a convolution in one
dimension one of height 1. What counts is the error of the layer's outputs, so every decomposition may weigh errors
with the covariance of what the layer reads: with `gram = E[x x^T]`, the mean squared error of the outputs for weights
`v` in the place of `w` is `tr((w - v) gram (w - v)^T)`.

Sources: Zhang et al. 2015 (arXiv 1505.06798) for `svd` on responses; Jaderberg et al. 2014 (arXiv 1405.3866) for
`spatial`; Kim et al. 2015 (arXiv 1511.06530) for `tucker2`; Lebedev et al. 2014 (arXiv 1412.6553) for `cp`.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Kind = Literal["svd", "spatial", "tucker2", "cp", "depthwise"]

EQUATIONS: dict[Kind, str] = {
    "svd": "rikl,or->oikl",
    "spatial": "rik,orl->oikl",
    "tucker2": "bi,abkl,oa->oikl",
    "cp": "ri,rk,rl,or->oikl",
    "depthwise": "ri,rkl,or->oikl",
}
"""How the weights follow from the factors, as for numpy.einsum; factors in the order in which they run.

`svd` is kernel, then 1 x 1; `spatial` height x 1, then 1 x width; `tucker2` 1 x 1, kernel, 1 x 1; `cp` 1 x 1, then per
channel height x 1 and 1 x width, then 1 x 1; `depthwise` 1 x 1, kernel per channel, 1 x 1.
"""

_DAMPING = 1e-4  # share of the mean power of an input that every direction has at least: few samples see no power there
_HOOI_SWEEPS = 10
ALS_SWEEPS = 60
_RIDGE = 1e-6  # keeps nearly parallel components of CP from growing against each other
_SEED = 0
_CONVERGED = 1e-20  # of the squared gradient: rounding is all that is left


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The factors of one layer, float64, in the order in which they run; their axes are those of `EQUATIONS[kind]`."""

    kind: Kind
    arrays: tuple[Array, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The channels between the factors, one number for each distinct rank: (inputs' side, outputs' side)."""
        first, last = self.arrays[0].shape[0], self.arrays[-1].shape[1]
        return (first, last) if self.kind == "tucker2" else (last,)

    @property
    def parameters(self) -> int:
        """The number of weights in all factors."""
        return sum(a.size for a in self.arrays)


def reconstruct(factors: Factors) -> Array:
    """Return the weights (outputs, inputs, height, width) that the chain of `factors` amounts to."""
    result: Array = np.einsum(EQUATIONS[factors.kind], *factors.arrays, optimize=True)
    return result


def full_ranks(kind: Kind, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks at which factors of weights of `shape` can hold any weights; of CP that is an upper bound."""
    outputs, inputs, height, width = shape
    match kind:
        case "svd":
            return (min(outputs, inputs * height * width),)
        case "spatial":
            return (min(inputs * height, outputs * width),)
        case "tucker2":
            return min(inputs, outputs * height * width), min(outputs, inputs * height * width)
        case "cp":
            return (height * width * min(inputs, outputs),)
        case "depthwise":
            return (min(inputs * outputs, height * width * min(inputs, outputs)),)
        case _:
            assert_never(kind)


def factorize(
    kind: Kind, w: Array, ranks: tuple[int, ...], gram: Array | None = None, *, sweeps: int = ALS_SWEEPS
) -> Factors:
    """Return factors of `w` of the given ranks.

    Args:
        kind: which chain.
        w: (outputs, inputs, height, width).
        ranks: (rank,), for `tucker2` (towards the inputs, towards the outputs); at least 1, cut to `full_ranks`.
        gram: (n, n) second moments or covariance of what an output sees, n = inputs * height * width in the order of
            `w`. None counts all inputs alike, which minimises the error of the weights. `svd` minimises the error of
            the outputs exactly; `spatial` that of every column of the kernel by itself; the others take the moments of
            the input channels, averaged over the taps. `refine` takes them from there.
        sweeps: of alternating least squares for `cp` and `depthwise`; a dozen tell how good a rank is.

    Raises:
        ValueError: the number of ranks is wrong or one is below 1.
    """
    most = full_ranks(kind, w.shape)
    if len(ranks) != len(most) or min(ranks) < 1:
        raise ValueError(f"ranks of {kind} are {ranks}; allowed: {len(most)} numbers from 1 on")
    w = np.asarray(w, np.float64)
    kept = tuple(min(r, m) for r, m in zip(ranks, most, strict=True))
    match kind:
        case "svd":
            return Factors(kind=kind, arrays=_svd(w, kept[0], gram))
        case "spatial":
            return Factors(kind=kind, arrays=_spatial(w, kept[0], gram))
        case "tucker2":
            return Factors(kind=kind, arrays=_tucker2(w, (kept[0], kept[1]), gram))
        case "cp" | "depthwise":
            return Factors(kind=kind, arrays=_cp(kind, w, kept[0], (gram, sweeps)))
        case _:
            assert_never(kind)


def low_rank(m: Array, rank: int, gram: Array | None = None) -> tuple[Array, Array]:
    """Return `a` (inputs, rank) and `b` (rank, outputs), orthonormal rows, with least `tr((m - ab)^T gram (m - ab))`.

    The best approximation projects the outputs onto the leading right singular vectors of `gram^(1/2) m`. Without
    `gram` the squared error is the sum of the squares of the singular values that are left out (Eckart and Young).

    Args:
        m: (inputs, outputs); outputs are `x m`.
        rank: 1 to min(inputs, outputs).
        gram: (inputs, inputs) second moments of x, positive semidefinite; None for the identity.
    """
    weighted = m if gram is None else _root(gram) @ m
    b = np.linalg.svd(weighted, full_matrices=False)[2][:rank]
    return m @ b.T, b


def output_share(w: Array, v: Array, gram: Array | None = None) -> float:
    """Return the squared error of the outputs for weights `v` instead of `w`, as a share of their power; 0 is exact.

    Args:
        w: (outputs, inputs, height, width).
        v: the same shape.
        gram: as in `factorize`.
    """
    flat, left = w.reshape(len(w), -1), (w - v).reshape(len(w), -1)
    power, error = (float(np.vdot(x if gram is None else x @ gram, x)) for x in (flat, left))
    return max(error, 0.0) / power if power > 0 else 0.0


def channel_tails(w: Array, gram: Array | None = None) -> tuple[Array, Array]:
    """Return the power that is lost with 0, 1 ... components of the input channels, and of the output channels.

    Args:
        w: (outputs, inputs, height, width).
        gram: as in `factorize`; its input channels, averaged over the taps.
    """
    white = w if gram is None else np.einsum("ji,oikl->ojkl", _root(_channel_gram(gram, w.shape)), w, optimize=True)
    modes = (white.transpose(1, 0, 2, 3).reshape(w.shape[1], -1), white.reshape(len(w), -1))
    powers = [np.linalg.svd(m, compute_uv=False) ** 2 for m in modes]
    into, out = (np.append(np.cumsum(p[::-1])[::-1], 0.0) for p in powers)
    return into, out


def refine(factors: Factors, cross: Array, gram: Array, sweeps: int = 2, iterations: int = 10) -> Factors:
    """Return `factors` after some alternating least squares to the outputs, which never make their error larger.

    The weights are linear in every single factor, so its best values solve linear equations; a few steps of conjugate
    gradients go towards them without building their matrix. The kernels of single channels (`cp`, `depthwise`) hold
    few numbers and stay as they are.

    Args:
        factors: where to start.
        cross: (outputs, n) moments of the wanted outputs y with what the layer reads, `E[y x^T]`; `w gram` where the
            layer reads what it always did.
        gram: (n, n) moments of x.
        sweeps: over all factors, last one first.
        iterations: steps for each factor.
    """
    arrays = list(factors.arrays)
    wanted = cross.reshape(len(cross), -1)
    for _ in range(sweeps):
        for k in sorted({0, len(arrays) - 1, *([1] if factors.kind == "tucker2" else [])}, reverse=True):
            arrays[k] = _least_squares(factors.kind, arrays, k, (wanted, gram), iterations)
    return balanced(Factors(kind=factors.kind, arrays=tuple(arrays)))


def balanced(factors: Factors) -> Factors:
    """Return the same weights with factors whose components have equal norms, so that none over- or underflows.

    Only what scales freely is moved: a component of `cp` and `depthwise`, a channel between two factors elsewhere.
    """
    arrays, last = [a.copy() for a in factors.arrays], len(factors.arrays) - 1
    groups: list[tuple[int, ...]] = [tuple(range(last + 1))]
    if factors.kind not in ("cp", "depthwise"):
        groups = [(k, k + 1) for k in range(last)]
    for group in groups:
        axes = {k: 1 if k == group[-1] else 0 for k in group}
        norms = {k: np.sqrt(np.sum(arrays[k] ** 2, axis=_others(arrays[k], axes[k]))) for k in group}
        mean = np.prod(list(norms.values()), axis=0) ** (1 / len(group))
        for k, norm in norms.items():
            shape = [1] * arrays[k].ndim
            shape[axes[k]] = -1
            arrays[k] *= np.where(mean > 0, mean / np.where(norm > 0, norm, 1.0), 1.0).reshape(shape)
    return Factors(kind=factors.kind, arrays=tuple(arrays))


def _others(a: Array, axis: int) -> tuple[int, ...]:
    return tuple(k for k in range(a.ndim) if k != axis)


def _svd(w: Array, rank: int, gram: Array | None) -> tuple[Array, ...]:
    outputs = len(w)
    a, b = low_rank(w.reshape(outputs, -1).T, rank, gram)
    return balanced(Factors(kind="svd", arrays=(a.T.reshape(rank, *w.shape[1:]), b.T))).arrays


def _spatial(w: Array, rank: int, gram: Array | None) -> tuple[Array, ...]:
    outputs, inputs, height, width = w.shape
    column = None
    if gram is not None:
        taps = gram.reshape(inputs * height, width, inputs * height, width)
        column = np.mean([taps[:, k, :, k] for k in range(width)], axis=0)
    a, b = low_rank(w.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width), rank, column)
    first, last = a.T.reshape(rank, inputs, height), b.reshape(rank, outputs, width).transpose(1, 0, 2)
    return balanced(Factors(kind="spatial", arrays=(first, last))).arrays


def _tucker2(w: Array, ranks: tuple[int, int], gram: Array | None) -> tuple[Array, ...]:
    """Higher-order orthogonal iteration on the channel modes of the weights, inputs as white as channels can be."""
    root = _root(_channel_gram(gram, w.shape)) if gram is not None else np.eye(w.shape[1])
    white = np.einsum("ji,oikl->ojkl", root, w, optimize=True)
    out = _leading(white.reshape(len(w), -1), ranks[1])
    into = np.empty((0, 0))
    for _ in range(_HOOI_SWEEPS):
        small = np.einsum("oa,oikl->aikl", out, white, optimize=True)
        into = _leading(small.transpose(1, 0, 2, 3).reshape(w.shape[1], -1), ranks[0])
        small = np.einsum("ib,oikl->obkl", into, white, optimize=True)
        out = _leading(small.reshape(len(w), -1), ranks[1])
    core = np.einsum("oa,ib,oikl->abkl", out, into, white, optimize=True)
    reduce: Array = np.asarray(np.linalg.solve(root, into).T, np.float64)
    return balanced(Factors(kind="tucker2", arrays=(reduce, core, out))).arrays


def _cp(kind: Literal["cp", "depthwise"], w: Array, rank: int, how: tuple[Array | None, int]) -> tuple[Array, ...]:
    """Alternating least squares, each factor by its normal equations; starts from the leading singular vectors."""
    gram, sweeps = how
    root = _root(_channel_gram(gram, w.shape)) if gram is not None else np.eye(w.shape[1])
    white = np.einsum("ji,oikl->ojkl", root, w, optimize=True)
    target = (
        white.transpose(1, 2, 3, 0) if kind == "cp" else white.transpose(1, 2, 3, 0).reshape(w.shape[1], -1, len(w))
    )
    rng = np.random.default_rng(_SEED)
    parts: list[Array] = []
    for mode in range(target.ndim):
        flat = np.moveaxis(target, mode, 0).reshape(target.shape[mode], -1)
        leading = _leading(flat, min(rank, *flat.shape))
        more = rng.standard_normal((len(flat), rank - leading.shape[1])) / np.sqrt(len(flat))
        parts.append(np.concatenate([leading, more], axis=1))
    for _ in range(sweeps):
        for mode in reversed(range(target.ndim)):
            parts[mode] = _als_step(target, parts, mode)
        _normalise(parts)
    reduce: Array = np.asarray(np.linalg.solve(root, parts[0]).T, np.float64)
    middle: list[Array] = [p.T for p in parts[1:-1]]
    if kind == "depthwise":
        middle = [middle[0].reshape(rank, w.shape[2], w.shape[3])]
    return balanced(Factors(kind=kind, arrays=(reduce, *middle, parts[-1]))).arrays


def _als_step(target: Array, parts: list[Array], mode: int) -> Array:
    """Return the best part `mode` (size, rank) given the others."""
    others = sorted((k for k in range(len(parts)) if k != mode), key=lambda k: -len(parts[k]))
    product = np.ones((parts[0].shape[1],) * 2)
    for k in others:
        product *= parts[k].T @ parts[k]
    # The largest mode goes first, as one matrix product; what is left is small.
    axes, right = list(range(target.ndim)), np.tensordot(target, parts[others[0]], axes=(others[0], 0))
    axes.remove(others[0])
    for k in others[1:]:
        at = axes.index(k)
        shape = [1] * right.ndim
        shape[at], shape[-1] = parts[k].shape
        right = np.sum(right * parts[k].reshape(shape), axis=at)
        axes.remove(k)
    ridge = _RIDGE * (np.trace(product) / len(product) or 1.0)
    return np.asarray(np.linalg.solve(product + ridge * np.eye(len(product)), right.T).T, np.float64)


def _normalise(parts: list[Array]) -> None:
    """Give every component the same norm in all parts."""
    norms = [np.sqrt(np.sum(p**2, axis=0)) for p in parts]
    mean = np.prod(norms, axis=0) ** (1 / len(parts))
    for k, norm in enumerate(norms):
        parts[k] = parts[k] * np.where(norm > 0, mean / np.where(norm > 0, norm, 1.0), 0.0)


def _least_squares(kind: Kind, arrays: list[Array], k: int, moments: tuple[Array, Array], iterations: int) -> Array:
    """Return factor `k` after `iterations` of conjugate gradients on the error of the outputs."""
    wanted, gram = moments
    terms = EQUATIONS[kind].split("->")[0].split(",")
    rest = [(t, a) for j, (t, a) in enumerate(zip(terms, arrays, strict=True)) if j != k]
    if k in (0, len(arrays) - 1):  # the other factors as one: every step is then a single matrix product
        letters = "".join(dict.fromkeys(c for t, _ in rest for c in t if c in "oikl" or c in terms[k]))
        joined = np.einsum(",".join(t for t, _ in rest) + "->" + letters, *(a for _, a in rest), optimize=True)
        rest = [(letters, joined)]
    others = [a for _, a in rest]
    forth = ",".join([terms[k], *(t for t, _ in rest)]) + "->oikl"
    back = ",".join(["oikl", *(t for t, _ in rest)]) + f"->{terms[k]}"
    shape = np.einsum(forth, arrays[k], *others, optimize=True).shape

    def gradient(x: Array) -> Array:
        flat = np.einsum(forth, x, *others, optimize=True).reshape(shape[0], -1) @ gram
        result: Array = np.einsum(back, flat.reshape(shape), *others, optimize=True)
        return result

    x = arrays[k]
    left = np.einsum(back, wanted.reshape(shape), *others, optimize=True) - gradient(x)
    direction, size = left, float(np.vdot(left, left))
    start = size
    for _ in range(iterations):
        if size <= _CONVERGED * start:
            break
        moved = gradient(direction)
        curvature = float(np.vdot(direction, moved))
        if curvature <= 0.0:
            break
        x = x + size / curvature * direction
        left = left - size / curvature * moved
        size, before = float(np.vdot(left, left)), size
        direction = left + size / before * direction
    return x


def _channel_gram(gram: Array, shape: tuple[int, ...]) -> Array:
    """Return the moments of the input channels, averaged over the taps."""
    inputs, taps = shape[1], shape[2] * shape[3]
    by_tap = gram.reshape(inputs, taps, inputs, taps)
    return np.asarray(np.mean([by_tap[:, k, :, k] for k in range(taps)], axis=0))


def _root(gram: Array) -> Array:
    """Return an invertible `s` with `s^T s` = `gram`, damped."""
    values, vectors = np.linalg.eigh(gram + _DAMPING * (np.trace(gram) / len(gram) or 1.0) * np.eye(len(gram)))
    return np.asarray(np.sqrt(np.maximum(values, values[-1] * 1e-12))[:, None] * vectors.T)


def _leading(flat: Array, rank: int) -> Array:
    """Return the leading left singular vectors of `flat`, (rows, rank)."""
    return np.asarray(np.linalg.svd(flat, full_matrices=False)[0][:, :rank])
