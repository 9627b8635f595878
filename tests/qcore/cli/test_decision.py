"""How a decision is printed: what stops a release first, numbers that people read, and the outcome with its checks."""

import pytest

from qcore.cli.model import outcome_line, print_decision
from qcore.cli.output import plain
from qcore.report import Check, GateDecision, outcome_of


def check(name, outcome, observed=1.0, needs=None):
    at_most = name == "size_bytes"
    limit = observed + (1 if (outcome == "pass") == at_most else -1)
    return Check(
        name=name, outcome=outcome, observed=observed, bound=observed, limit=limit, reason="so", needs_samples=needs
    )


def decision(*checks):
    digests = {f"{name}_sha256": "a" * 64 for name in ("model", "baseline", "data", "policy", "report")}
    return GateDecision(outcome=outcome_of(checks), checks=checks, confidence=0.95, n=10, qcore_version="0", **digests)


@pytest.mark.parametrize(
    ("number", "text"),
    [(12021760.0, "12,021,760"), (7.0, "7"), (-0.0, "0"), (0.25, "0.2500"), (1234.5, "1,234.5000"), (2e-5, "2e-05")],
)
def test_whole_numbers_are_printed_as_such(number, text):
    assert plain(number) == text


def test_the_outcome_names_its_checks_and_samples_are_asked_for_only_where_they_would_decide():
    open_, failed, fine = (
        check("top1_drop", "inconclusive", needs=4000),
        check("size_bytes", "fail", 9.0),
        check("top1_min", "pass"),
    )
    assert outcome_line(decision(fine)) == "pass"
    assert outcome_line(decision(fine, open_)) == "inconclusive (top1_drop) (about 4,000 more samples would decide)"
    assert outcome_line(decision(fine, open_, failed)) == "fail (size_bytes; inconclusive: top1_drop)"


def test_what_stops_the_release_comes_first(capsys):
    print_decision(decision(check("top1_min", "pass"), check("top1_drop", "inconclusive"), check("size_bytes", "fail")))
    shown = capsys.readouterr().out
    assert shown.index("size_bytes") < shown.index("top1_drop") < shown.index("top1_min")
    assert "outcome: fail (size_bytes; inconclusive: top1_drop)" in shown
