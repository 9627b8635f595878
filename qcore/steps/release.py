"""Release on files: a package of what passed, and its publication."""

from pathlib import Path
from typing import TYPE_CHECKING

from qcore import __version__
from qcore.errors import GateRefused
from qcore.steps.guard import refuse_overwrite

if TYPE_CHECKING:
    from qcore.release.package import Package
    from qcore.release.repository import Release
    from qcore.report import GateDecision


def package(
    *,
    model: Path,
    data: Path,
    evidence: Path,
    out: Path,
    family: str,
    version: str,
    target: str | None = None,
    split: str = "evaluation",
) -> "Package":
    """Return the package written to `out`: the model, golden samples from `split`, and what a device must be.

    Raises:
        PackageError: `target` is not the profile that the model was quantized for; None takes the model's own.
        GateRefused: the evidence is about another model or is not a pass. Its signature is checked by `publish`.
    """
    import tempfile

    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.release.golden import compatibility, write_golden
    from qcore.release.manifest import Provenance
    from qcore.release.package import PackageSource, build_package

    refuse_overwrite(out, model, evidence, data=data)
    raw = read_model_bytes(model)
    decision = _claimed_pass(evidence, raw)
    with tempfile.TemporaryDirectory() as folder:
        golden = write_golden(raw, open_dataset(data, split), Path(folder) / "golden.npz")
        source = PackageSource(
            family=family,
            version=version,
            model=model,
            golden=golden.path,
            compat=compatibility(raw, target),
            inputs=golden.inputs,
            outputs=golden.outputs,
            golden_limits=golden.limits,
            provenance=Provenance(
                baseline_sha256=decision.baseline_sha256,
                data_sha256=decision.data_sha256,
                policy_sha256=decision.policy_sha256,
                qcore_version=__version__,
            ),
        )
        return build_package(source, out)


def publish(*, package: Path, evidence: Path, repository: Path, keys: Path, channel: str = "stable") -> "Release":
    """Return the release of `package`, signed into the repository folder `repository` with the key ring `keys`.

    Raises:
        GateRefused: the evidence is not signed by the gate, not a pass, or not about this package's model.
        PackageError: the package is damaged.
        ReleaseError: the repository or a key is missing, or the version exists with other bytes.
    """
    from datetime import UTC, datetime

    from qcore.release.keys import load_keys
    from qcore.release.repository import Submission, publish_release
    from qcore.release.store import DirectoryStore

    submission = Submission(package=package, evidence=read_evidence(evidence), channel=channel)
    return publish_release(DirectoryStore(folder=repository), submission, load_keys(keys), now=datetime.now(UTC))


def read_evidence(path: Path) -> bytes:
    """Return the bytes of a signed decision.

    Raises:
        GateRefused: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise GateRefused(f"evidence {path} cannot be read: {e.strerror}; run `qcore gate` first") from e


def _claimed_pass(evidence: Path, raw: bytes) -> "GateDecision":
    from qcore.canonical import sha256_bytes
    from qcore.release.evidence import claimed_decision

    decision = claimed_decision(read_evidence(evidence))
    if decision.model_sha256 != sha256_bytes(raw):
        raise GateRefused(
            f"the evidence is about model {decision.model_sha256[:12]}, this model is {sha256_bytes(raw)[:12]}; "
            "evaluate and gate the model that is to be shipped"
        )
    if decision.outcome != "pass":
        raise GateRefused(f"the gate's outcome is {decision.outcome}; only a pass is packaged; see `qcore gate`")
    return decision
