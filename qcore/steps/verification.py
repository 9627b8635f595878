"""One evidence file checked on its own, offline: is it genuine, is it about these files, would it be decided again?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcore.canonical import Json
from qcore.errors import GateRefused, QcoreError
from qcore.steps.guard import read_evidence

if TYPE_CHECKING:
    from securesystemslib.signer import Key

    from qcore.parity_report import ParityReport
    from qcore.policy import GatePolicy
    from qcore.report import EvaluationReport, GateDecision
    from qcore.waiver import Waiver

AGAIN = "decided again"
State = Literal["fits", "does not fit", "expired", "not checked"]
_Given = tuple[Path | None, Path | None, Path | None]
"""Policy, parity report and package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One question that was asked of the evidence, and what came of it in words."""

    what: str
    state: State
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was asked and answered; `decision` is None where the signature does not hold, since then nothing is known.

    `releasable`: genuine, a pass, and every waiver holds at the time of the check.
    """

    findings: tuple[Finding, ...]
    decision: "GateDecision | None"
    lapsed: str | None

    @property
    def genuine(self) -> bool:
        """Whether signature and all given files fit."""
        return self.decision is not None and all(f.state != "does not fit" for f in self.findings)

    @property
    def releasable(self) -> bool:
        """Whether the evidence allows a release now."""
        return self.genuine and self.decision is not None and self.decision.outcome == "pass" and self.lapsed is None

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        d = self.decision
        return {
            "genuine": self.genuine,
            "releasable": self.releasable,
            "outcome": None if d is None else d.outcome,
            "lapsed": self.lapsed,
            "findings": [asdict(f) for f in self.findings],
            "who_may_override": None if d is None else d.who_may_override(),
            "waivers": [] if d is None else [s.waiver.to_json() for s in d.waivers],
            "decision": None if d is None else d.to_json(),
        }


def verify_gate(
    *,
    evidence: Path,
    key: Path,
    root: Path | None = None,
    package: Path | None = None,
    model: Path | None = None,
    data: Path | None = None,
    split: str = "evaluation",
    policy: Path | None = None,
    report: Path | None = None,
    parity: Path | None = None,
    now: datetime | None = None,
) -> Verification:
    """Return what holds of `evidence`; every file that is given is held against it, and nothing is written.

    Args:
        evidence: what `gate` wrote.
        key: the gate's public key (PEM; a private key's public half counts), or the folder of a repository whose signed
            delegations name it.
        root: trusted root metadata of that repository.
        package: the package that devices download.
        model: ONNX file.
        data: data card.
        split: of the card.
        policy: gate policy.
        report: evaluation report; with it the decision is derived again, by `policy` or the default one.
        parity: parity report that was judged with it.
        now: aware, for waivers; None: the time of the call.

    Raises:
        GateRefused: the evidence cannot be read.
        ReleaseError: the key cannot be used.
    """
    from qcore.release.evidence import verify_evidence

    content = read_evidence(evidence)
    keys = _gate_keys(key, root, content)
    try:
        decision = verify_evidence(content, keys)
    except GateRefused as e:
        refused = Finding(what="evidence", state="does not fit", detail=str(e))
        return Verification(findings=(refused,), decision=None, lapsed=None)
    by = ", ".join(k.keyid[:12] for k in keys)
    findings = [
        Finding(what="signature", state="fits", detail=f"every byte vouched for by the gate (key {by})"),
        Finding(what="decision", state="fits", detail=f"{decision.outcome}, as its {_basis(decision)}"),
        _asked("package", package, lambda p: _package(p, decision)),
        _asked("model", model, lambda p: _digest(_file_digest(p), decision.model_sha256)),
        _asked("data", data, lambda p: _digest(_data_digest(p, split), decision.data_sha256)),
        _asked("policy", policy, lambda p: _policy(p, decision)),
        _asked("parity", parity, lambda p: _parity(p, decision)),
        _asked("report", report, lambda p: _report(p, decision)),
        _again(report, (policy, parity, package), decision),
    ]
    findings += [_waiver(signed.waiver, now or datetime.now(UTC)) for signed in decision.waivers]
    lapsed = next((f.detail for f in findings if f.state == "expired"), None)
    return Verification(findings=tuple(findings), decision=decision, lapsed=lapsed)


