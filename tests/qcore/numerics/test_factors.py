"""Chains of factors: exact at full rank, the best of their rank where theory says which, and never worse for more."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.factors import (
    EQUATIONS,
    Factors,
    balanced,
    channel_tails,
    factorize,
    full_ranks,
    low_rank,
    output_share,
    reconstruct,
    refine,
)

EXACT = ("svd", "spatial", "tucker2")
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


def weights(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def gram_of(w, seed=1, rows=400, power=2.0):
    """Moments of inputs that move together, as behind every layer of a net."""
    rng, n = np.random.default_rng(seed), w[0].size
    mix = rng.standard_normal((n, n)) * np.exp(-power * np.arange(n) / n)
    x = rng.standard_normal((rows, n)) @ mix.T
    return x.T @ x / rows


def share(w, factors, gram=None):
    return output_share(w, reconstruct(factors), gram)


@given(SHAPES, st.sampled_from(EXACT), st.booleans(), st.integers(0, 9))
@settings(deadline=None)
def test_full_rank_is_exact(shape, kind, weighted, seed):
    w = weights(shape, seed)
    gram = gram_of(w) if weighted else None
    factors = factorize(kind, w, full_ranks(kind, shape), gram)
    np.testing.assert_allclose(reconstruct(factors), w, atol=1e-7)
    assert factors.parameters == sum(a.size for a in factors.arrays)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 9))
def test_the_error_of_svd_is_the_tail_of_the_singular_values(rows, columns, rank, seed):
    m = weights((rows, columns), seed)
    rank = min(rank, rows, columns)
    a, b = low_rank(m, rank)
    tail = np.linalg.svd(m, compute_uv=False)[rank:]
    assert np.sum((m - a @ b) ** 2) == pytest.approx(np.sum(tail**2), abs=1e-9)
    np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-9)


def test_the_error_of_spatial_svd_is_the_tail_too():
    w = weights((6, 5, 3, 3))
    values = np.linalg.svd(w.transpose(1, 2, 0, 3).reshape(15, 18), compute_uv=False)
    for rank in (1, 4, 9):
        error = np.sum((w - reconstruct(factorize("spatial", w, (rank,)))) ** 2)
        assert error == pytest.approx(np.sum(values[rank:] ** 2))


@given(st.integers(1, 5), st.integers(0, 5))
@settings(deadline=None)
def test_whitening_gives_the_least_error_of_the_outputs(rank, seed):
    """No other factors of that rank do better: neither those of the weights, nor what refinement finds from them."""
    w = weights((6, 4, 2, 2), seed)
    gram = gram_of(w, seed + 1)
    best = share(w, factorize("svd", w, (rank,), gram), gram)
    assert best <= share(w, factorize("svd", w, (rank,)), gram) + 1e-12
    plain = factorize("svd", w, (rank,))
    moved = refine(plain, w.reshape(6, -1) @ gram, gram, sweeps=4)
    assert best <= share(w, moved, gram) * (1 + 1e-3) + 1e-4  # damping costs that much
    assert share(w, moved, gram) <= share(w, plain, gram) + 1e-12


def test_moments_of_the_inputs_are_worth_having():
    w = weights((16, 12, 3, 3))
    gram = gram_of(w)
    for kind, ranks in (("svd", (4,)), ("spatial", (8,)), ("tucker2", (6, 6)), ("depthwise", (12,)), ("cp", (12,))):
        blind, seeing = (factorize(kind, w, ranks, g) for g in (None, gram))
        refined = refine(seeing, w.reshape(16, -1) @ gram, gram)
        assert share(w, refined, gram) < 0.9 * share(w, blind, gram), kind


@given(st.sampled_from(sorted(EQUATIONS)), st.integers(0, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_refinement_never_makes_the_outputs_worse(kind, seed, rank):
    w = weights((5, 4, 3, 2), seed)
    gram = gram_of(w, seed)
    start = factorize(kind, w, (rank, rank) if kind == "tucker2" else (rank,), gram, sweeps=5)
    refined = refine(start, w.reshape(5, -1) @ gram, gram)
    assert share(w, refined, gram) <= share(w, start, gram) + 1e-12
    assert [a.shape for a in refined.arrays] == [a.shape for a in start.arrays]


def test_refinement_towards_other_inputs_makes_up_for_what_was_lost_before():
    """A layer that reads x + e instead of x: the factors that were best for x are not best any more."""
    rng = np.random.default_rng(0)
    w = weights((8, 6, 1, 1))
    x = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    seen = x * [1, 1, 0.5, 0.2, 1, 0]
    y = x @ w[:, :, 0, 0].T
    gram, cross = seen.T @ seen / 500, y.T @ seen / 500
    start = factorize("svd", w, (4,), x.T @ x / 500)

    def error(factors):
        return np.mean((y - seen @ reconstruct(factors)[:, :, 0, 0].T) ** 2)

    assert error(refine(start, cross, gram)) < 0.7 * error(start)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("weighted", [False, True])
def test_more_rank_is_never_worse(kind, weighted):
    w = weights((8, 7, 3, 3))
    gram = gram_of(w) if weighted else None
    tops = full_ranks(kind, w.shape)
    errors = [share(w, factorize(kind, w, tuple(min(r, m) for m in tops), gram), gram) for r in range(1, max(tops) + 1)]
    # `spatial` weighs each column of the kernel by itself, so its error of all of them may rise a little
    slack = 0.02 if weighted and kind != "svd" else 1e-4
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


def test_hooi_is_at_most_the_sum_of_the_tails_and_better_than_one_projection():
    w = weights((8, 7, 3, 3))
    tails = channel_tails(w)
    assert tails[0][0] == pytest.approx(np.sum(w**2))
    assert tails[1][-1] == 0
    for first, last in itertools.product((2, 4, 6), (3, 5, 8)):
        error = np.sum((w - reconstruct(factorize("tucker2", w, (first, last)))) ** 2)
        assert error <= tails[0][first] + tails[1][last] + 1e-9
        assert error >= max(tails[0][first], tails[1][last]) - 1e-9


@pytest.mark.parametrize("kind", ["cp", "depthwise"])
def test_cp_finds_a_tensor_of_its_rank(kind):
    rng = np.random.default_rng(3)
    shapes = {"cp": [(3, 6), (3, 3), (3, 3), (8, 3)], "depthwise": [(3, 6), (3, 3, 3), (8, 3)]}[kind]
    true = Factors(kind=kind, arrays=tuple(rng.standard_normal(s) for s in shapes))
    w = reconstruct(true)
    found = factorize(kind, w, (3,), sweeps=400)
    assert share(w, found) < 1e-5
    assert max(np.abs(a).max() for a in found.arrays) < 20  # components do not grow against each other


@pytest.mark.parametrize("kind", sorted(EQUATIONS))
def test_components_are_equally_large_and_equal_runs_give_equal_bits(kind):
    w = weights((8, 6, 3, 3)) * np.exp(np.arange(8))[:, None, None, None]
    ranks = (4, 3) if kind == "tucker2" else (4,)
    one, two = (factorize(kind, w, ranks, gram_of(w)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.arrays, two.arrays, strict=True))
    assert one.ranks == ranks
    again = balanced(one)
    np.testing.assert_allclose(reconstruct(again), reconstruct(one), rtol=1e-9, atol=1e-9)
    if kind in ("cp", "depthwise"):
        norms = [np.linalg.norm(a.reshape(4, -1), axis=1) for a in one.arrays[:-1]]
        norms.append(np.linalg.norm(one.arrays[-1], axis=0))
        np.testing.assert_allclose(norms, np.broadcast_to(norms[0], (len(norms), 4)))


def test_impossible_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks of tucker2 are \\(3,\\); allowed: 2 numbers from 1 on"):
        factorize("tucker2", weights((4, 4, 3, 3)), (3,))
    with pytest.raises(ValueError, match="ranks of svd are \\(0,\\); allowed: 1 numbers from 1 on"):
        factorize("svd", weights((4, 4, 3, 3)), (0,))
    assert factorize("svd", weights((4, 4, 3, 3)), (99,)).ranks == (4,)


def test_weights_of_zeros_and_constant_inputs_are_no_trouble():
    w = np.zeros((4, 3, 3, 3))
    for kind in EQUATIONS:
        factors = factorize(kind, w, (2, 2) if kind == "tucker2" else (2,), np.zeros((27, 27)))
        assert np.isfinite(reconstruct(refine(factors, np.zeros((4, 27)), np.zeros((27, 27))))).all(), kind
        assert share(w, factors) == 0
