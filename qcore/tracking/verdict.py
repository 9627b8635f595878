"""The gate's decision put where people look: the parent run's description, numbers and report files, and the pages."""

import json
from dataclasses import dataclass
from pathlib import Path

from qcore.files import write_atomic
from qcore.report import EvaluationReport, GateDecision
from qcore.report_file import report_from_json
from qcore.review.facts import review
from qcore.review.markdown import to_markdown
from qcore.review.source import one_candidate
from qcore.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictFiles:
    """The files around one decision: the report and the evidence that exist, the two pages that are written."""

    report: Path
    evidence: Path
    markdown: Path
    html: Path


def track_decision(tracker: Tracker, decision: GateDecision, files: VerdictFiles) -> None:
    """Write the pages and put decision, numbers and files on the parent run.

    Raises:
        GateRefused: the report is not one that `qcore evaluate` wrote.
    """
    from qcore.review.page import to_html  # plots: not for tasks that only track

    report = report_from_json(json.loads(files.report.read_bytes()))
    content = review(one_candidate(report, decision, vouched=True))  # the gate made it just now
    text = to_markdown(content, rest="report/report.html")
    write_atomic(files.markdown, text.encode())
    write_atomic(files.html, to_html(content).encode())
    tracker.note(text)
    tracker.metrics(summary_metrics(report, decision), on="parent")
    tracker.params(
        {"policy_sha256": decision.policy_sha256, "confidence": decision.confidence, "evaluation_samples": decision.n},
        on="parent",
    )
    tracker.params({f"limit.{c.name}": c.limit for c in decision.checks}, on="parent")
    tags = {
        "qcore.gate": decision.outcome,
        "qcore.version": decision.qcore_version,
        "model.sha256": decision.model_sha256,
        "baseline.sha256": decision.baseline_sha256,
        "data.sha256": decision.data_sha256,
    }
    if decision.package is not None:
        tags["package.sha256"] = decision.package.sha256
    tracker.tags({**tags, "qcore.override": decision.who_may_override()}, on="parent")
    tracker.tags({"qcore.gate": decision.outcome})
    track_outcome(tracker, decision.outcome)
    for path, name in (
        (files.report, "report.json"),
        (files.html, "report.html"),
        (files.markdown, "gate.md"),
        (files.evidence, "evidence.json"),
    ):
        tracker.artifact(path, "report", name=name, on="parent")


def track_review(tracker: Tracker, *, page: Path, markdown: Path, facts: Path) -> None:
    """Make the Markdown of a review the description of the parent run, and keep all three forms there."""
    tracker.note(markdown.read_text(encoding="utf-8"))
    for path, name in ((page, "review.html"), (markdown, "review.md"), (facts, "review.json")):
        tracker.artifact(path, "report", name=name, on="parent")


def summary_metrics(report: EvaluationReport, decision: GateDecision) -> dict[str, float]:
    """Return the numbers that runs are compared by: quality as fractions of 1, latency in ms, sizes in bytes.

    `top1_delta_lower` is the confidence bound that the gate used; it is left out where no check limits the drop.
    """
    bounds = {c.name: c.bound for c in decision.checks}
    values = {
        **{k: report.metrics[k] for k in ("top1", "baseline_top1", "top1_delta", "agreement") if k in report.metrics},
        "size_bytes": float(report.model.size_bytes),
        "size_ratio": report.model.size_bytes / report.baseline.size_bytes,
        "latency_p50_ms": report.model.latency_ms.p50,
        "baseline_latency_p50_ms": report.baseline.latency_ms.p50,
    }
    lower = bounds.get("top1_drop")
    return values if lower is None else {**values, "top1_delta_lower": lower}


def track_outcome(tracker: Tracker, outcome: str) -> None:
    """Tag the registered version with the gate's outcome; only a pass makes it the `candidate`."""
    tracker.version_tags({"qcore.gate": outcome})
    if outcome == "pass":
        tracker.alias("candidate")


def track_publication(tracker: Tracker, channel: str, counter: int) -> None:
    """Say of the registered version where it was published, and make it the `champion`.

    Publishing has verified the signed pass, so the outcome is said again: where packages are made behind the gate,
    there was no version yet when the gate spoke.
    """
    track_outcome(tracker, "pass")
    tracker.version_tags({"qcore.ota.channel": channel, "qcore.ota.counter": counter})
    tracker.alias("champion", previous="previous_champion")