def _asked(what: str, path: Path | None, judge: Callable[[Path], str]) -> Finding:
    """Return the finding about one file that may have been given; what cannot be read does not fit."""
    if path is None:
        return Finding(what=what, state="not checked", detail=f"no --{what} given")
    try:
        return Finding(what=what, state="fits", detail=judge(path))
    except (QcoreError, OSError) as e:
        return Finding(what=what, state="does not fit", detail=str(e))


def _digest(found: str, wanted: str) -> str:
    if found != wanted:
        raise GateRefused(f"digest is {found[:12]}, the evidence is about {wanted[:12]}; pass the file that was judged")
    return f"sha256 {found[:12]}"


def _file_digest(path: Path) -> str:
    from qcore.files import sha256_file

    return sha256_file(path)


def _data_digest(path: Path, split: str) -> str:
    from qcore.data.dataset import open_dataset

    return open_dataset(path, split).sha256


def _package(path: Path, decision: "GateDecision") -> str:
    from qcore.release.subject import manifest_digest, opened_package

    if decision.package is None:
        raise GateRefused("the evidence names no package: it is a local decision, which cannot be published")
    with opened_package(path) as opened:
        _digest(opened.sha256, decision.package.sha256)
        _digest(manifest_digest(opened.manifest), decision.package.manifest_sha256)
        _digest(opened.manifest.model_sha256, decision.model_sha256)
    gated = decision.package
    return f"{gated.family} {gated.version}, sha256 {gated.sha256[:12]}, holds the model that was judged"


def _policy(path: Path, decision: "GateDecision") -> str:
    from qcore.waiver import NOBODY

    found = _load_policy(path)
    said = _digest(found.sha256, decision.policy_sha256)
    if decision.override != (NOBODY if found.waivers is None else found.waivers.override):
        raise GateRefused("the policy lets others override than the evidence says; gate again with this policy")
    return said


def _parity(path: Path, decision: "GateDecision") -> str:
    from qcore.steps.matching import load_parity

    found = load_parity(path).sha256
    if decision.parity_sha256 is None:
        raise GateRefused("the evidence was decided without a parity report; leave --parity out")
    return _digest(found, decision.parity_sha256)


def _report(path: Path, decision: "GateDecision") -> str:
    from qcore.steps.decision import load_report

    return _digest(load_report(path).sha256, decision.report_sha256)


def _again(report: Path | None, given: _Given, decision: "GateDecision") -> Finding:
    """Return the finding about deciding once more, from the report, policy, parity report and package that are given.

    Without a policy the default one is taken, if the decision was taken by that; without the package its size is the
    one that the evidence says.
    """
    policy, parity, _ = given
    if report is None or (decision.parity_sha256 is not None and parity is None):
        missing = "report" if report is None else "parity"
        return Finding(what=AGAIN, state="not checked", detail=f"no --{missing} given")
    if policy is None and not _by_default(report, decision):
        return Finding(what=AGAIN, state="not checked", detail="no --policy given, and it was not the default one")
    return _asked(AGAIN, report, lambda p: _same_again(p, given, decision))


def _by_default(report: Path, decision: "GateDecision") -> bool:
    from qcore.gate import default_policy
    from qcore.steps.decision import load_report

    try:
        return default_policy(load_report(report)).sha256 == decision.policy_sha256
    except GateRefused:
        return True  # the report does not fit, which is said where it is asked


