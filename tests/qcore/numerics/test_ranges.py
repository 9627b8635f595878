"""The searched ranges against what quantization really does to values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcore.numerics.affine import QScheme, dequantize_array, qparams_from_range, quantize_array
from qcore.numerics.ranges import Counted, least_error
from qcore.numerics.stats import RangeRule, range_from_stats, tensor_stats

SCHEMES = {
    "uint8": QScheme(dtype="uint8"),
    "int8 symmetric": QScheme(dtype="int8", symmetric=True),
    "int8 power of two": QScheme(dtype="int8", symmetric=True, power_of_two=True),
    "4 bits": QScheme(dtype="uint8", bits=4),
}
SEARCHES = ("entropy", "mse", "sqnr")
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


def samples(name):
    rng = np.random.default_rng(0)
    made = {
        "normal": rng.standard_normal(50_000),
        "relu": np.maximum(rng.standard_normal(50_000), 0),
        "skewed": rng.gamma(1.0, 1.0, 50_000) - 0.5,
        "outlier": np.append(rng.standard_normal(50_000), 60.0),
        "negative": -rng.gamma(2.0, 1.0, 50_000) - 0.1,
    }
    return made[name].astype(np.float32)


def error(x, low, high, scheme):
    q = qparams_from_range(np.asarray(low), np.asarray(high), scheme)
    return float(np.mean((dequantize_array(quantize_array(x, q), q).astype(np.float64) - x) ** 2))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", ["normal", "relu", "skewed", "outlier", "negative"])
def test_mse_is_within_a_tenth_of_the_best_of_a_fine_grid(name, scheme):
    x = samples(name)
    stats = tensor_stats(x)
    found = error(x, *range_from_stats(stats, RangeRule(kind="mse"), scheme), scheme)
    grid = [(stats.low * a, stats.high * b) for a in np.linspace(0.02, 1, 30) for b in np.linspace(0.02, 1, 30)]
    best = min(error(x, min(low, high), max(low, high), scheme) for low, high in grid)
    assert found <= 1.1 * best
    assert found <= 1.001 * error(x, stats.low, stats.high, scheme)


@pytest.mark.parametrize("name", ["normal", "skewed", "outlier"])
def test_sqnr_clips_less_than_mse(name):
    stats = tensor_stats(samples(name))
    mse, sqnr = (range_from_stats(stats, RangeRule(kind=kind), SCHEMES["4 bits"]) for kind in ("mse", "sqnr"))
    assert sqnr[1] - sqnr[0] > mse[1] - mse[0]


def test_entropy_is_not_min_max_and_cuts_both_ends_by_themselves():
    stats = tensor_stats(samples("skewed"))
    low, high = range_from_stats(stats, RangeRule(kind="entropy"), SCHEMES["4 bits"])
    assert high < 0.8 * stats.high
    assert low < 0.8 * stats.low  # the dense end is kept
    mirrored = tensor_stats(-samples("skewed"))
    low, high = range_from_stats(mirrored, RangeRule(kind="entropy"), SCHEMES["4 bits"])
    assert low > 0.8 * mirrored.low
    assert high > 0.8 * mirrored.high


def test_the_zeros_of_a_relu_do_not_decide():
    x = samples("relu")
    sparse = np.concatenate([x, np.zeros(500_000, np.float32)])
    for kind in SEARCHES:
        ends = [range_from_stats(tensor_stats(v), RangeRule(kind=kind), SCHEMES["uint8"])[1] for v in (x, sparse)]
        assert ends[0] == pytest.approx(ends[1], rel=0.1), kind


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=VALUES),
    st.sampled_from(SEARCHES),
    st.sampled_from(sorted(SCHEMES)),
)
def test_a_searched_range_lies_inside_the_observed_one(x, kind, scheme):
    stats = tensor_stats(x)
    low, high = range_from_stats(stats, RangeRule(kind=kind), SCHEMES[scheme])
    assert stats.low <= low <= high <= stats.high


@settings(max_examples=40, deadline=None)
@given(st.floats(-4, 0), st.floats(0.01, 4), st.sampled_from([2, 4, 8]), st.integers(0, 1000))
def test_the_expected_error_is_that_of_evenly_spread_values(low, high, bits, seed):
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.uniform(-3, 3, 6))
    edges = edges[(edges < -1e-3) | (edges > 1e-3)]
    if len(edges) < 2:
        return
    left, right = edges[:-1], edges[1:]
    counts = rng.integers(1, 50, len(left)).astype(np.float64)
    keep = ~((left <= 0) & (right >= 0))  # that bin counts as zeros
    if not keep.any():
        return
    values = Counted(left=left[keep], right=right[keep], count=counts[keep])
    from qcore.numerics.ranges import _errors_of

    scheme = QScheme(dtype="uint8", bits=bits, axis=0)
    q = qparams_from_range(np.array([low]), np.array([high]), scheme)
    got = _errors_of(values, 1.0)(q)[0]
    fine = np.linspace(0, 1, 4001)[:-1] + 1 / 8000
    x = (values.left[:, None] + (values.right - values.left)[:, None] * fine).astype(np.float32)
    back = dequantize_array(quantize_array(x.reshape(1, -1), q), q).reshape(x.shape)
    expected = (((back - x) ** 2).mean(axis=1) * values.count).sum()
    assert got == pytest.approx(expected, rel=2e-2, abs=1e-4 * float(values.count.sum()))


def test_one_value_is_its_own_range():
    values = Counted(left=np.array([3.0]), right=np.array([3.0]), count=np.array([5.0]))
    assert least_error(values, SCHEMES["uint8"])[1] == pytest.approx(3.0)
