"""The gate's decision put where people look: the parent run's description, numbers and report files, and the pages."""

import json
from dataclasses import dataclass
from pathlib import Path

from qcore.files import write_atomic
from qcore.report import GateDecision
from qcore.report_file import report_from_json
from qcore.tracking.review import review, summary_metrics, to_html, to_markdown
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
    report = report_from_json(json.loads(files.report.read_bytes()))
    content = review(report, decision)
    text = to_markdown(content)
    write_atomic(files.markdown, text.encode())
    write_atomic(files.html, to_html(content).encode())
    tracker.note(text)
    tracker.metrics(summary_metrics(report, decision), on="parent")
    tracker.params(
        {"policy_sha256": decision.policy_sha256, "confidence": decision.confidence, "evaluation_samples": decision.n},
        on="parent",
    )
    tags = {
        "qcore.gate": decision.outcome,
        "qcore.version": decision.qcore_version,
        "model.sha256": decision.model_sha256,
        "baseline.sha256": decision.baseline_sha256,
        "data.sha256": decision.data_sha256,
    }
    if decision.package is not None:
        tags["qcore.gated_package.sha256"] = decision.package.sha256
    tracker.tags({**tags, "qcore.override": decision.who_may_override()}, on="parent")
    tracker.tags({"qcore.gate": decision.outcome})
    for path, name in (
        (files.report, "report.json"),
        (files.html, "report.html"),
        (files.markdown, "gate.md"),
        (files.evidence, "evidence.json"),
    ):
        tracker.artifact(path, "report", name=name, on="parent")
