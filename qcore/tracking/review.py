"""The decision as a person reads it: a sentence, the checks, the two models side by side, the digests.

One table model, three forms: Markdown (MLflow's description, KFP's Markdown), a self-contained page (no script, no
external request), and the numbers that a list of runs is compared by. Nothing is decided or measured here.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qcore.report import EvaluationReport, GateDecision

VERDICT = {
    "pass": "PASS: the candidate may be released.",
    "fail": "FAIL: the candidate must not be released.",
    "inconclusive": "INCONCLUSIVE: the evidence is too thin to release the candidate.",
}
WAIVED = "PASS BY WAIVER: the candidate may be released although a check did not pass."


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A titled table of text; every row has as many cells as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """What a reviewer reads, in order: the verdict, why, and the tables."""

    outcome: str
    verdict: str
    why: str
    tables: tuple[Table, ...]


def review(report: EvaluationReport, decision: GateDecision) -> Review:
    """Return the review of a decision and the measurements it rests on."""
    verdict = WAIVED if decision.waivers and decision.outcome == "pass" else VERDICT[decision.outcome]
    return Review(
        outcome=decision.outcome,
        verdict=verdict,
        why=_why(decision),
        tables=(_checks(decision), _models(report), _digests(report, decision)),
    )


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


def to_markdown(content: Review) -> str:
    """Return the review in Markdown, verdict first."""
    parts = [f"**{content.verdict}** {content.why}"]
    for table in content.tables:
        head = [f"### {table.title}", "", _md_row(table.header), _md_row(("---",) * len(table.header))]
        parts.append("\n".join([*head, *map(_md_row, table.rows)]))
    return "\n\n".join(parts) + "\n"


def to_html(content: Review) -> str:
    """Return the review as one HTML page that needs nothing else."""
    tables = "".join(_html_table(t) for t in content.tables)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(content.verdict)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1 class="{html.escape(content.outcome)}">{html.escape(content.verdict)}</h1>\n'
        f"<p>{html.escape(content.why)}</p>\n{tables}</body></html>\n"
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "h1{font-size:1.4rem;border-left:.4rem solid;padding-left:.8rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}"
    ".pass{color:#14692f}.fail{color:#a11212}.inconclusive{color:#8a5a00}"
    ".t{overflow-x:auto}table{border-collapse:collapse;width:100%}"
    "th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #d8dee4}"
    "td{font-variant-numeric:tabular-nums}.digest{overflow-wrap:anywhere;font:.85em ui-monospace,monospace}"
)


def _why(decision: GateDecision) -> str:
    """Return why the outcome is what it is, and who overrode it or may."""
    basis = f"{decision.n} paired samples, {decision.confidence:.0%} confidence"
    return f"{_reasons(decision, basis)} {decision.who_may_override()}"


def _reasons(decision: GateDecision, basis: str) -> str:
    if decision.outcome == "pass" and not decision.waivers:
        return f"{'The check holds' if len(decision.checks) == 1 else 'All checks hold'} ({basis})."
    open_checks = [c for c in decision.checks if c.outcome != "pass"]
    reasons = "; ".join(f"{c.name}: {c.reason}" for c in open_checks) or "the policy has no checks"
    more = max((c.needs_samples or 0 for c in open_checks), default=0)
    ask = f" About {more} more samples would decide it." if more and decision.outcome == "inconclusive" else ""
    return f"{reasons} ({basis}).{ask}"


def _checks(decision: GateDecision) -> Table:
    rows = tuple(
        (
            c.name,
            *map(_number, (c.observed, c.bound, c.limit)),
            f"{c.outcome}, waived by {decision.waived[c.name].owner.name}" if c.name in decision.waived else c.outcome,
            c.reason,
        )
        for c in decision.checks
    )
    return Table(title="Checks", header=("check", "observed", "bound", "limit", "outcome", "reason"), rows=rows)


def _models(report: EvaluationReport) -> Table:
    m, base, cand = report.metrics, report.baseline, report.model
    rows = [
        ("output error (SQNR of the worst output)", "", f"{m['output_sqnr_db']:.1f} dB"),
        ("latency p50, 1 thread", f"{base.latency_ms.p50:.3f} ms", f"{cand.latency_ms.p50:.3f} ms"),
        ("latency p95, 1 thread", f"{base.latency_ms.p95:.3f} ms", f"{cand.latency_ms.p95:.3f} ms"),
        ("file size", f"{base.size_bytes:,} bytes", f"{cand.size_bytes:,} bytes"),
    ]
    if "agreement" in m:
        rows.insert(0, ("agreement with the baseline", "", _percent(m["agreement"])))
    if "top1" in m:
        rows.insert(0, ("top-1 accuracy", _percent(m.get("baseline_top1")), _percent(m["top1"])))
    title = f"Models on {report.data.name} / {report.data.split} (n = {report.n})"
    return Table(title=title, header=("", "float baseline", "candidate"), rows=tuple(rows))


def _digests(report: EvaluationReport, decision: GateDecision) -> Table:
    package = [] if decision.package is None else [("package", decision.package.sha256)]
    rows = (
        *package,
        ("candidate", decision.model_sha256),
        ("baseline", decision.baseline_sha256),
        ("data", decision.data_sha256),
        ("policy", decision.policy_sha256),
        ("evaluation report", decision.report_sha256),
        ("measured with", ", ".join(f"{k} {v}" for k, v in sorted(report.runtime.items()))),
        ("qcore", decision.qcore_version),
    )
    return Table(title="What exactly was judged (SHA-256)", header=("", "digest"), rows=rows)


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2%}"


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _html_cell(text: str) -> str:
    kind = ' class="digest"' if re.fullmatch("[0-9a-f]{64}", text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.header)
    rows = "".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>\n" for row in table.rows)
    return f'<h2>{html.escape(table.title)}</h2><div class="t"><table><tr>{head}</tr>\n{rows}</table></div>\n'