def _same_again(report: Path, given: _Given, decision: "GateDecision") -> str:
    from qcore.gate import default_policy
    from qcore.steps.decision import load_report
    from qcore.steps.matching import load_parity

    policy, parity, package = given
    found = load_report(report)
    chosen = _load_policy(policy) if policy else default_policy(found)
    measured = (found, None if parity is None else load_parity(parity))
    again = _decided_again(measured, chosen, decision, None if package is None else package.stat().st_size)
    if again != decision:
        raise GateRefused(f"decided again it is {again.outcome} by other checks or values than the evidence says")
    return f"the same checks, {again.outcome}"


def _decided_again(
    measured: "tuple[EvaluationReport, ParityReport | None]",
    policy: "GatePolicy",
    decision: "GateDecision",
    weight: int | None,
) -> "GateDecision":
    """Return the decision derived anew, with the package and the waivers (verified before) of the one that is held.

    `weight` is the size of the package file, None where it is not at hand.
    """
    from qcore.gate import decide
    from qcore.report import outcome_of

    report, parity = measured
    fresh = replace(
        decide(report, policy, parity, _decided_at(report, decision), _weight(decision, weight)),
        package=decision.package,
        decided=decision.decided,
    )
    if fresh.binding != decision.binding or not decision.waivers:
        return fresh
    return replace(fresh, outcome=outcome_of(fresh.checks, decision.waived.keys()), waivers=decision.waivers)


def _weight(decision: "GateDecision", weight: int | None) -> int | None:
    """Return the size of the package that was judged; None for a local decision, which knows of none."""
    if decision.package is None:
        return None
    said = [round(c.observed) for c in decision.checks if c.name == "package_bytes"]
    return weight if weight is not None else said[0] if said else None


def _decided_at(report: "EvaluationReport", decision: "GateDecision") -> datetime | None:
    """Return when the decision was taken, as its age of the report says; None where the policy asks no age."""
    from qcore.report import TIME_FORM

    ages = [c.observed for c in decision.checks if c.name == "age_days"]
    measured = datetime.strptime(report.measured_at, TIME_FORM).replace(tzinfo=UTC)
    return measured + timedelta(seconds=round(ages[0] * 86400)) if ages else None


def _load_policy(path: Path) -> "GatePolicy":
    from qcore.config import load_config
    from qcore.policy import GatePolicy

    return load_config(path, GatePolicy, "gate policy")


def _basis(decision: "GateDecision") -> str:
    checks, waivers = len(decision.checks), len(decision.waivers)
    said = _counted(checks, "check") + (f" and {_counted(waivers, 'waiver')}" if waivers else "")
    return f"{said} {'says' if checks + waivers == 1 else 'say'}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _waiver(waiver: "Waiver", now: datetime) -> Finding:
    """Return the finding about one waiver, whose signature was verified with the evidence: does it hold at `now`?"""
    from qcore.waiver import refuse_out_of_time

    try:
        refuse_out_of_time(waiver, now)
    except GateRefused as e:
        return Finding(what="waiver", state="expired", detail=f"{waiver.sentence()}; {e}")
    return Finding(what="waiver", state="fits", detail=waiver.sentence())


def _gate_keys(path: Path, root: Path | None, evidence: bytes) -> "Sequence[Key]":
    """Return the keys that may sign: of a PEM file, or those that the repository in the folder `path` delegates to.

    The claimed family only chooses among keys that the repository's offline roles signed for.
    """
    from qcore.errors import ReleaseError
    from qcore.release.evidence import claimed_decision
    from qcore.release.keys import load_public_key
    from qcore.release.repository import trusted_gate_keys
    from qcore.release.store import DirectoryStore

    if not path.is_dir():
        return [load_public_key(path)]
    if root is None:
        raise ReleaseError(f"{path} is a repository, and its own root proves nothing; pass --root with the pinned one")
    try:
        package = claimed_decision(evidence).package
    except GateRefused:
        package = None
    family = None if package is None else package.family
    return trusted_gate_keys(DirectoryStore(folder=path), root.read_bytes(), family)
