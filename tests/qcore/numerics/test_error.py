import numpy as np
import pytest

from qcore.numerics.error import sqnr_db


def test_known_ratios():
    x = np.array([3.0, 4.0])
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, x + 0.5) == pytest.approx(10 * np.log10(25 / 0.5))
    assert sqnr_db(np.zeros(2), x) == float("-inf")
