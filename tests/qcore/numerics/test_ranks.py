"""Costs of chains, and the choice of ranks within a budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcore.numerics.factors import channel_tails, factorize, full_ranks
from qcore.numerics.ranks import (
    LayerRanks,
    LayerShape,
    RankScore,
    chain_macs,
    chain_parameters,
    choose,
    cost,
    kinds_for,
    layer_macs,
    monotone,
    ranks_within,
)

SHAPE = LayerShape(weight=(32, 16, 3, 3), into=(9, 8), out=(5, 4))
KINDS = ("svd", "spatial", "tucker2", "cp", "depthwise")


def scored(*pairs, macs=100):
    """A layer with candidates of (MACs, score)."""
    scores = tuple(
        RankScore(kind="svd", ranks=(m,), macs=m, parameters=m // 2, share=0.1, score=s) for m, s in sorted(pairs)
    )
    return LayerRanks(node="n", op_type="Conv", macs=macs, parameters=macs // 2, scores=scores)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_as_they_are(kind):
    w = np.random.default_rng(0).standard_normal(SHAPE.weight)
    ranks = (5, 7) if kind == "tucker2" else (5,)
    assert chain_parameters(kind, ranks, SHAPE) == factorize(kind, w, ranks, sweeps=1).parameters


@pytest.mark.parametrize("kind", KINDS)
@given(st.floats(0.02, 1.0), st.sampled_from([1, 4, 8]))
def test_ranks_are_the_largest_that_fit(kind, part, multiple):
    w = np.random.default_rng(0).standard_normal(SHAPE.weight)
    ranks = ranks_within(kind, SHAPE, part * SHAPE.macs, multiple, channel_tails(w))
    least = (multiple, multiple) if kind == "tucker2" else (multiple,)
    if ranks is None:
        assert chain_macs(kind, least, SHAPE) > part * SHAPE.macs
        return
    assert chain_macs(kind, ranks, SHAPE) <= part * SHAPE.macs
    assert all(r % multiple == 0 for r in ranks)
    assert all(r <= m for r, m in zip(ranks, full_ranks(kind, SHAPE.weight), strict=True))
    if kind != "tucker2" and ranks[0] + multiple <= full_ranks(kind, SHAPE.weight)[0]:
        assert chain_macs(kind, (ranks[0] + multiple,), SHAPE) > part * SHAPE.macs


def test_kernels_pad_channels():
    assert layer_macs(SHAPE, 16) == layer_macs(SHAPE) == SHAPE.macs == 32 * 16 * 9 * 20
    narrow = LayerShape(weight=(10, 16, 1, 1), into=(1, 1), out=(1, 1))
    assert layer_macs(narrow, 16) == 256
    assert chain_macs("svd", (4,), narrow, 16) == 16 * 16 + 16 * 16
    assert chain_macs("svd", (4,), narrow) == 4 * 16 + 4 * 10


def test_only_chains_that_differ_are_tried():
    assert kinds_for(SHAPE) == KINDS
    assert kinds_for(LayerShape(weight=(8, 8, 1, 1), into=(1, 1), out=(1, 1))) == ("svd",)
    assert kinds_for(LayerShape(weight=(8, 8, 1, 5), into=(1, 9), out=(1, 9))) == ("svd", "tucker2", "depthwise")


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1)), max_size=8))
def test_more_multiplications_never_score_worse(pairs):
    fitted = monotone(scored(*pairs).scores)
    assert [s.macs for s in fitted] == sorted(m for m, _ in pairs)
    assert all(b.score <= a.score + 1e-12 for a, b in itertools.pairwise(fitted))
    assert sum(s.score for s in fitted) == pytest.approx(sum(s for _, s in pairs))


LAYERS = st.lists(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1)), max_size=4), min_size=1, max_size=4)


@given(LAYERS, st.floats(0.05, 1.1), st.booleans())
def test_the_budget_holds_at_the_least_worst_score(pairs, kept, size):
    layers = [scored(*p) for p in pairs]
    layers = [LayerRanks(node=str(k), op_type="Conv", macs=100, parameters=50, scores=monotone(la.scores))
              for k, la in enumerate(layers)]  # fmt: skip
    budget = kept * sum(cost(la, size=size) for la in layers)
    chosen = choose(layers, budget, size=size)
    every = itertools.product(*[[(cost(la, size=size), 0.0), *(((s.parameters if size else s.macs), s.score)
                                 for s in la.scores)] for la in layers])  # fmt: skip
    possible = [max(score for _, score in combination) for combination in every
                if sum(c for c, _ in combination) <= budget]  # fmt: skip
    if chosen is None:
        assert not possible
        return
    assert sum(cost(la, size=size) for la in chosen) <= budget
    worst = max((la.choice.score for la in chosen if la.choice), default=0.0)
    assert worst == pytest.approx(min(possible))


def test_what_the_budget_leaves_goes_to_the_worst_layer():
    layers = (scored((20, 0.9), (60, 0.2)), scored((20, 0.9), (60, 0.1)))
    a, b = choose(layers, 130)
    assert (a.choice.macs, b.choice.macs) == (60, 60)
    a, b = choose(layers, 80)
    assert (a.choice.macs, b.choice.macs) == (60, 20)
    assert choose(layers, 39) is None
    assert [la.choice for la in choose(layers, 200)] == [None, None]
    assert math.isnan(RankScore(kind="svd", ranks=(1,), macs=1, parameters=1, share=0.0).score)
