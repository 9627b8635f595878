"""What a review says follows from the reports: counted again here, another way; and what does not belong is refused."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reviewing import classified, drawn, everything, regression

from qcore.errors import DataError
from qcore.gate import decide
from qcore.policy import ErrorLimit, GatePolicy, MetricLimit
from qcore.report import Check
from qcore.review.confusion import FEW, OTHERS, WORST, confusion_matrix, log_confusion
from qcore.review.facts import costs, digests, review
from qcore.review.sections import sections
from qcore.review.source import Candidate, Sources, one_candidate
from qcore.review.wording import by_name

few = st.integers(0, 3)


@given(st.lists(st.tuples(few, few, few), min_size=1, max_size=40))
def test_flips_and_classes_are_those_of_the_samples(rows):
    label, theirs, ours = (np.array(c) for c in zip(*rows, strict=True))
    report = classified(label, theirs, ours)
    judged = review(one_candidate(report, None)).judged
    lost, won = (theirs == label) & (ours != label), (ours == label) & (theirs != label)
    assert [f.index for f in judged.flips.right_to_wrong] == np.flatnonzero(lost).tolist()
    assert [f.index for f in judged.flips.wrong_to_right] == np.flatnonzero(won).tolist()
    assert sum(map(len, judged.flips.named().values())) == int((theirs != ours).sum())
    assert sum(c.support for c in judged.classes) == len(rows)
    assert sum(c.candidate_right - c.baseline_right for c in judged.classes) == int(won.sum()) - int(lost.sum())
    assert [c.change for c in judged.classes] == sorted(c.change for c in judged.classes)
    assert judged.loss == pytest.approx((lost.sum() - won.sum()) / len(rows))


def test_without_labels_changed_answers_are_neither_gain_nor_loss():
    judged = review(one_candidate(classified(None, [0, 1, 2], [0, 1, 1]), None)).judged
    assert [f.index for f in judged.flips.other] == [2]
    assert judged.flips.right_to_wrong == judged.flips.wrong_to_right == judged.classes == ()
    assert judged.loss == pytest.approx(1 / 3)  # of agreement


def test_a_regression_is_compared_by_its_error():
    report = regression([1.0] * 200, [1.0, 1.02] * 100)
    found = review(one_candidate(report, decide(report, GatePolicy(mae=ErrorLimit(max_increase=0.1)))))
    assert found.measure.key == "mae"
    assert found.judged.loss == pytest.approx(0.01)
    assert found.verdict.startswith("PASS: ")
    assert "mae_increase was seen at 0.01" in found.sure


def judged_by(limit: float, **options) -> Candidate:
    report = drawn(**options)
    return Candidate(
        name=options["model"][:1], report=report, decision=decide(report, GatePolicy(top1=MetricLimit(max_drop=limit)))
    )


def test_the_verdict_is_about_the_best_outcome_and_says_how_sure_it_is():
    fails = judged_by(0.01, n=2000, changed=0.3, model="1" * 64)
    open_ = judged_by(0.03, n=2000, changed=0.03, model="2" * 64)
    passes = judged_by(0.1, n=2000, changed=0.02, model="3" * 64)
    open_ = replace(open_, decision=decide(open_.report, GatePolicy(top1=MetricLimit(max_drop=0.024))))
    assert [c.decision.outcome for c in (fails, open_, passes)] == ["fail", "inconclusive", "pass"]
    silent = Candidate(name="s", report=drawn(n=2000, model="4" * 64))
    for given_, subject, word in (
        ((fails, open_, passes, silent), 2, "PASS"),
        ((silent, fails, open_), 2, "INCONCLUSIVE"),
        ((silent, fails), 1, "FAIL"),
        ((silent,), 0, "NOT JUDGED"),
    ):
        found = review(Sources(candidates=given_))
        assert found.subject == subject
        assert found.verdict.startswith(f"{word}: ")
    said = review(Sources(candidates=(open_,)))
    check = open_.decision.checks[0]
    assert f"about {check.needs_samples:,} further sample" in said.sure
    assert f"{100 * check.bound:+.2f} points" in said.sure
    assert "95 % one-sided" in said.sure
    assert "2,000 paired samples" in said.sure


def test_no_confidence_is_claimed_for_what_has_no_bound():
    passes = judged_by(0.1, n=2000, changed=0.02, model="3" * 64)
    exact = Check(name="size_bytes", outcome="pass", observed=9.0, bound=9.0, limit=12_021_760.0, reason="r")
    both = replace(passes.decision, checks=(exact, *passes.decision.checks))
    said = review(Sources(candidates=(replace(passes, decision=both),))).sure
    assert "top1_drop was seen at" in said
    assert "without a bound, compared as measured: size_bytes" in said
    said = review(Sources(candidates=(replace(passes, decision=replace(both, checks=(exact,))),))).sure
    assert "%" not in said
    assert "no check has a confidence bound" in said


@pytest.mark.parametrize(("value", "text"), [(12_021_760.0, "12,021,760"), (7.0, "7"), (0.0, "0"), (0.12345, "0.1235")])
def test_whole_numbers_are_shown_as_such(value, text):
    assert by_name("conditions", value) == text


def test_what_was_built_is_packaged_and_names_the_model():
    whole = replace(everything("a", drawn()), layers=None)
    found = review(Sources(candidates=(whole,)))
    (lineage,) = (s for s in sections(found) if s.key == "lineage")
    assert lineage.text.startswith("Packaged: parts 1.0.0, ")
    assert found.title == "parts 1.0.0"


def test_names_say_how_a_candidate_was_made():
    labels = [
        everything(name, drawn(), qat=qat).label
        for name, qat in (("first", False), ("second", True), ("ptq-int8", False), ("my QAT", True))
    ]
    assert labels == ["PTQ first", "QAT second", "ptq-int8", "my QAT"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: replace(r, baseline=replace(r.baseline, sha256="0" * 64)), "float model 000"),
        (lambda r: replace(r, data=replace(r.data, name="other")), "data other"),
        (lambda r: replace(r, data=replace(r.data, split="train")), "split train"),
        (lambda r: replace(r, data=replace(r.data, sha256="0" * 64)), "samples 000"),
        (lambda r: drawn(n=399), "number of samples 399"),
    ],
)
def test_reports_that_cannot_be_compared_are_refused(change, says):
    with pytest.raises(DataError, match=says):
        Sources(candidates=(Candidate(name="a", report=drawn()), Candidate(name="b", report=change(drawn()))))


def test_what_is_about_another_model_is_refused():
    whole, other = everything("a", drawn()), everything("b", drawn(model="c" * 64))
    for kind in ("decision", "summary", "layers", "parity", "ranges", "package"):
        with pytest.raises(DataError, match="ccc"):
            Sources(candidates=(replace(whole, **{kind: getattr(other, kind)}),))
    stale = decide(drawn(seed=9), GatePolicy(top1=MetricLimit(max_drop=0.05)))
    with pytest.raises(DataError, match="about report"):
        Sources(candidates=(replace(whole, decision=stale),))
    with pytest.raises(DataError, match="is there twice"):
        Sources(candidates=(whole, whole))
    with pytest.raises(DataError, match="no candidate"):
        Sources(candidates=())


def test_every_digest_of_the_evidence_is_in_the_lineage():
    whole = everything("a", drawn())
    found = set(digests(review(Sources(candidates=(whole,))).judged).values())
    decision = {v for k, v in whole.decision.to_json().items() if k.endswith("_sha256") and v is not None}
    assert found >= decision | {whole.package.sha256, whole.summary.recipe_sha256, whole.ranges.data_sha256}


def test_costs_hold_every_number_that_a_report_holds_about_a_model():
    found = costs(drawn())
    assert found["latency_p50_ms"] == (1.0, 0.5)
    assert found["latency_runs"] == (20, 20)
    assert found["size_bytes"] == (100_000, 25_000)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=300))
def test_the_confusion_matrix_loses_no_sample(rows):
    label, ours = (np.array(c) for c in zip(*rows, strict=True))
    report = classified(label, label, ours)
    names, matrix = confusion_matrix(report, {0: "cat"})
    assert len(names) == len(matrix) == len(set(names))
    assert {len(row) for row in matrix} == {len(names)}
    assert sum(map(sum, matrix)) == len(rows)
    classes = set(label) | set(ours)
    assert len(names) == (len(classes) if len(classes) <= FEW else WORST + 1)
    wrong = Counter(label[label != ours].tolist())
    for k, name in enumerate(names):
        if name != OTHERS:
            number = int(name.split()[0])
            assert matrix[k][k] == int(((label == number) & (ours == number)).sum())
            assert sum(matrix[k]) - matrix[k][k] == wrong[number]
    if names[-1] == OTHERS:
        shown = {int(name.split()[0]) for name in names[:-1]}
        assert min(wrong[k] for k in shown) >= max(wrong[k] for k in classes - shown)


def test_without_classes_there_is_no_confusion_matrix():
    class Nothing:
        def log_confusion_matrix(self, categories, matrix):
            raise AssertionError(categories)

    log_confusion(Nothing(), classified(None, [0, 1], [0, 1]), {})
