import io
import json
from itertools import pairwise

import numpy as np
import pytest

from qcore.errors import DataError, ModelError
from qcore.evaluation import Question, UserMetric, count_samples, evaluate, golden_samples
from qcore.tally import exact, merged, rounded, tally_from_json, tally_to_json


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


def random_scores(classes, n=400, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, classes))
    return base, base + 0.7 * rng.normal(size=(n, classes)), rng.integers(0, classes, n)


def answers(rows):
    return lambda fed: {"y": rows[fed["i"]]}


@pytest.mark.parametrize("classes", [5, 6, 20])
def test_the_label_among_the_five_largest_outputs(classes):
    base, ours, y = random_scores(classes)
    result = evaluate(answers(ours), answers(base), feed(400, y, 7))
    if classes == 5:
        assert "top5" not in result.metrics
        assert result.details.top5 is None
        return
    for name, rows in (("top5", ours), ("baseline_top5", base)):
        among = [label in np.argsort(-row)[:5] for label, row in zip(y, rows, strict=True)]
        assert result.metrics[name] == np.mean(among)
    assert result.details.top5.n == 400


def test_of_equal_outputs_the_first_five_are_the_largest():
    same = np.ones((8, 8))
    result = evaluate(answers(same), answers(same), feed(8, np.arange(8)))
    assert result.metrics["top5"] == 5 / 8
    assert result.metrics["top1"] == 1 / 8


def test_classes_and_confusion_are_counted_on_both_sides():
    base, ours, y = random_scores(4)
    y[y == 2] = 0  # a class without samples
    result = evaluate(answers(ours), answers(base), feed(400, y, 7))
    assert [c.label for c in result.details.classes] == [0, 1, 3]
    for c in result.details.classes:
        assert c.support == (y == c.label).sum()
        assert c.candidate_right == ((y == c.label) & (ours.argmax(axis=1) == y)).sum()
        assert c.baseline_right == ((y == c.label) & (base.argmax(axis=1) == y)).sum()
    for side, rows in ((result.details.baseline, base), (result.details.candidate, ours)):
        table = np.zeros((4, 4), int)
        np.add.at(table, (y, rows.argmax(axis=1)), 1)
        assert list(side.confusion) == [(a, b, table[a, b]) for a, b in np.argwhere(table).tolist()]


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_calibration_error_is_that_of_guo(probabilities):
    base, ours, y = random_scores(6, 2000)
    rows = [softmax(base), softmax(ours)] if probabilities else [base, ours]
    result = evaluate(answers(rows[1]), answers(rows[0]), feed(2000, y, 100))
    for name, scores in (("ece", ours), ("baseline_ece", base)):
        p = softmax(scores)
        top, right = p.max(axis=1), p.argmax(axis=1) == y
        edges = np.linspace(0, 1, 16)
        inside = [(top > a) & (top <= b) for a, b in pairwise(edges)]
        expected = sum(abs(right[k].mean() - top[k].mean()) * k.mean() for k in inside if k.any())
        assert result.metrics[name] == pytest.approx(expected, abs=1e-8)


def test_probabilities_that_integers_rounded_are_still_probabilities():
    base = softmax(random_scores(6)[0])
    rounded = np.floor(base * 256) / 256  # adds up to less than 1
    result = evaluate(answers(rounded), answers(base), feed(400, base.argmax(axis=1), 50))
    assert result.metrics["ece"] == pytest.approx(result.metrics["baseline_ece"], abs=0.01)


def regression(columns=3, n=300):
    rng = np.random.default_rng(1)
    y = 1e6 + rng.normal(size=(n, columns))
    return y + 0.3 * rng.normal(size=y.shape), y + 0.5 * rng.normal(size=y.shape), y


