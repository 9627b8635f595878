import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.affine import QScheme
from qcore.numerics.stats import (
    ONE,
    RangeRule,
    add_sample,
    average_weight,
    counted_part,
    merge_stats,
    range_from_stats,
    tensor_stats,
)

U8 = QScheme(dtype="uint8")

# All float32, subnormals and both ends included: exactness must not depend on friendly numbers.
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
PARTS = st.lists(hnp.arrays(np.float32, st.integers(1, 12), elements=VALUES), min_size=2, max_size=5)


def same(a, b):
    sums = [(s.weight, s.low_sum, s.high_sum) for s in (a, b)]
    scalars = [(s.count, s.low, s.high, s.bins, s.exponent, s.first) for s in (a, b)]
    return sums[0] == sums[1] and scalars[0] == scalars[1] and np.array_equal(a.histogram, b.histogram)


@given(PARTS, st.randoms())
def test_merging_in_any_order_and_grouping_equals_the_whole(parts, random):
    weights = [average_weight(k, len(parts), 0.9) for k in range(len(parts))]
    whole = None
    for part, weight in zip(parts, weights, strict=True):
        whole = add_sample(whole, part, bins=32, weight=weight)
    shards = [tensor_stats(p, bins=32, weight=w) for p, w in zip(parts, weights, strict=True)]
    while len(shards) > 1:
        a = shards.pop(random.randrange(len(shards)))
        b = shards.pop(random.randrange(len(shards)))
        shards.append(merge_stats(a, b))
    assert same(shards[0], whole)


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=VALUES), st.integers(2, 300))
def test_every_value_is_counted_in_a_bounded_number_of_bins(x, bins):
    stats = tensor_stats(x, bins=bins)
    assert stats.histogram.sum() == x.size
    assert stats.histogram.size <= bins + 1
    assert stats.histogram[0] > 0
    assert stats.histogram[-1] > 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 400))
def test_the_counted_part_is_about_as_large_as_asked_and_comes_from_everywhere(size, values):
    flat = np.arange(size, dtype=np.float32)
    part = counted_part(flat, values)
    assert len(set(part.tolist())) == part.size
    assert part.size <= 2 * max(values, 64) + 127
    runs = np.unique(part // 64) if part.size < size else np.arange(-(-size // 64))
    assert np.diff(runs).max(initial=1) <= 3 * max(1, size // max(values, 64)) + 2


def test_a_part_is_counted_but_the_range_is_of_all_values():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    x[12_345], x[54_321] = 40.0, -30.0
    whole, part = tensor_stats(x), tensor_stats(x, values=8192)
    assert (part.low, part.high) == (whole.low, whole.high) == (-30.0, 40.0)
    assert (part.exponent, part.first, len(part.histogram)) == (whole.exponent, whole.first, len(whole.histogram))
    assert part.count == part.histogram.sum() < 8192 + 128
    rule, scheme = RangeRule(kind="percentile", percentile=99.0), QScheme(dtype="int8")
    np.testing.assert_allclose(range_from_stats(part, rule, scheme), range_from_stats(whole, rule, scheme), atol=0.25)


def test_chunks_inside_one_tensor_do_not_matter():
    x = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    halves = merge_stats(tensor_stats(x[:70_000]), tensor_stats(x[70_000:]))
    whole = tensor_stats(x)
    assert (whole.exponent, whole.first) == (halves.exponent, halves.first)
    assert np.array_equal(whole.histogram, halves.histogram)


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=VALUES), st.floats(50.1, 100))
def test_percentile_ranges_lie_inside_the_observed_range(x, percentile):
    stats = tensor_stats(x)
    low, high = range_from_stats(stats, RangeRule(kind="percentile", percentile=percentile), U8)
    assert stats.low <= low <= high <= stats.high


def test_percentile_cuts_outliers_and_min_max_keeps_them():
    x = np.concatenate([np.random.default_rng(0).standard_normal(100_000), [1000.0, -500.0]]).astype(np.float32)
    stats = tensor_stats(x, bins=1 << 16)
    assert range_from_stats(stats, RangeRule(), U8) == (-500.0, 1000.0)
    low, high = range_from_stats(stats, RangeRule(kind="percentile", percentile=99.9), U8)
    assert -3.6 < low < -3.1  # the 0.05 % quantile of a normal is 3.29
    assert 3.1 < high < 3.6


def test_percentile_keeps_the_zeros_of_a_relu():
    x = np.maximum(np.random.default_rng(0).standard_normal(10_000), 0).astype(np.float32)
    low, high = range_from_stats(tensor_stats(x), RangeRule(kind="percentile", percentile=99), U8)
    assert low == 0.0
    assert high < x.max()


def test_a_hundred_per_cent_is_min_max():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    stats = tensor_stats(x)
    assert range_from_stats(stats, RangeRule(kind="percentile", percentile=100), U8) == (stats.low, stats.high)


@pytest.mark.parametrize(
    "bad", [np.array([], np.float32), np.array([1, np.nan], np.float32), np.array([np.inf], np.float32)]
)
def test_nothing_and_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="tensor"):
        tensor_stats(bad)


def test_different_resolutions_do_not_merge():
    x = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="64 and 32 bins"):
        merge_stats(tensor_stats(x, bins=64), tensor_stats(x, bins=32))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40), st.floats(0, 0.999))
def test_the_moving_average_is_the_recurrence_with_bias_correction(extremes, decay):
    low = high = total = 0.0
    stats = None
    for k, (a, b) in enumerate(extremes):
        low, high, total = (decay * old + new for old, new in ((low, min(a, b)), (high, max(a, b)), (total, 1.0)))
        stats = add_sample(stats, np.array([a, b], np.float32), weight=average_weight(k, len(extremes), decay))
    got = range_from_stats(stats, RangeRule(kind="moving-average"), U8)
    size = max(abs(v) for pair in extremes for v in pair)
    assert got == pytest.approx((low / total, high / total), rel=1e-9, abs=1e-9 * size)
    assert stats.low <= got[0] <= got[1] <= stats.high


def test_what_a_moving_average_forgets_and_what_not():
    assert average_weight(99, 100, 0.99) == ONE
    assert average_weight(0, 10**9, 0.99) == 0
    assert [average_weight(k, 3, 0.5) * 4 // ONE for k in range(3)] == [1, 2, 4]
    only_old = tensor_stats(np.ones(3, np.float32), weight=0)
    with pytest.raises(ValueError, match="weigh nothing"):
        range_from_stats(only_old, RangeRule(kind="moving-average"), U8)
