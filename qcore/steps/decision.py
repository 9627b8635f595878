"""Decision on files: a report in, the signed decision of the gate out."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import GateRefused
from qcore.steps.guard import read_evidence, refuse_overwrite
from qcore.steps.matching import MeasuredFiles, load_parity, refuse_other_files

if TYPE_CHECKING:
    from qcore.report import EvaluationReport, GateDecision

NO_FILES = MeasuredFiles()


def gate(
    *,
    report: Path,
    out: Path,
    key: Path,
    policy: Path | None = None,
    package: Path | None = None,
    parity: Path | None = None,
    files: MeasuredFiles = NO_FILES,
    waivers: Sequence[Path] = (),
    now: datetime | None = None,
) -> "GateDecision":
    """Return the decision on `report`; `out` holds it signed with the private key file `key`.

    Args:
        report: evaluation report.
        out: where the evidence goes.
        key: private key file of the gate.
        policy: gate policy; None: the default one.
        package: what shall be published; its size is what a budget `package_bytes` limits. Without it the decision is a
            local one, which `publish` refuses.
        parity: parity report of the same model and split; needed where the policy limits parity.
        files: what the report has to be about.
        waivers: files of `waive`, made for exactly this decision.
        now: aware; the decision is of that time, waivers must hold then, and the report must not be too old. None: the
            time of the call.

    Raises:
        GateRefused: the report is missing, contradicts itself or is about other files, the policy asks for what was
            not measured, the package does not fit the report, or a waiver cannot be used.
        PackageError: the package is damaged.
        ConfigError: the policy is wrong.
        ReleaseError: the key cannot be used.
    """
    from qcore.config import load_config
    from qcore.files import write_atomic
    from qcore.gate import decide, default_policy
    from qcore.policy import GatePolicy
    from qcore.release.evidence import sign_decision
    from qcore.release.keys import load_signer
    from qcore.release.subject import package_of
    from qcore.release.waivers import overridden
    from qcore.waiver import format_time

    given = (policy, package, parity, files.model, files.baseline, files.champion)
    refuse_overwrite(out, report, key, *(path for path in given if path is not None), *waivers, data=files.data)
    loaded = load_report(report)
    refuse_other_files(loaded, files)
    chosen = load_config(policy, GatePolicy, "gate policy") if policy else default_policy(loaded)
    when = now or datetime.now(UTC)
    gated = None if package is None else package_of(package, loaded)
    weight = None if package is None else package.stat().st_size
    decision = decide(loaded, chosen, None if parity is None else load_parity(parity), when, weight)
    decision = replace(decision, package=gated)
    signed = [read_evidence(path, "waiver", "qcore gate waive") for path in waivers]
    decision = replace(overridden(decision, signed, when), decided=format_time(when))
    write_atomic(out, sign_decision(decision, load_signer(key)))
    return decision


def load_report(path: Path) -> "EvaluationReport":
    """Return the evaluation report in the JSON file `path`.

    Raises:
        GateRefused: the file is missing or is not a report.
    """
    import json

    from qcore.report_file import report_from_json

    try:
        return report_from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as e:
        raise GateRefused(f"evaluation report {path} does not exist; run `qcore evaluate`") from e
    except (OSError, ValueError, RecursionError) as e:
        raise GateRefused(f"{path} is not an evaluation report ({e}); run `qcore evaluate`") from e
