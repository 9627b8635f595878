"""The review as one JSON object: all facts that page and Markdown show, and those that they only count."""

from collections.abc import Sequence
from dataclasses import asdict

from qcore.canonical import Json
from qcore.review.facts import (
    REVIEW_SCHEMA,
    Flip,
    Judged,
    Review,
    costs,
    digests,
)


def to_json(review: Review) -> Json:
    """Return the JSON form (`qcore.review/1`).

    Flips are rows of index, class, float's answer and the candidate's. Shares are fractions of 1, times milliseconds
    where the name says `_ms`, `loss` is how much worse than float the candidate is in `measure`.
    """
    return {
        "schema": REVIEW_SCHEMA,
        "title": review.title,
        "outcome": review.outcome,
        "verdict": review.verdict,
        "sure": review.sure,
        "signature": review.signature,
        "subject": review.judged.source.name,
        "measure": {
            "key": review.measure.key,
            "words": review.measure.words,
            "higher_is_better": review.measure.higher,
        },
        "baseline": asdict(review.baseline),
        "data": {**asdict(review.data), "n": review.n},
        "classes": {str(k): name for k, name in review.classes.items()},
        "candidates": [_candidate(c) for c in review.candidates],
    }


def _candidate(judged: Judged) -> Json:
    source = judged.source
    report = source.report
    decision = source.decision
    return {
        "name": source.name,
        "label": judged.label,
        "trained": None if source.summary is None else source.summary.trained,
        "outcome": judged.outcome,
        "on_pareto_front": judged.on_front,
        "loss": judged.loss,
        "model": asdict(report.model),
        "metrics": dict(report.metrics),
        "costs": {name: {"baseline": theirs, "candidate": ours} for name, (theirs, ours) in costs(report).items()},
        "ratios": {name: asdict(r) for name, r in report.ratios.items()},
        "download": None if report.download is None else asdict(report.download),
        "decision": None if decision is None else decision.to_json(),
        "may_override": None if decision is None else decision.who_may_override(),
        "classes": [asdict(c) for c in judged.classes],
        "flips": {
            "right_to_wrong": _rows(judged.flips.right_to_wrong),
            "wrong_to_right": _rows(judged.flips.wrong_to_right),
            "other": _rows(judged.flips.other),
        },
        "summary": None if source.summary is None else asdict(source.summary),
        "layers": None if source.layers is None else asdict(source.layers),
        "parity": None if source.parity is None else source.parity.to_json(),
        "ranges": None if source.ranges is None else asdict(source.ranges),
        "no_ranges": None if source.no_ranges is None else source.no_ranges.why,
        "package": None if source.package is None else asdict(source.package),
        "digests": dict(digests(judged)),
        "runtime": dict(report.runtime),
        "qcore_version": report.qcore_version,
    }


def _rows(flips: Sequence[Flip]) -> list[Json]:
    return [[f.index, f.label, f.baseline, f.candidate] for f in flips]
