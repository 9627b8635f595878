import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.numerics.error import is_distribution, limited_db, normalised_mse, output_error, output_kl, sqnr_db


def test_known_ratios():
    x = np.array([3.0, 4.0])
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, x + 0.5) == pytest.approx(10 * np.log10(25 / 0.5))
    assert sqnr_db(np.zeros(2), x) == float("-inf")


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def test_output_kl_is_the_mean_divergence_in_nats():
    a, b = logits(5, 7), logits(5, 7, seed=1)
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(axis=1, keepdims=True) for x in (a, b))
    assert output_kl(a, b) == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)))
    assert output_kl(a.reshape(5, 7, 1, 1), b.reshape(5, 7, 1, 1)) == output_kl(a, b)


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0, 30))
def test_output_kl_does_not_depend_on_an_offset_and_never_overflows(offset, spread):
    a, b = logits(3, 5).astype(float) * spread, logits(3, 5, seed=1).astype(float) * spread
    assert output_kl(a, a) == 0
    assert output_kl(a + offset, b) == pytest.approx(output_kl(a, b), rel=1e-6, abs=1e-9)
    assert output_kl(a, b) >= 0
    assert np.isfinite(output_kl(a * 1e30, b))


def test_outputs_behind_a_softmax_are_taken_as_they_are():
    a, b = logits(4, 6), logits(4, 6, seed=1)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    assert is_distribution(p)
    assert not is_distribution(a)
    assert output_kl(p, q) == pytest.approx(output_kl(a, b), rel=1e-4)
    rounded = np.eye(6, dtype=np.float32)[:4]  # what 8 bits make of a sure answer: zeros
    assert 0 < output_kl(p, rounded) < 30


def test_output_error_is_kl_for_classes_and_the_worst_normalised_mse_else():
    a, b = logits(4, 6), logits(4, 6, seed=1)
    small = {"y": a, "z": a[:, :1]}
    other = {"y": b, "z": a[:, :1] * 2}
    assert output_error(small, other, "classification") == output_kl(a, b)
    assert output_error(small, other, "none") == max(normalised_mse(a, b), 1.0)
    assert output_error({"z": a[:, :1]}, {"z": a[:, :1] * 2}, "classification") == 1.0  # one value names no class
    assert output_error(small, small, "none") == 0
    assert normalised_mse(a, b) == pytest.approx(10 ** (-sqnr_db(a, b) / 10))


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match="equal names"):
        output_error({"y": logits(2, 3)}, {"z": logits(2, 3)}, "none")
    with pytest.raises(ValueError, match="shape"):
        output_kl(logits(2, 3), logits(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        output_kl(logits(2, 3), np.full((2, 3), np.nan))


def test_limited_db_has_a_floor_and_a_ceiling():
    assert limited_db(1.0, 0.0) == 300
    assert limited_db(0.0, 1.0) == -300
    assert limited_db(1.0, float("inf")) == -300
    assert limited_db(1.0, float("nan")) == -300
    assert limited_db(100.0, 1.0) == 20
