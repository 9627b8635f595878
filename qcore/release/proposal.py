"""A change of a `models-<family>` role on its way: proposed by the publisher, signed by the co-signer, submitted.

Gate key and publisher key may lie on machines that do not know each other; what travels is the role itself, as a TUF
metadata file, to which each adds its signature. The co-signer does not believe the proposal: it reads package and
evidence itself and asks `cosign.py`. Whoever holds both keys needs none of this (`publish_release`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets

from qcore.errors import ReleaseError
from qcore.release.cosign import (
    FLOOR,
    Proof,
    Terms,
    cosign,
    evidence_path,
    floor_of,
    max_counter,
    provenance_path,
)
from qcore.release.keys import KeyRing
from qcore.release.metadata import Change, Draft, Trusted, lifetime, load_current, transact, utc
from qcore.release.pointer import served_models
from qcore.release.roles import (
    approval_of,
    channels,
    gate_keys,
    keys_of,
    known_family,
    next_version,
    object_key,
    target_of,
)
from qcore.release.store import ObjectStore
from qcore.release.subject import opened_package

MAX_PROPOSAL_BYTES = 5_000_000
"""What clients read of a targets role at most."""
MAX_PROBES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What is to be published: a package file, its evidence, and the channel that shall point at it.

    `provenance` is signed provenance of the package, if there is any. `cosigned` is the models role with the gate's
    signature, from a co-signer elsewhere; None where the ring holds the gate's key.
    """

    package: Path
    evidence: bytes
    channel: str = "stable"
    provenance: bytes | None = None
    cosigned: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A submission after its bytes were read once and checked."""

    package: bytes
    proof: Proof
    channel: str
    cosigned: bytes | None

    @property
    def path(self) -> str:
        """The target path of the package."""
        return f"models/{self.proof.manifest.family}/{self.proof.manifest.version}.qpkg"


def inspect(submission: Submission) -> Candidate:
    """Return the candidate that the package file of `submission` is.

    Raises:
        PackageError: it is not a package that we made.
    """
    with opened_package(submission.package) as opened:
        proof = Proof(
            sha256=opened.sha256,
            manifest=opened.manifest,
            evidence=submission.evidence,
            provenance=submission.provenance,
        )
        return Candidate(package=opened.data, proof=proof, channel=submission.channel, cosigned=submission.cosigned)


def terms_of(trusted: Trusted, family: str, now: datetime) -> Terms:
    """Return what a proposal for `family` is held against.

    Raises:
        ReleaseError: no such family.
    """
    name = f"models-{family}"
    role = known_family(trusted, family)
    return Terms(
        gate_keys=gate_keys(trusted, name),
        build_keys=keys_of(trusted, name),
        approval=approval_of(role),
        served=served_models(channels(trusted), trusted.delegated.get(name, Targets()), family),
        now=now,
    )


def with_release(old: Targets, candidate: Candidate, now: datetime) -> Targets:
    """Return the next models role, in which the candidate is released."""
    proof, path = candidate.proof, candidate.path
    new = next_version(old, now + lifetime("models"))
    custom = {
        "counter": max(max_counter(old), floor_of(old) - 1) + 1,
        "model_sha256": proof.manifest.model_sha256,
        "evidence": evidence_path(path),
        "compat": proof.manifest.compat.to_json(),
        "flash_bytes": proof.manifest.flash_bytes,
        "floor": floor_of(old),
    }
    if proof.provenance is not None:
        custom["provenance"] = provenance_path(path)
        new.targets[provenance_path(path)] = target_of(provenance_path(path), proof.provenance, None)
    new.targets[path] = target_of(path, candidate.package, custom)
    new.targets[evidence_path(path)] = target_of(evidence_path(path), proof.evidence, None)
    return new


def with_floor(old: Targets, family: str, floor: int, now: datetime) -> tuple[Targets, bytes]:
    """Return the next models role, whose security floor is `floor`, and the content of the target that says so."""
    new = next_version(old, now + lifetime("models"))
    path, content = f"models/{family}/{FLOOR}", b'{"floor":%d}\n' % floor
    new.targets[path] = target_of(path, content, {"floor": floor})
    return new, content


def propose(store: ObjectStore, keys: KeyRing, family: str, candidate: Candidate | None, *, now: datetime) -> bytes:
    """Return the next models role of `family` as a file, signed by the publisher if its key is held.

    Args:
        store: the repository; it is only read.
        keys: ring with the pinned root.
        family: whose role.
        candidate: what shall be released; None: nothing, a refresh.
        now: aware.

    Raises:
        ReleaseError: the repository does not verify, or does not know the family.
    """
    now = utc(now)
    trusted = load_current(store, keys, now)
    known_family(trusted, family)
    name = f"models-{family}"
    old = trusted.delegated.get(name, Targets())
    if candidate is not None and candidate.path in old.targets:
        raise ReleaseError(f"{candidate.path} is published already; `qcore publish` moves channels to it")
    new = next_version(old, now + lifetime("models")) if candidate is None else with_release(old, candidate, now)
    new.version = _free_version(store, name, new.version)
    metadata = Metadata[Targets](new)
    if "publisher" in keys.signers:
        metadata.sign(keys.signer("publisher"))
    return metadata.to_bytes()


def cosign_proposal(
    store: ObjectStore, keys: KeyRing, proposal: bytes, candidate: Candidate | None, *, now: datetime
) -> bytes:
    """Return `proposal` with the gate's signature; the ring needs the gate's key, the pinned root, and nothing else.

    Args:
        store: the repository; it is only read.
        keys: ring with the gate's key and the pinned root.
        proposal: what `propose` returned.
        candidate: the package that it adds, read by the co-signer itself; None: it adds none.
        now: aware.

    Raises:
        GateRefused: the gate does not sign it.
        ReleaseError: it is not a proposal, the repository does not verify, or the key is missing.
    """
    now = utc(now)
    trusted = load_current(store, keys, now)
    metadata = read_proposal(proposal)
    family = _family_of(metadata.signed, trusted, candidate)
    proofs: Mapping[str, Proof] = {} if candidate is None else {candidate.path: candidate.proof}
    old = trusted.delegated.get(f"models-{family}", Targets())
    cosign(old, metadata.signed, proofs, terms_of(trusted, family, now))
    metadata.sign(keys.signer("gate"), append=True)
    return metadata.to_bytes()


def submit(store: ObjectStore, keys: KeyRing, cosigned: bytes, family: str, *, now: datetime) -> int:
    """Return the version of the models role after `cosigned`, a refresh that was signed elsewhere, is committed.

    Raises:
        ReleaseError: it changes more than version and expiry, is made on an older state, or lacks signatures.
    """
    now = utc(now)
    metadata = read_proposal(cosigned)
    name = f"models-{family}"

    def decide(trusted: Trusted) -> Change | None:
        known_family(trusted, family)
        old = trusted.delegated.get(name, Targets())
        if old == metadata.signed:
            return None
        if old.targets != metadata.signed.targets or metadata.signed.version <= old.version:
            raise ReleaseError(f"{name}: this is not a refresh of version {old.version}; propose it again")
        draft = Draft(role=metadata.signed, signers=_publisher(keys), signed=metadata)
        return Change(drafts={name: draft}, record={"action": "refresh", "family": family})

    return transact(store, keys, now, decide).delegated[name].version


def cosigned_draft(trusted: Trusted, candidate: Candidate, keys: KeyRing, now: datetime) -> Draft:
    """Return the draft of the role that the co-signer signed, if it is exactly the release of `candidate`.

    Raises:
        ReleaseError: it is another change, or was made on an older state.
    """
    metadata = read_proposal(candidate.cosigned or b"")
    name = f"models-{candidate.proof.manifest.family}"
    old = trusted.delegated.get(name, Targets())
    expected = with_release(old, candidate, now)
    if metadata.signed.targets != expected.targets or metadata.signed.version <= old.version:
        raise ReleaseError(
            f"the co-signed role is not version {old.version} of {name} with {candidate.path} added; run `qcore repo "
            "cosign` again on the present state"
        )
    return Draft(role=metadata.signed, signers=_publisher(keys), signed=metadata)


def read_proposal(data: bytes) -> Metadata[Targets]:
    """Return the role in the file `data`, **whoever signed it**.

    Raises:
        ReleaseError: it is not a targets role.
    """
    if len(data) > MAX_PROPOSAL_BYTES:
        raise ReleaseError(f"proposal of {len(data)} bytes; allowed: {MAX_PROPOSAL_BYTES}; pass a role file")
    try:
        metadata = Metadata[Targets].from_bytes(data)
    except (RepositoryError, ValueError) as e:
        raise ReleaseError(f"this is not a proposed role ({e}); pass the file that `qcore repo propose` wrote") from e
    if not isinstance(metadata.signed, Targets):
        raise ReleaseError(f"this is a role of type {metadata.signed.type}; pass a file of `qcore repo propose`")
    return metadata


def objects_of(candidate: Candidate, role: Targets) -> Mapping[str, bytes]:
    """Return the objects of `candidate` by store key, as `role` names them."""
    path, proof = candidate.path, candidate.proof
    known = {path: candidate.package, evidence_path(path): proof.evidence}
    if proof.provenance is not None:
        known[provenance_path(path)] = proof.provenance
    return {object_key(role.targets[p]): data for p, data in known.items()}


def _publisher(keys: KeyRing) -> list[Signer]:
    return [keys.signers["publisher"]] if "publisher" in keys.signers else []


def _family_of(role: Targets, trusted: Trusted, candidate: Candidate | None) -> str:
    """Return whose role this proposal is: that of the candidate, or the one family with the same targets."""
    if candidate is not None:
        return candidate.proof.manifest.family
    same = [n for n, r in trusted.delegated.items() if n.startswith("models-") and set(r.targets) == set(role.targets)]
    if len(same) != 1:
        raise ReleaseError("the proposal is a refresh of no known family; a release needs --package and --evidence")
    return same[0].removeprefix("models-")


def _free_version(store: ObjectStore, name: str, first: int) -> int:
    for version in range(first, first + MAX_PROBES):
        if store.get(f"metadata/{version}.{name}.json") is None:
            return version
    raise ReleaseError(f"{name}: versions from {first} on are all taken; clean metadata/ of orphans, propose again")
