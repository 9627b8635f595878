"""The story of one published release, told again from the repository alone: what is it, who measured and signed it?"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json, sha256_bytes
from qcore.errors import GateRefused, QcoreError, ReleaseError
from qcore.steps.repository import open_repository
from qcore.steps.verification import Finding

if TYPE_CHECKING:
    from tuf.api.metadata import Targets

    from qcore.release.cosign import Proof
    from qcore.release.metadata import Trusted
    from qcore.release.records import AuditRecord
    from qcore.release.store import ObjectStore
    from qcore.report import GateDecision


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was asked about one release, and what was found; `sound` if nothing contradicts."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether everything that was checked fits."""
        return all(f.state != "does not fit" for f in self.findings)

    def to_json(self) -> Json:
        """Return the JSON form for `--json`."""
        return {"target": self.target, "sound": self.sound, "findings": [asdict(f) for f in self.findings]}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One release under audit, all of it read from the store."""

    store: "ObjectStore"
    trusted: "Trusted"
    role: str
    target: str
    proof: "Proof"
    records: "tuple[AuditRecord, ...]"

    @property
    def models(self) -> "Targets":
        """The role that holds the release."""
        return self.trusted.delegated[self.role]


def audit(
    *, repository: str | Path, root: Path, target: str, tracking: str | None = None, now: datetime | None = None
) -> Audit:
    """Return what holds of the release `target`; nothing is written.

    Args:
        repository: the repository.
        root: trusted root metadata; the store's own root proves nothing.
        target: target path, `models/FAMILY/VERSION.qpkg`.
        tracking: MLflow URI; the run is only a cross-check, it proves nothing. None: not asked.
        now: aware; None: the time of the call.

    Raises:
        ReleaseError: the metadata do not verify, or hold no such release.
    """
    from qcore.release.metadata import load_trusted

    store = open_repository(repository)
    try:
        pinned = root.read_bytes()
    except OSError as e:
        raise ReleaseError(f"root {root} cannot be read: {e.strerror}; pass the pinned root.json") from e
    trusted = load_trusted(store, pinned)
    role = f"models-{target.split('/')[1] if target.count('/') == 2 else ''}"
    models = trusted.delegated[role].targets if role in trusted.delegated else {}
    if target not in models or not target.endswith(".qpkg"):
        known = sorted(p for r in trusted.delegated.values() for p in r.targets if p.endswith(".qpkg"))
        raise ReleaseError(f"{target} is not published here; published: {', '.join(known) or 'nothing'}")
    findings = [_finding("metadata", lambda: f"verified from the pinned root; timestamp {trusted.timestamp.version}")]
    findings.append(_finding("bytes", lambda: _bytes(store, trusted.delegated[role], target)))
    records: tuple[AuditRecord, ...] = ()
    try:
        records = _records(store, trusted)
        findings.append(Finding(what="audit records", state="fits", detail=f"{len(records)}, the chain is whole"))
    except ReleaseError as e:
        findings.append(Finding(what="audit records", state="does not fit", detail=str(e)))
    if findings[1].state == "fits":
        proof = _proof(store, trusted, target)
        case = _Case(store=store, trusted=trusted, role=role, target=target, proof=proof, records=records)
        findings += _about(case, now or datetime.now(UTC))
        findings.append(_tracked(case, tracking))
    return Audit(target=target, findings=tuple(findings))


def _about(case: _Case, now: datetime) -> list[Finding]:
    return [
        _finding("evidence", lambda: _evidence(case)),
        _finding("approved", lambda: _approved(case)),
        _finding("provenance", lambda: _provenance(case)),
        _finding("signed by", lambda: _signed_by(case)),
        _finding("offered", lambda: _offered(case, now)),
    ]


def _finding(what: str, ask: Callable[[], str | None]) -> Finding:
    """Return the answer of `ask` as a finding; None: there is nothing to check."""
    try:
        detail = ask()
    except QcoreError as e:
        return Finding(what=what, state="does not fit", detail=str(e))
    return Finding(what=what, state="not checked" if detail is None else "fits", detail=detail or "there is none")


def _bytes(store: "ObjectStore", models: "Targets", target: str) -> str:
    from tuf.api.exceptions import LengthOrHashMismatchError

    from qcore.release.cosign import evidence_path, provenance_path
    from qcore.release.roles import object_key

    for path in (target, evidence_path(target), provenance_path(target)):
        if path in models.targets:
            found = store.get(object_key(models.targets[path]))
            try:
                models.targets[path].verify_length_and_hashes(b"" if found is None else found.data)
            except LengthOrHashMismatchError as e:
                raise ReleaseError(f"{path}: the stored bytes are not those that were signed ({e})") from e
    return f"sha256 {models.targets[target].hashes['sha256']}, {models.targets[target].length} bytes"


def _records(store: "ObjectStore", trusted: "Trusted") -> "tuple[AuditRecord, ...]":
    from qcore.release.records import AUDIT, read_records

    return read_records(store, trusted.snapshot.unrecognized_fields.get(AUDIT))


def _proof(store: "ObjectStore", trusted: "Trusted", target: str) -> "Proof":
    """Return the package as it was published, opened again."""
    import tempfile

    from qcore.release.cosign import evidence_path, provenance_path
    from qcore.release.proposal import Submission, inspect
    from qcore.release.roles import object_key

    models = trusted.delegated[f"models-{target.split('/')[1]}"].targets
    read = {
        p: found.data
        for p in (target, evidence_path(target), provenance_path(target))
        if p in models and (found := store.get(object_key(models[p]))) is not None
    }
    with tempfile.TemporaryDirectory(prefix="qcore-audit-") as folder:
        package = Path(folder) / "package.qpkg"
        package.write_bytes(read[target])
        provenance = read.get(provenance_path(target))
        submission = Submission(package=package, evidence=read[evidence_path(target)], provenance=provenance)
        return inspect(submission).proof


def _published(case: _Case) -> "AuditRecord | None":
    """Return the record of the first publication."""
    found = [r for r in case.records if r.action == "publish" and r.said.get("release") == case.target]
    return found[-1] if found else None


def _decision(case: _Case) -> "GateDecision":
    from qcore.release.cosign import check_evidence
    from qcore.release.roles import gate_keys, known_family, retired_gate_keys
    from qcore.waiver import parse_time

    record = _published(case)
    at = datetime.now(UTC) if record is None else parse_time(record.time)
    family = case.role.removeprefix("models-")
    keys = [*gate_keys(case.trusted, case.role), *retired_gate_keys(known_family(case.trusted, family))]
    return check_evidence(case.proof, keys, at)


def _evidence(case: _Case) -> str:
    d = _decision(case)
    waived = f", {len(d.waivers)} waived" if d.waivers else ""
    numbers = ", ".join(f"{c.name} {c.observed:.4g} (limit {c.limit:.4g})" for c in d.checks)
    return f"{d.outcome}{waived} on {d.n} samples, decided {d.decided or 'unknown when'}: {numbers}"


def _approved(case: _Case) -> str:
    from qcore.release.roles import approval_of, known_family

    d = _decision(case)
    approval = approval_of(known_family(case.trusted, case.role.removeprefix("models-")))
    for what, digest, allowed in (
        ("policy", d.policy_sha256, tuple(approval.policies)),
        ("evaluation data", d.data_sha256, approval.data),
    ):
        if digest not in allowed:
            raise GateRefused(f"{what} {digest[:12]} is not, or no longer, approved for this family")
    return f"policy {d.policy_sha256[:12]} and data {d.data_sha256[:12]}, by the offline keys"


def _provenance(case: _Case) -> str | None:
    from qcore.release.provenance import verify_provenance
    from qcore.release.roles import keys_of

    if case.proof.provenance is None:
        return None
    built = verify_provenance(case.proof.provenance, keys_of(case.trusted, case.role))
    if built.package_sha256 != case.proof.sha256:
        raise GateRefused(f"it is of package {built.package_sha256[:12]}, this is {case.proof.sha256[:12]}")
    return f"built by {built.builder} from {', '.join(f'{n} {d[:12]}' for n, d in sorted(built.inputs.items()))}"


def _signed_by(case: _Case) -> str:
    from qcore.release.roles import GATE_KEYIDS

    record = _published(case)
    if record is None:
        raise ReleaseError("no audit record says when this was published; who wrote to this repository?")
    about = (record.said.get("package"), record.said.get("evidence"))
    if about != (case.proof.sha256, sha256_bytes(case.proof.evidence)):
        raise ReleaseError("the audit record of the publication names other bytes")
    gates = case.trusted.targets.get_delegated_role(case.role).unrecognized_fields.get(GATE_KEYIDS, [])
    signed = record.signed_by.get(case.role, [])
    names = ", ".join(f"{'gate' if k in gates else 'publisher or former key'} {k[:8]}" for k in signed)
    return f"{names or 'keys before this record'}, at {record.time}, for channel {record.said.get('channel')}"


def _offered(case: _Case, now: datetime) -> str:
    from qcore.release.cosign import floor_of
    from qcore.release.pointer import pointer_path, read_pointer
    from qcore.release.roles import channels, custom_of

    family, floor = case.role.removeprefix("models-"), floor_of(case.models)
    if custom_of(case.models.targets[case.target])["counter"] < floor:
        return f"revoked: devices take nothing below {floor}"
    said = []
    for name, role in channels(case.trusted).items():
        channel = name.removeprefix("channel-")
        pointer = read_pointer(role, pointer_path(channel, family))
        if pointer is not None and case.target in pointer.yanked:
            said.append(f"yanked from {channel}")
        elif pointer is not None and pointer.release == case.target:
            said.append(f"offered by {channel}" + (", which expired" if role.is_expired(now) else ""))
    return ", ".join(said) or "by no channel"


def _tracked(case: _Case, tracking: str | None) -> Finding:
    """Return whether the MLflow run says what the evidence says; a run that is edited or gone is a finding, no more."""
    if tracking is None:
        return Finding(what="MLflow run", state="not checked", detail="pass --tracking to compare")
    import os

    from qcore.tracking.replay import open_sink
    from qcore.tracking.tracker import DEFAULT_EXPERIMENT

    m = case.proof.manifest
    try:
        sink = open_sink(tracking, os.environ, budget_s=30)
        name = os.environ.get("QCORE_EXPERIMENT") or DEFAULT_EXPERIMENT
        run = sink.find_run(sink.experiment(name), {"qcore.release": f"{m.family} {m.version}"})
        tags: Mapping[str, str] = {} if run is None else sink.run_facts(run).tags
        d = _decision(case)
    except QcoreError as e:
        return Finding(what="MLflow run", state="not checked", detail=str(e))
    if run is None:
        return Finding(what="MLflow run", state="not checked", detail=f"no run is tagged {m.family} {m.version}")
    said = {
        "model.sha256": d.model_sha256,
        "baseline.sha256": d.baseline_sha256,
        "data.sha256": d.data_sha256,
        "qcore.gate": d.outcome,
    }
    odd = [f"{k} is {tags.get(k, 'absent')[:12]}, evidence {v[:12]}" for k, v in said.items() if tags.get(k) != v]
    if odd:
        return Finding(what="MLflow run", state="does not fit", detail=f"run {run}: {'; '.join(odd)}: it was edited")
    return Finding(what="MLflow run", state="fits", detail=f"run {run} names the same model, data and outcome")
