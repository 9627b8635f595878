"""What recovery steps are given."""

import numpy as np
from recovering import BATCH, evidence_of


def test_some_samples_are_spread_over_sorted_data():
    evidence = evidence_of(np.arange(16 * BATCH, dtype=np.float32)[:, None])
    batches = tuple({"x": np.full((BATCH, 1), k)} for k in range(10))

    def some(samples):
        return [int(b["x"][0, 0]) for b in evidence.some(batches, samples)]

    assert some(4 * BATCH) == [0, 2, 5, 7]
    assert some(4 * BATCH - 1) == [0, 2, 5, 7]
    assert some(1) == [0]
    assert some(100 * BATCH) == list(range(10))
    assert evidence.some((), 5) == ()
