"""Component `review`: all that is known about one or two candidates, on one page, whatever the gate says."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def review(
    report: dsl.Input[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    text: dsl.Output[dsl.Markdown],
    facts: dsl.Output[dsl.Artifact],
    evidence: Optional[dsl.Input[dsl.Artifact]] = None,
    summary: Optional[dsl.Input[dsl.Artifact]] = None,
    candidate: Optional[dsl.Input[dsl.Model]] = None,
    table: Optional[dsl.Input[dsl.Artifact]] = None,
    layers: Optional[dsl.Input[dsl.Artifact]] = None,
    parity: Optional[dsl.Input[dsl.Artifact]] = None,
    package: Optional[dsl.Input[dsl.Artifact]] = None,
    data: Optional[dsl.Input[dsl.Dataset]] = None,
    other_report: Optional[dsl.Input[dsl.Artifact]] = None,
    other_evidence: Optional[dsl.Input[dsl.Artifact]] = None,
    other_summary: Optional[dsl.Input[dsl.Artifact]] = None,
    name: str = "candidate",
    other_name: str = "other",
    title: str = "",
) -> None:
    """Put what was measured and decided about candidates in front of the person who has to say yes.

    Args:
        report: Evaluation report (JSON).
        page: The review as a page that loads nothing.
        text: The same in at most 8000 characters of Markdown.
        facts: The same as JSON, with everything that the page only counts.
        evidence: The gate's signed decision on that report.
        summary: What every step of the compression did and skipped (JSON).
        candidate: The candidate's file; with `table` its ranges are drawn over what was seen.
        table: Calibration table that the ranges were chosen from.
        layers: Report of `qcore layers` (JSON).
        parity: Report of `qcore parity` (JSON).
        package: The .qpkg file that is shipped.
        data: Data-set card (YAML), or a folder holding exactly one; it names the classes.
        other_report: Evaluation report of a second candidate, such as one that was trained, on the same samples.
        other_evidence: The gate's decision on the second candidate.
        other_summary: How the second candidate was made.
        name: What the candidate is called.
        other_name: What the second candidate is called.
        title: What the model is called. Empty: what is known from the files.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker
    from qcore.tracking.verdict import track_review

    with Tracker("review") as t:
        groups = {
            "evidence": (evidence, other_evidence),
            "summaries": (summary, other_summary),
            "models": (candidate,),
            "tables": (table,),
            "layers": (layers,),
            "parity": (parity,),
            "packages": (package,),
        }
        paths = {kind: [Path(a.path) for a in artifacts if a] for kind, artifacts in groups.items()}
        beside = steps.Beside(**paths, data=Path(data.path) if data else None)
        reports = [(n, Path(r.path)) for n, r in ((name, report), (other_name, other_report)) if r]
        out = steps.ReviewFiles(page=Path(page.path), markdown=Path(text.path), facts=Path(facts.path))
        found = steps.review(reports=reports, out=out, beside=beside, title=title, rest="report/review.html")
        facts.metadata.update(file_facts(out.facts, "qcore-review"))
        t.tags({"qcore.review": found.outcome})
        track_review(t, page=out.page, markdown=out.markdown, facts=out.facts)
