"""How many channels go: the path, the budget on it, and which ones stay."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcore.numerics.removal import (
    CostTerms,
    Curve,
    channels_kept,
    first_that_fits,
    given_back,
    latency_left,
    removal_path,
    trades_of,
)


def terms(groups: int) -> CostTerms:
    """A chain: layer k reads group k - 1 and makes group k; the first reads and the last makes what stays."""
    whole, part = np.ones((groups + 1, 2)), np.zeros((groups + 1, 2, groups))
    for k in range(groups):
        whole[k, 0] = whole[k + 1, 1] = 0
        part[k, 0, k] = part[k + 1, 1, k] = 1
    return CostTerms(amount=np.full(groups + 1, 100.0), whole=whole, part=part)


def of(cost: CostTerms, size: int):
    return lambda counts: cost.at(np.array(counts) / size)


def test_the_cost_of_a_chain_by_hand():
    cost = terms(2)
    assert cost.at(np.ones(2)) == 300
    assert cost.at(np.array([0.5, 0.25])) == 50 + 12.5 + 25


def test_cheap_losses_come_first():
    curves = [
        Curve(counts=(8, 4, 2), errors=(0.0, 1.0, 2.0)),
        Curve(counts=(8, 4, 2), errors=(0.0, 0.1, 5.0)),
    ]
    path = removal_path(curves, of(terms(2), 8))
    assert path[0] == (8, 8)
    assert path[1] == (8, 4)
    assert path[-1] == (2, 2)


def test_a_curve_that_falls_is_taken_as_flat():
    curve = Curve(counts=(8, 4, 2), errors=(0.0, 0.5, 0.2)).rising()
    assert curve.errors == (0.0, 0.5, 0.5)
    assert removal_path([Curve(counts=(8, 4, 2), errors=(0.0, 0.5, 0.2))], of(terms(1), 8)) == [(8,), (2,)]


def test_what_groups_save_in_time_adds_up():
    curves = [
        Curve(counts=(8, 4), errors=(0.0, 1.0), latencies=(1.0, 0.7)),
        Curve(counts=(8, 4), errors=(0.0, 1.0), latencies=(1.0, 1.02)),  # slower is noise
    ]
    assert [latency_left(curves, c) for c in ((8, 8), (4, 8), (8, 4), (4, 4))] == pytest.approx([1, 0.7, 1, 0.7])


@given(st.integers(0, 500), st.floats(0.2, 0.95))
def test_the_budget_holds_and_what_is_given_back_still_fits(seed, share):
    rng = np.random.default_rng(seed)
    curves = [
        Curve(counts=(16, 12, 8, 4, 1), errors=(0.0, *np.cumsum(rng.exponential(1, 4)).tolist())) for _ in range(4)
    ]
    cost = terms(4)
    full = cost.at(np.ones(4))
    path = removal_path(curves, of(cost, 16))
    costs = [cost.at(np.array(c) / 16) for c in path]
    assert costs == sorted(costs, reverse=True)
    assert all(sum(a != b for a, b in zip(*pair, strict=True)) == 1 for pair in pairwise(path))
    at = first_that_fits(path, lambda c: cost.at(np.array(c) / 16) <= share * full)
    if at is None:
        assert costs[-1] > share * full
        return
    assert costs[at] <= share * full
    assert at == 0 or costs[at - 1] > share * full
    back = given_back(curves, path[at], lambda c: cost.at(np.array(c) / 16) <= share * full)
    more = [(*back[:g], n, *back[g + 1 :]) for g in range(4) for n in curves[g].counts if n > back[g]]
    assert all(cost.at(np.array(c) / 16) > share * full for c in more)
    assert cost.at(np.array(back) / 16) <= share * full
    assert all(b >= p for b, p in zip(back, path[at], strict=True))


@given(st.integers(0, 200))
def test_trades_cost_no_more_and_give_something_back(seed):
    rng = np.random.default_rng(seed)
    curves = [Curve(counts=(8, 6, 4, 2), errors=(0.0, *np.cumsum(rng.random(3)).tolist())) for _ in range(3)]
    counts = tuple(int(c) for c in rng.choice((8, 6, 4, 2), 3))
    cost = of(terms(3), 8)
    limit = cost(counts)
    trades = trades_of(curves, counts, lambda c: cost(c) / limit)
    assert counts not in trades
    for trade in trades:
        assert cost(trade) <= limit
        assert sum(a < b for a, b in zip(trade, counts, strict=True)) == 1
        assert sum(a > b for a, b in zip(trade, counts, strict=True)) >= 1
    if counts == (4, 4, 4):
        assert trades


@given(st.integers(0, 500), st.integers(1, 12))
def test_the_best_free_channels_stay_with_all_that_must(seed, count):
    rng = np.random.default_rng(seed)
    score, free = rng.random(12), rng.random(12) < 0.7
    count = max(count, int((~free).sum()))
    keep = channels_kept(score, free, count)
    assert keep.sum() == count
    assert keep[~free].all()
    gone, stay = score[free & ~keep], score[free & keep]
    assert not gone.size or not stay.size or gone.max() <= stay.min()


def test_of_equals_the_first_stay():
    assert channels_kept(np.ones(4), np.ones(4, bool), 2).tolist() == [True, True, False, False]


def test_nothing_fits():
    assert first_that_fits([(8,), (4,)], lambda counts: False) is None
    assert first_that_fits([(8,), (4,)], lambda counts: True) == 0
    with pytest.raises(IndexError):
        first_that_fits([], lambda counts: True)
