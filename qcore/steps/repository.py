"""The life of a repository, on files: approve, propose and co-sign, take back, renew keys, export; one call each."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import ConfigError, ReleaseError
from qcore.files import write_atomic
from qcore.steps.guard import read_evidence, refuse_overwrite

if TYPE_CHECKING:
    from qcore.release.approval import Against, Approval
    from qcore.release.bundle import Bundle
    from qcore.release.ceremony import OfflineDraft
    from qcore.release.proposal import Candidate
    from qcore.release.store import ObjectStore
    from qcore.release.withdrawal import Withdrawal

DRAFTED = "draft"
"""What a change that waits for offline signatures is called."""


def open_repository(repository: str | Path) -> "ObjectStore":
    """Return the store of the repository at `repository`: a folder, or `s3://bucket/prefix` as text."""
    from qcore.release.location import open_store

    return open_store(repository)


def approve(
    *,
    repository: str | Path,
    keys: Path,
    family: str,
    policy: Sequence[Path] = (),
    data: Sequence[Path] = (),
    split: str = "evaluation",
    evidence: Path | None = None,
    against: "Against" = "any",
    max_age_days: int | None = None,
    only: bool = False,
    draft: Path | None = None,
) -> "Approval":
    """Return what the offline keys approve for `family` now; the family is made known if it is new.

    Args:
        repository: the repository.
        keys: ring with the root keys; with `draft` only the pinned root and public keys are needed.
        family: name of the models.
        policy: gate policies to approve.
        data: data cards whose `split` is approved.
        split: of `data`.
        evidence: signed decision whose policy and data are approved too; look at it first.
        against: `served`: evaluations by these policies must compare with a model that a channel serves.
        max_age_days: how old evidence may be when it is published; None: as before, at first 30.
        only: what is named here counts in place of what was approved before.
        draft: where to write the change for offline signatures, instead of making it.

    Raises:
        ConfigError, DataError: a policy or card cannot be used.
        ReleaseError: the root keys are not here, or the repository does not verify.
    """
    from qcore.config import load_config
    from qcore.data.dataset import open_dataset
    from qcore.policy import GatePolicy
    from qcore.release.approval import Approval, Grant
    from qcore.release.ceremony import targets_draft
    from qcore.release.evidence import claimed_decision
    from qcore.release.keys import load_ring
    from qcore.release.metadata import load_current
    from qcore.release.repository import approve as approve_family
    from qcore.release.repository import approved_targets

    policies = {load_config(p, GatePolicy, "gate policy").sha256: against for p in policy}
    digests = [open_dataset(card, split).sha256 for card in data]
    if evidence is not None:
        claimed = claimed_decision(read_evidence(evidence))
        policies[claimed.policy_sha256] = against
        digests.append(claimed.data_sha256)
    age = None if max_age_days is None else timedelta(days=max_age_days)
    grant = Grant(family=family, approval=Approval(policies=policies, data=tuple(digests), max_age=age), only=only)
    store, ring, now = open_repository(repository), load_ring(keys), datetime.now(UTC)
    if draft is None:
        return approve_family(store, ring, grant, now=now)
    trusted = load_current(store, ring, now)
    targets = approved_targets(trusted, ring, grant, now)
    if targets is None:
        raise ReleaseError(f"all of this is approved for {family!r} already; nothing to sign")
    write_atomic(draft, targets_draft(trusted, targets).to_bytes())
    return grant.approval


def propose(
    *,
    repository: str | Path,
    keys: Path,
    out: Path,
    family: str | None = None,
    package: Path | None = None,
    evidence: Path | None = None,
    provenance: Path | None = None,
) -> None:
    """Write the next models role to `out`: with `package` released in it, or of `family` and only signed again.

    Raises:
        ConfigError: neither or both are named.
        PackageError, ReleaseError: as `qcore.release.proposal.propose`.
    """
    from qcore.release.keys import load_ring
    from qcore.release.proposal import propose as propose_role

    candidate = _candidate(package, evidence, provenance)
    if (candidate is None) == (family is None):
        raise ConfigError("a proposal is of a package with its evidence, or of a family alone (a refresh); pass one")
    name = family or (candidate.proof.manifest.family if candidate else "")
    refuse_overwrite(out, *filter(None, (package, evidence, provenance)))
    role = propose_role(open_repository(repository), load_ring(keys), name, candidate, now=datetime.now(UTC))
    write_atomic(out, role)


def cosign(
    *,
    repository: str | Path,
    keys: Path,
    out: Path,
    proposal: Path | None = None,
    package: Path | None = None,
    evidence: Path | None = None,
    provenance: Path | None = None,
) -> None:
    """Write a proposed role with the gate's signature to `out`; without `proposal` the co-signer proposes it itself.

    Args:
        repository: the repository; it is only read, unless the ring is a development ring and the family new.
        keys: folder with the gate's key and the pinned root; no other key is needed.
        out: where the signed role goes.
        proposal: what `propose` wrote.
        package: what it releases; None: a refresh.
        evidence: the signed decision about the package.
        provenance: signed provenance of the package, if the proposal holds one.

    Raises:
        GateRefused: the gate does not sign this.
        PackageError, ReleaseError: as `qcore.release.proposal.cosign_proposal`.
    """
    from qcore.release.keys import load_keys
    from qcore.release.proposal import cosign_proposal
    from qcore.release.proposal import propose as propose_role
    from qcore.release.repository import introduce

    candidate = _candidate(package, evidence, provenance)
    store, ring, now = open_repository(repository), load_keys(keys), datetime.now(UTC)
    if proposal is not None:
        role = _read(proposal, "proposal", "qcore repo propose")
    elif candidate is not None:
        if ring.root:
            introduce(store, ring, candidate, now=now)
        role = propose_role(store, ring, candidate.proof.manifest.family, candidate, now=now)
    else:
        raise ConfigError("nothing to co-sign: pass --proposal, or --package with --evidence")
    refuse_overwrite(out, *filter(None, (proposal, package, evidence, provenance)))
    write_atomic(out, cosign_proposal(store, ring, role, candidate, now=now))


def submit(*, repository: str | Path, keys: Path, file: Path, family: str | None = None) -> str:
    """Return what was published: a draft that the offline keys signed, or a co-signed refresh of `family`.

    Raises:
        ReleaseError: signatures are missing, or it was made on an older state.
    """
    from qcore.release.ceremony import read_draft, submit_draft
    from qcore.release.keys import load_keys
    from qcore.release.proposal import submit as submit_role

    data = _read(file, DRAFTED, "qcore repo draft")
    store, ring, now = open_repository(repository), load_keys(keys), datetime.now(UTC)
    if family is not None:
        return f"models-{family} version {submit_role(store, ring, data, family, now=now)}"
    trusted = submit_draft(store, ring, read_draft(data), now=now)
    return f"targets version {trusted.targets.version}, root version {trusted.root.version}"


def sign_draft(*, file: Path, keys: Sequence[Path]) -> "OfflineDraft":
    """Return the draft in `file` after the private key files `keys` signed it in place.

    Raises:
        ReleaseError: it is no draft, or asks for none of these keys.
    """
    from qcore.release.ceremony import read_draft, sign_draft
    from qcore.release.keys import load_signer

    draft = sign_draft(read_draft(_read(file, DRAFTED, "qcore repo draft")), [load_signer(k) for k in keys])
    write_atomic(file, draft.to_bytes())
    return draft


def draft_root(*, out: Path, root_keys: Sequence[Path], online: Sequence[str], families: Sequence[str] = ()) -> None:
    """Write the draft of a new repository's root and targets to `out`, from public keys alone.

    Args:
        out: where it goes.
        root_keys: public key files of the offline keys, three or more.
        online: `NAME=FILE` for gate, publisher, snapshot, timestamp and each `channel-NAME`.
        families: families that devices shall know from the start; `approve` says later what is approved for them.

    Raises:
        ReleaseError: a key is missing or there twice.
    """
    from qcore.release.approval import NOTHING
    from qcore.release.ceremony import FirstKeys, first_draft
    from qcore.release.keys import load_public_key

    pairs = [text.partition("=") for text in online]
    if odd := ["".join(p) for p in pairs if not (p[0] and p[2])]:
        raise ConfigError(f"--key is {odd[0]!r}; allowed: NAME=FILE such as gate=gate.pub")
    public = FirstKeys(
        offline=[load_public_key(p) for p in root_keys],
        online={name: load_public_key(Path(path)) for name, _, path in pairs},
        families=dict.fromkeys(families, NOTHING),
    )
    write_atomic(out, first_draft(public, now=datetime.now(UTC)).to_bytes())


def draft_next_root(*, out: Path, root_keys: Sequence[Path], repository: str | Path, keys: Path) -> None:
    """Write the draft of the root that follows the present one to `out`: `root_keys` replace the offline keys.

    Raises:
        ReleaseError: fewer than three keys, or the repository does not verify from the pinned root in `keys`.
    """
    from qcore.release.ceremony import root_draft
    from qcore.release.keys import load_public_key, load_ring
    from qcore.release.metadata import load_current

    now = datetime.now(UTC)
    trusted = load_current(open_repository(repository), load_ring(keys), now)
    write_atomic(out, root_draft(trusted, [load_public_key(p) for p in root_keys], now=now).to_bytes())


def init_signed(*, repository: str | Path, keys: Path, draft: Path) -> Path:
    """Return the pinned root of the repository that was made from `draft`, which the offline keys signed.

    Raises:
        ReleaseError: signatures or an online key are missing, or there is a repository.
    """
    from qcore.release.ceremony import init_from_draft, read_draft
    from qcore.release.keys import load_keys

    ring = load_keys(keys)
    signed = read_draft(_read(draft, DRAFTED, "qcore repo draft"))
    init_from_draft(open_repository(repository), ring, signed, now=datetime.now(UTC))
    return ring.pinned_root


def new_key(*, name: str, keys: Path) -> Path:
    """Return the public key file beside the new private key `name` in the folder `keys`; the public one may travel.

    Raises:
        ReleaseError: no role has such a key, it exists, or the folder cannot be written.
    """
    from qcore.release.keys import create_key, public_pem, refuse_unknown_name

    refuse_unknown_name(name)
    signer = create_key(keys / f"{name}.pem")
    write_atomic(keys / f"{name}.pub", public_pem(signer.public_key))
    return keys / f"{name}.pub"


def refresh(*, repository: str | Path, keys: Path) -> tuple[str, ...]:
    """Return the roles that were signed again because they near their expiry; raises as `repository.refresh`."""
    from qcore.release.keys import load_keys
    from qcore.release.repository import refresh as sign_again

    return sign_again(open_repository(repository), load_keys(keys), now=datetime.now(UTC))


def yank(
    *, repository: str | Path, keys: Path, target: str, channels: Sequence[str] = (), to: str | None = None
) -> "Withdrawal":
    """Return what channels offer after the release `target` was taken out of them; raises as `withdrawal.yank`."""
    from qcore.release.keys import load_keys
    from qcore.release.withdrawal import Yank
    from qcore.release.withdrawal import yank as take_out

    wish = Yank(release=target, channels=tuple(channels), to=to)
    return take_out(open_repository(repository), load_keys(keys), wish, now=datetime.now(UTC))


def revoke(*, repository: str | Path, keys: Path, target: str) -> "Withdrawal":
    """Return the state after no device takes the release `target` any more; raises as `withdrawal.revoke`."""
    from qcore.release.keys import load_keys
    from qcore.release.withdrawal import revoke as forbid

    return forbid(open_repository(repository), load_keys(keys), target, now=datetime.now(UTC))


def rotate(
    *,
    repository: str | Path,
    keys: Path,
    name: str,
    key: Path | None = None,
    finish: bool = False,
    compromised: bool = False,
) -> str:
    """Return what was done to put a new key in the place of `name`; interrupted, it goes on where it was.

    Args:
        repository: the repository.
        keys: ring with the root keys and those of the roles that are signed again; its files are renamed.
        name: gate, publisher, channel-NAME, snapshot, timestamp or root.
        key: the new key's file (`.pem` or `.signer.json`); None: one is made.
        finish: of snapshot and timestamp: the old key is no longer trusted, also by devices that come later.
        compromised: the old key is in foreign hands: no overlap, and evidence of an old gate key no longer counts.

    Raises:
        ReleaseError: a key is missing, or the repository does not verify.
    """
    from qcore.release import rotation
    from qcore.release.keys import ROOT_NAMES, adopt_key, fresh_key, load_keys, retire_key

    store, ring, now = open_repository(repository), load_keys(keys), datetime.now(UTC)
    if name == "root":
        fresh = [fresh_key(keys, each) for each in ROOT_NAMES]
        data = rotation.rotate_root(store, ring, fresh, now=now)
        write_atomic(ring.pinned_root, data)
        for each in ROOT_NAMES:
            adopt_key(keys, each)
            retire_key(keys, each)
        return "root: three new keys; the former ones are in retired/"
    if name not in rotation.IN_ROOT:
        signer = fresh_key(keys, name, key)
        renewal = rotation.Renewal(name=name, signer=signer, compromised=compromised)
        roles = rotation.rotate_delegated(store, ring, renewal, now=now)
        adopt_key(keys, name)
        retire_key(keys, name)
        return f"{name}: new key, signed again: {', '.join(roles) or 'nothing'}"
    if not finish:
        if f"{name}.old" not in ring.signers:
            fresh_key(keys, name, key)
            adopt_key(keys, name)
        rotation.rotate_top(store, load_keys(keys), name, now=now)
    if finish or compromised:
        rotation.drop_old(store, load_keys(keys), name, now=now)
        retire_key(keys, name)
        return f"{name}: only the new key is trusted"
    return f"{name}: old and new key are trusted; give services the new one, then run it again with --finish"


def export(
    *,
    repository: str | Path,
    keys: Path,
    out: Path,
    family: str | None = None,
    channel: str | None = None,
    days: int | None = None,
) -> "Bundle":
    """Return the bundle written to `out`: what channels offer, for devices without a network.

    Args:
        repository: the repository.
        keys: folder with the pinned root; with `days` also the keys of snapshot, timestamp and channels.
        out: the bundle file.
        family: only this one.
        channel: only this one.
        days: sign the present state so that it counts for so long; None: as it is signed.

    Raises:
        ReleaseError: nothing is offered, the repository does not verify, or a key is missing.
    """
    from qcore.release.bundle import Wanted, export_bundle, fresh_for
    from qcore.release.keys import load_ring

    store, ring, now = open_repository(repository), load_ring(keys), datetime.now(UTC)
    if days is not None:
        fresh_for(store, ring, timedelta(days=days), now=now)
    return export_bundle(store, ring, out, Wanted(family=family, channel=channel), now=now)


def _candidate(package: Path | None, evidence: Path | None, provenance: Path | None) -> "Candidate | None":
    from qcore.release.proposal import Submission, inspect

    if package is None and evidence is None:
        return None
    if package is None or evidence is None:
        raise ConfigError("a package and its evidence belong together; pass --package and --evidence")
    signed = None if provenance is None else read_evidence(provenance, "provenance", "qcore provenance")
    return inspect(Submission(package=package, evidence=read_evidence(evidence), provenance=signed))


def _read(path: Path, what: str, verb: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ReleaseError(f"{what} {path} cannot be read: {e.strerror}; run `{verb}` first") from e
