"""Channel statistics: what is merged equals what is measured at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.channels import channel_stats, merge_channels, stream_channels


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_streamed_statistics_are_those_of_all_data(seed, sizes):
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((n, 3, 2, 2)) * 7 + 5).astype(np.float32) for n in sizes]
    stats = stream_channels({"x": p} for p in parts)["x"]
    whole = np.concatenate(parts).transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64)
    assert stats.count == whole.shape[1]
    np.testing.assert_array_equal(stats.low, whole.min(axis=1))
    np.testing.assert_array_equal(stats.high, whole.max(axis=1))
    np.testing.assert_allclose(stats.mean, whole.mean(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.variance, whole.var(axis=1), rtol=1e-5, atol=1e-9)


def test_any_axis_may_hold_the_channels():
    parts = [np.random.default_rng(k).standard_normal((2, 4, 3)).astype(np.float32) for k in range(3)]
    stats = stream_channels(({"x": p} for p in parts), {"x": -1})["x"]
    rows = np.concatenate(parts).reshape(-1, 3)
    np.testing.assert_array_equal(stats.low, rows.min(axis=0))
    np.testing.assert_array_equal(stats.high, rows.max(axis=0))
    np.testing.assert_allclose(stats.mean, rows.mean(axis=0), atol=1e-6)


def test_small_variances_survive_a_large_mean():
    x = (np.array([[0.0], [1.0], [2.0], [3.0]]) + 1e6).astype(np.float32)
    merged = merge_channels(channel_stats(x[:1]), channel_stats(x[1:]))
    assert merged.variance[0] == pytest.approx(1.25)


def test_tensors_without_channels_or_values_say_nothing():
    stats = stream_channels([{"scalar": np.ones(3, np.float32), "none": np.ones((0, 4), np.float32)}])
    assert stats == {}
