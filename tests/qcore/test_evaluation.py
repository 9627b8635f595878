import io

import numpy as np
import pytest

from qcore.errors import DataError, ModelError
from qcore.evaluation import evaluate, golden_samples


def fixed(rows):
    """Return a model that answers with the given scores, row by row of its input numbers."""
    table = np.array(rows, np.float32)
    return lambda fed: {"y": table[fed["i"]]}


def feed(n, labels=None, size=2):
    for start in range(0, n, size):
        index = np.arange(start, min(n, start + size))
        yield index, {"i": index}, None if labels is None else np.array(labels)[index]


BASE = [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]]
CAND = [[1, 0], [0, 1], [0, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pairs_are_counted_sample_by_sample(size):
    result = evaluate(fixed(CAND), fixed(BASE), feed(5, [0, 1, 1, 1, 1], size))
    p = result.paired
    assert (p.both_right, p.only_candidate_right, p.only_baseline_right, p.both_wrong) == (2, 1, 1, 1)
    assert result.metrics["top1"] == result.metrics["baseline_top1"] == 0.6
    assert result.metrics["agreement"] == 0.6
    assert result.samples.candidate == (0, 1, 1, 0, 0)
    assert result.n == 5


def test_without_labels_only_agreement_is_measured():
    result = evaluate(fixed(CAND), fixed(BASE), feed(5))
    assert result.paired is None
    assert result.samples.label is None
    assert set(result.metrics) == {"agreement", "output_sqnr_db"}


def test_equal_models_agree_completely():
    result = evaluate(fixed(BASE), fixed(BASE), feed(5, [0] * 5))
    assert result.metrics["agreement"] == 1.0
    assert result.metrics["output_sqnr_db"] == 300.0


def test_padding_of_a_fixed_batch_is_not_counted():
    padded = lambda fed: {"y": np.concatenate([np.array(BASE, np.float32)[fed["i"]], np.zeros((3, 2), np.float32)])}  # noqa: E731
    assert evaluate(padded, padded, feed(5, [0] * 5)).n == 5


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(ModelError, match="allowed: equal names and shapes"):
        evaluate(fixed([[1, 0, 0]] * 5), fixed(BASE), feed(5))
    with pytest.raises(ModelError, match="candidate gives NaN"):
        evaluate(fixed([[np.nan, 0]] * 5), fixed(BASE), feed(5))


def test_one_value_per_sample_names_no_class():
    ones = [[0.1], [0.9], [0.5], [0.2], [0.7]]
    result = evaluate(fixed(ones), fixed(ones), feed(5))
    assert set(result.metrics) == {"output_sqnr_db"}
    with pytest.raises(DataError, match="one value per sample, which names no class"):
        evaluate(fixed(ones), fixed(ones), feed(5, [0] * 5))


def test_the_worst_output_counts():
    good, bad = np.array([[1.0, 0.0]] * 4, np.float32), np.array([[3.0]] * 4, np.float32)
    baseline = lambda fed: {"a": good[fed["i"]], "b": bad[fed["i"]]}  # noqa: E731
    candidate = lambda fed: {"a": good[fed["i"]], "b": 1.1 * bad[fed["i"]]}  # noqa: E731
    assert evaluate(candidate, baseline, feed(4)).metrics["output_sqnr_db"] == pytest.approx(20.0, abs=0.01)


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(DataError, match="sample 3 has label 2; the model has 2 outputs"):
        evaluate(fixed(CAND), fixed(BASE), feed(5, [0, 0, 0, 2, 0]))


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="no samples"):
        evaluate(fixed(CAND), fixed(BASE), [])


def test_golden_samples_hold_inputs_and_outputs_in_equal_bytes():
    fed = {"i": np.array([0, 3])}
    data = golden_samples(fixed(BASE), fed)
    assert data == golden_samples(fixed(BASE), fed)
    arrays = np.load(io.BytesIO(data), allow_pickle=False)
    assert sorted(arrays) == ["input:i", "output:y"]
    assert np.array_equal(arrays["output:y"], np.array(BASE, np.float32)[[0, 3]])