@pytest.mark.parametrize("columns", [1, 3])
def test_a_regression_is_held_against_its_targets(columns):
    base, ours, y = regression(columns)
    asked = Question(task="regression", centre=y.mean(axis=0))
    result = evaluate(answers(ours), answers(base), feed(300, y, 7), asked)
    for prefix, rows in (("", ours), ("baseline_", base)):
        m = result.metrics
        assert m[f"{prefix}mae"] == pytest.approx(np.abs(rows - y).mean())
        assert m[f"{prefix}rmse"] == pytest.approx(np.sqrt(((rows - y) ** 2).mean()))
        assert m[f"{prefix}r2"] == pytest.approx(1 - ((rows - y) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())
    assert result.samples.values["absolute_error"].candidate == pytest.approx(np.abs(ours - y).mean(axis=1))
    assert result.samples.baseline is result.samples.label is result.paired is None
    with pytest.raises(DataError, match="targets have 2 values per sample"):
        evaluate(answers(np.ones((9, 3))), answers(np.ones((9, 3))), feed(9, np.ones((9, 2))), asked)


def test_anomalies_are_ranked():
    y = np.array([0, 0, 1, 1, 0])
    ours, base = np.array([[0.1], [0.4], [0.35], [0.8], [0.2]]), np.array([[0.1], [0.2], [0.5], [0.8], [0.2]])
    result = evaluate(answers(ours), answers(base), feed(5, y), Question(task="anomaly"))
    assert result.metrics["auc"] == pytest.approx(5 / 6)
    assert result.metrics["baseline_auc"] == 1.0
    with pytest.raises(DataError, match="all samples of the split have label 0"):
        evaluate(answers(ours), answers(base), feed(5, 0 * y), Question(task="anomaly"))
    with pytest.raises(DataError, match="has 2 values per sample; allowed for anomalies: 1"):
        evaluate(answers(np.ones((5, 2))), answers(np.ones((5, 2))), feed(5, y), Question(task="anomaly"))


def test_a_metric_of_the_user_gives_a_number_per_sample():
    base, ours, y = random_scores(4)
    margin = UserMetric(name="margin", direction="higher", score=lambda out, y: out["y"][np.arange(len(y)), y])
    result = evaluate(answers(ours), answers(base), feed(400, y, 7), Question(metrics=(margin,)))
    assert result.metrics["margin"] == pytest.approx(ours[np.arange(400), y].mean())
    assert result.metrics["baseline_margin"] == pytest.approx(base[np.arange(400), y].mean())
    assert result.user_metrics == {"margin": "higher"}
    mean = UserMetric(name="mean", direction="lower", score=lambda out, y: out["y"].mean())
    with pytest.raises(DataError, match="metric mean gives float64 of shape \\(\\) for 7 samples"):
        evaluate(answers(ours), answers(base), feed(400, y, 7), Question(metrics=(mean,)))
    first = UserMetric(name="first", direction="higher", score=lambda out, _: np.where(out["y"] > 0, np.inf, 0.0)[:, 0])
    own = UserMetric(name="own", direction="higher", score=lambda out, _: np.full(len(out["y"]), np.nan))
    with pytest.raises(DataError, match="metric own gives NaN for sample 0 with the outputs of the baseline; allowed"):
        evaluate(answers(base), answers(base), feed(400, y, 7), Question(metrics=(own,)))
    with pytest.raises(DataError, match="metric first gives infinity for sample"):
        evaluate(answers(base), answers(base), feed(400, y, 7), Question(metrics=(first,)))


@pytest.mark.parametrize("cuts", [(0, 400), (0, 7, 399, 400), tuple(range(0, 401, 50))])
def test_parts_of_the_samples_merge_to_the_whole(cuts):
    base, ours, y = random_scores(7)
    base *= 10.0 ** (np.arange(-200, 200)[:, None] / 4)  # sums of floats of very different size depend on their order
    ours *= 10.0 ** (np.arange(-200, 200)[:, None] / 4)
    asked = Question(metrics=(UserMetric(name="m", direction="lower", score=lambda out, y: out["y"][:, 0]),))
    every = list(feed(400, y, 1))
    whole = count_samples(answers(ours), answers(base), every, asked)
    parts = [count_samples(answers(ours), answers(base), every[a:b], asked) for a, b in pairwise(cuts)]
    assert merged(parts) == whole
    assert tally_from_json(json.loads(json.dumps(tally_to_json(whole)))) == whole


@pytest.mark.parametrize("value", [0.0, 5e-324, 0.1, 1e308, 123456.789])
def test_exact_sums_are_exact(value):
    assert rounded(exact(value)) == value
    assert rounded(3 * exact(value)) == (3 * value if value < 1e308 else np.inf)


TASKS = {
    "classification": (lambda y: y, {"top1", "top5", "agreement"}),
    "none": (lambda y: None, {"agreement"}),
    "regression": (lambda y: np.stack([y / 3] * 7, axis=1), {"mae", "rmse", "r2"}),
    "anomaly": (lambda y: y % 2, {"auc"}),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_champion_is_measured_as_if_it_were_the_candidate(task):
    truth, names = TASKS[task]
    base, ours, y = random_scores(7)
    theirs = ours[::-1] / 3 + base
    if task == "anomaly":
        base, ours, theirs = base[:, :1], ours[:, :1], theirs[:, :1]
    y = truth(y)
    own = UserMetric(name="own", direction="lower", score=lambda out, y: out["y"][:, 0])
    centre = None if task != "regression" else y.mean(axis=0)
    asked = Question(task=task, centre=centre, metrics=(own,))
    every = list(feed(400, y, 7))
    three = evaluate(answers(ours), answers(base), every, asked, answers(theirs))
    plain = evaluate(answers(ours), answers(base), every, asked)
    swapped = evaluate(answers(theirs), answers(base), every, asked)
    names = names | {"own", "output_sqnr_db"}
    assert {k: v for k, v in three.metrics.items() if not k.startswith("champion_")} == plain.metrics
    found = {k.removeprefix("champion_"): v for k, v in three.metrics.items() if k.startswith("champion_")}
    assert found == {k: swapped.metrics[k] for k in names}
    assert three.samples.champion == swapped.samples.candidate
    for name, values in three.samples.values.items():
        assert values.champion == swapped.samples.values[name].candidate
    if task == "classification":
        against = evaluate(answers(ours), answers(theirs), every, asked)
        assert three.champion_paired == against.paired
        tally = count_samples(answers(ours), answers(base), every, asked, answers(theirs))
        assert tally.champion_top5 == against.details.top5
    parts = [
        count_samples(answers(ours), answers(base), every[a:b], asked, answers(theirs)) for a, b in [(0, 9), (9, 58)]
    ]
    whole = count_samples(answers(ours), answers(base), every, asked, answers(theirs))
    assert merged(parts) == whole
    assert tally_from_json(json.loads(json.dumps(tally_to_json(whole)))) == whole
    with pytest.raises(DataError):
        merged([parts[0], count_samples(answers(ours), answers(base), every[9:], asked)])
