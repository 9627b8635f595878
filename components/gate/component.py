"""Component `gate`: the signed decision; its one string output is what `dsl.If` looks at."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def gate(
    report: dsl.Input[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
    decision_markdown: dsl.Output[dsl.Markdown],
    decision_html: dsl.Output[dsl.HTML],
    key: str,
    policy: str = "",
    parity: Optional[dsl.Input[dsl.Artifact]] = None,
) -> str:
    """Decide by policy whether the candidate may be released, and sign the decision.

    Args:
        report: Evaluation report (JSON).
        evidence: The decision as a signed in-toto statement (DSSE).
        decision_markdown: The decision as a person reads it.
        decision_html: The same as a page.
        key: Path to the gate's private key file, mounted from a secret.
        policy: Gate policy as YAML text. Empty: at most one point of accuracy lost at 95 % confidence.
        parity: Parity report (JSON) of the same model and split; needed where the policy limits parity.

    Returns:
        pass, fail or inconclusive.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts, text_file
    from qcore.tracking.tracker import Tracker
    from qcore.tracking.verdict import VerdictFiles, track_decision

    with Tracker("gate") as t, text_file(policy, "policy.yaml") as policy_file:
        source, out = Path(report.path), Path(evidence.path)
        elsewhere = Path(parity.path) if parity else None
        decision = steps.gate(report=source, out=out, key=Path(key), policy=policy_file, parity=elsewhere)
        evidence.metadata.update(file_facts(out, "qcore-evidence"))
        pages = {"markdown": Path(decision_markdown.path), "html": Path(decision_html.path)}
        track_decision(t, decision, VerdictFiles(report=source, evidence=out, **pages))
        return decision.outcome
