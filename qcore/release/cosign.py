"""The co-signer's judgement: may the gate key sign this change of a `models-<family>` role?

One pure function over the signed old role, the proposed new one and the proofs. A release needs the gate key and the
publisher key, and the gate key signs only after this function returns; so no publisher, pipeline or bucket can bring an
unmeasured model to a device. Where the keys lie and who runs this is in `repository.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from securesystemslib.signer import Key
from tuf.api.metadata import TargetFile, Targets

from qcore.canonical import sha256_bytes
from qcore.errors import GateRefused
from qcore.release.approval import Approval, refuse_unapproved
from qcore.release.evidence import verify_evidence
from qcore.release.manifest import ReleaseManifest
from qcore.release.metadata import LIFETIMES
from qcore.release.provenance import verify_provenance
from qcore.release.subject import manifest_digest
from qcore.release.waivers import refuse_expired
from qcore.report import GateDecision

PACKAGE_SUFFIX = ".qpkg"
EVIDENCE_SUFFIX = ".evidence.json"
PROVENANCE_SUFFIX = ".provenance.json"
FLOOR = "floor.json"
"""Name of the target whose signed custom data hold the family's security floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What is known of one added package from its own bytes (digests recomputed), and what is signed about it."""

    sha256: str
    manifest: ReleaseManifest
    evidence: bytes
    provenance: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a proposal is held against, all of it from signed metadata but for the time.

    Args:
        gate_keys: whose signature counts on evidence.
        build_keys: whose signature counts on provenance.
        approval: what the offline keys approved for this family.
        served: digests of the models that channels serve now.
        now: aware; bounds expiry and the age of evidence, and waivers must hold then.
    """

    gate_keys: Sequence[Key]
    build_keys: Sequence[Key]
    approval: Approval
    served: Collection[str]
    now: datetime


def check_evidence(proof: Proof, gate_keys: Sequence[Key], now: datetime) -> GateDecision:
    """Return the decision if it is signed by the gate, a pass at `now` (aware), and about exactly this package.

    A pass that rests on waivers is one for as long as they hold.

    Raises:
        GateRefused: it is not; the message says which.
    """
    decision = verify_evidence(proof.evidence, gate_keys)
    if decision.outcome != "pass":
        open_checks = [c for c in decision.checks if c.outcome != "pass" and c.name not in decision.waived]
        failed = ", ".join(f"{c.name}: {c.outcome}" for c in open_checks)
        raise GateRefused(
            f"gate outcome is {decision.outcome} ({failed}); only a pass is released; mend the model. "
            f"{decision.override.sentence()}"
        )
    refuse_expired(decision, now)
    found = proof.manifest.model_sha256
    if found != decision.model_sha256:
        raise GateRefused(
            f"the package holds model {found[:12]}, a model that was not the one evaluated "
            f"({decision.model_sha256[:12]}); evaluate and gate the model that is packaged"
        )
    gated = decision.package
    if gated is None:
        raise GateRefused(
            "the evidence names no package: it is a local decision about a model; run "
            "`qcore gate --report R --package P` with the package that is to be published"
        )
    if gated.sha256 != proof.sha256:
        raise GateRefused(
            f"the evidence is about package {gated.sha256[:12]} ({gated.family} {gated.version}), this one is "
            f"{proof.sha256[:12]}; publish the package that was gated, or gate this one"
        )
    m = proof.manifest
    if (gated.manifest_sha256, gated.family, gated.version) != (manifest_digest(m), m.family, m.version):
        raise GateRefused("the evidence states another manifest than the package holds; run `qcore gate` again")
    return decision


def cosign(old: Targets, new: Targets, proofs: Mapping[str, Proof], terms: Terms) -> None:
    """Return if the gate may sign `new` in place of `old`.

    That is: packages with their own evidence (and provenance, where there is one), a higher security floor, or a pure
    refresh (version and expiry only).

    Args:
        old: the role as it is trusted now.
        new: the proposal; its version and expiry are already set.
        proofs: by target path of every added package.
        terms: what it is held against.

    Raises:
        GateRefused: with the first reason not to.
    """
    if new.version <= old.version or not terms.now < new.expires <= terms.now + LIFETIMES["models"] or new.delegations:
        raise _refusal(f"version {new.version}, expiry {new.expires} or delegations are not those of a new release")
    floors = {path for path in (*old.targets, *new.targets) if path.endswith(f"/{FLOOR}")}
    for path, target in old.targets.items():
        if path not in floors and new.targets.get(path) != target:
            raise _refusal(f"{path} is removed or changed; published targets stay as they are")
    _check_floor(old, new, floors)
    added = {path: target for path, target in new.targets.items() if path not in old.targets and path not in floors}
    packages = {path for path in added if path.endswith(PACKAGE_SUFFIX)}
    expected = packages | {evidence_path(path) for path in packages}
    expected |= {provenance_path(path) for path in packages & set(proofs) if proofs[path].provenance is not None}
    if set(added) != expected or set(proofs) != packages:
        raise _refusal(
            f"added {sorted(added)} with proofs of {sorted(proofs)}; each package needs exactly its evidence"
        )
    counter = max_counter(old)
    for path in sorted(packages, key=lambda p: _custom(added[p], "counter")):
        _check_package(path, added, proofs[path], terms)
        if _custom(added[path], "counter") <= counter:
            raise _refusal(f"{path}: counter {_custom(added[path], 'counter')} is not above {counter}")
        counter = _custom(added[path], "counter")


def floor_of(role: Targets) -> int:
    """Return the security floor that `role` holds: the lowest counter that devices take; 0 if it was never raised."""
    return max((_custom(t, "floor") for p, t in role.targets.items() if p.endswith(f"/{FLOOR}")), default=0)


def _check_floor(old: Targets, new: Targets, floors: Collection[str]) -> None:
    before = {p: t for p, t in old.targets.items() if p in floors}
    after = {p: t for p, t in new.targets.items() if p in floors}
    if before == after:
        return
    if len(floors) != 1 or len(after) != 1 or not floor_of(old) < floor_of(new) <= max_counter(old) + 1:
        raise _refusal(
            f"floor {floor_of(old)} becomes {floor_of(new)}; allowed: it only rises, to {max_counter(old) + 1} at most"
        )


def evidence_path(package: str) -> str:
    """Return the target path of the evidence that belongs to the package at `package`."""
    return package.removesuffix(PACKAGE_SUFFIX) + EVIDENCE_SUFFIX


def provenance_path(package: str) -> str:
    """Return the target path of the provenance that belongs to the package at `package`."""
    return package.removesuffix(PACKAGE_SUFFIX) + PROVENANCE_SUFFIX


def max_counter(role: Targets) -> int:
    """Return the highest release counter that `role` holds, 0 if none."""
    return max((_custom(t, "counter") for p, t in role.targets.items() if p.endswith(PACKAGE_SUFFIX)), default=0)


def _check_package(path: str, added: Mapping[str, TargetFile], proof: Proof, terms: Terms) -> None:
    m = proof.manifest
    if path != f"models/{m.family}/{m.version}{PACKAGE_SUFFIX}" or added[path].hashes != {"sha256": proof.sha256}:
        raise _refusal(f"{path} is not the package of {m.family} {m.version} that was checked")
    if added[evidence_path(path)].hashes != {"sha256": sha256_bytes(proof.evidence)}:
        raise _refusal(f"{evidence_path(path)} is not the evidence that was checked")
    decision = check_evidence(proof, terms.gate_keys, terms.now)
    refuse_unapproved(decision, terms.approval, terms.served, terms.now)
    if proof.provenance is not None:
        if added[provenance_path(path)].hashes != {"sha256": sha256_bytes(proof.provenance)}:
            raise _refusal(f"{provenance_path(path)} is not the provenance that was checked")
        built = verify_provenance(proof.provenance, terms.build_keys)
        if built.package_sha256 != proof.sha256:
            raise _refusal(f"the provenance is of package {built.package_sha256[:12]}, this is {proof.sha256[:12]}")
    custom = added[path].custom
    if custom.get("model_sha256") != decision.model_sha256 or custom.get("evidence") != evidence_path(path):
        raise _refusal(f"{path}: its custom data do not name the evaluated model and its evidence")
    if custom.get("compat") != m.compat.to_json() or custom.get("flash_bytes") != m.flash_bytes:
        raise _refusal(f"{path}: its custom data state other needs of a device than the package's manifest")


def _custom(target: TargetFile, name: str) -> int:
    value = target.custom.get(name) if isinstance(target.custom, dict) else None
    if type(value) is not int or value < 1:
        raise _refusal(f"{target.path}: custom {name} is {value!r}, expected a positive integer")
    return value


def _refusal(reason: str) -> GateRefused:
    return GateRefused(f"the gate does not co-sign: {reason}")
