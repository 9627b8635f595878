"""Component `gate`: the signed decision; its one string output is what `dsl.If` looks at."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def gate(
    report: dsl.Input[dsl.Artifact],
    package: dsl.Input[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
    decision_markdown: dsl.Output[dsl.Markdown],
    decision_html: dsl.Output[dsl.HTML],
    key: str,
    policy: str = "",
    waiver: str = "",
    parity: Optional[dsl.Input[dsl.Artifact]] = None,
) -> str:
    """Decide by policy whether the candidate may be released, and sign the decision.

    Args:
        report: Evaluation report (JSON).
        package: The .qpkg file that shall be published; it must hold the model that the report measured.
        evidence: The decision as a signed in-toto statement (DSSE).
        decision_markdown: The decision as a person reads it.
        decision_html: The same as a page.
        key: Folder with the gate's key (gate.pem or gate.signer.json), or the key file; mounted from a secret.
        policy: Gate policy as YAML text. Empty: at most one point of accuracy lost at 95 % confidence.
        waiver: Text of a signed waiver for exactly this report and package. Empty: none.
        parity: Parity report (JSON) of the same model and split; needed where the policy limits parity.

    Returns:
        pass, fail or inconclusive.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts, text_file
    from qcore.tracking.tracker import Tracker
    from qcore.tracking.verdict import VerdictFiles, track_decision

    texts = text_file(policy, "policy.yaml"), text_file(waiver, "waiver.json")
    with Tracker("gate") as t, texts[0] as policy_file, texts[1] as waiver_file:
        source, out = Path(report.path), Path(evidence.path)
        shipped, signer = Path(package.path), Path(key)
        elsewhere = Path(parity.path) if parity else None
        decision = steps.gate(
            report=source,
            out=out,
            key=signer,
            policy=policy_file,
            package=shipped,
            parity=elsewhere,
            waivers=[waiver_file] if waiver_file else [],
        )
        evidence.metadata.update(file_facts(out, "qcore-evidence"))
        pages = {"markdown": Path(decision_markdown.path), "html": Path(decision_html.path)}
        track_decision(t, decision, VerdictFiles(report=source, evidence=out, **pages))
        return decision.outcome
