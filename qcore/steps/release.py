"""Release on files: a package, and its publication once the gate has passed it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qcore import __version__
from qcore.steps.guard import read_evidence, refuse_overwrite

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.release.golden import GoldenFile
    from qcore.release.manifest import Compatibility
    from qcore.release.package import Package
    from qcore.release.provenance import Build
    from qcore.release.repository import Release


def package(
    *,
    model: Path,
    data: Path,
    out: Path,
    family: str,
    version: str,
    target: str | None = None,
    split: str = "evaluation",
    memory_mb: int = 0,
    control_flow: bool = False,
) -> "Package":
    """Return the package written to `out`: the model, golden samples from `split`, and what a device must be.

    It says nothing about how good the model is: `gate` decides about the package, and `publish` asks for that decision.
    The same arguments, files and installed versions give the same bytes.

    Args:
        model: the candidate.
        data: data card.
        out: where the package goes.
        family: name of the model on devices.
        version: of the release.
        target: profile name or file; None: the one that the model was quantized for.
        split: of the card.
        memory_mb: MiB that a process needs that runs the model, where somebody measured it; 0: nobody did.
        control_flow: declare that the model may hold If, Loop or Scan; devices that do not allow it refuse it then.

    Raises:
        PackageError: `target` is not the profile that the model was quantized for.
        ModelError: the model is not one that devices may load.
    """
    import tempfile

    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.release.admission import Allowance, admit
    from qcore.release.golden import compatibility, write_golden
    from qcore.release.manifest import Provenance
    from qcore.release.package import PackageSource, build_package

    refuse_overwrite(out, model, data=data)
    raw, dataset = read_model_bytes(model), open_dataset(data, split)
    admit(raw, str(model), Allowance(control_flow=control_flow))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        copied = folder / "model.onnx"  # golden answers and packaged bytes are of one reading
        copied.write_bytes(raw)
        golden = write_golden(raw, dataset, folder / "golden.npz")
        compat = compatibility(raw, target, memory_mb=memory_mb, control_flow=control_flow)
        limits = golden.limits(compat.providers)
        written = _described(folder, raw, dataset, (family, version, golden, compat))
        source = PackageSource(
            family=family,
            version=version,
            model=copied,
            golden=golden.path,
            card=written["card"],
            sbom=written["sbom"],
            labels=written.get("labels"),
            compat=compat,
            inputs=golden.inputs,
            outputs=golden.outputs,
            golden_limits=limits,
            provenance=Provenance(data_sha256=dataset.sha256, qcore_version=__version__),
        )
        return build_package(source, out)


def _described(
    folder: Path, raw: bytes, dataset: "Dataset", named: "tuple[str, str, GoldenFile, Compatibility]"
) -> dict[str, Path]:
    """Return model card, parts list and, where the card names classes, labels, written into `folder`."""
    from qcore.canonical import canonical_json
    from qcore.data.images import class_folders
    from qcore.release.card import render_card
    from qcore.release.facts import PackageFacts, installed_tools, model_facts
    from qcore.release.sbom import render_sbom

    family, version, golden, compat = named
    digest, history = model_facts(raw)
    facts = PackageFacts(
        family=family,
        version=version,
        model_sha256=digest,
        model_bytes=len(raw),
        history=history,
        data_sha256=dataset.sha256,
        task=dataset.card.task,
        compat=compat,
        golden=golden.limits(compat.providers),
        inputs=golden.inputs,
        outputs=golden.outputs,
        tools=installed_tools(),
    )
    files = {"card": render_card(facts).encode(), "sbom": canonical_json(render_sbom(facts)) + b"\n"}
    if classes := class_folders(dataset.card, dataset.folder):
        files["labels"] = canonical_json(classes) + b"\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


def publish(
    *,
    package: Path,
    evidence: Path,
    repository: str | Path,
    keys: Path,
    channel: str = "stable",
    provenance: Path | None = None,
    cosigned: Path | None = None,
) -> "Release":
    """Return the release of `package`, signed into the repository with the key ring `keys`.

    Args:
        package: the .qpkg file.
        evidence: the gate's signed decision.
        repository: a folder, or `s3://bucket/prefix` as text.
        keys: folder of the keys; the gate's is among them unless `cosigned` is given.
        channel: the channel that shall point at the release.
        provenance: signed provenance of the package, published beside the evidence.
        cosigned: the models role that `cosign` signed.

    Args:
        package: the .qpkg file.
        evidence: the gate's signed decision.
        repository: folder of the repository.
        keys: folder of the keys; the gate's is among them unless `cosigned` is given.
        channel: the channel that shall point at the release.
        provenance: signed provenance of the package, published beside the evidence.
        cosigned: the models role that `cosign` signed.

    Raises:
        GateRefused: the evidence is not signed by the gate, not a pass, not about exactly this package, or rests on a
            waiver that expired.
        PackageError: the package is damaged.
        ReleaseError: the repository or a key is missing, or the version exists with other bytes.
    """
    from datetime import UTC, datetime

    from qcore.release.keys import load_keys
    from qcore.release.location import open_store
    from qcore.release.proposal import Submission
    from qcore.release.repository import publish_release

    submission = Submission(
        package=package,
        evidence=read_evidence(evidence),
        channel=channel,
        provenance=None if provenance is None else read_evidence(provenance, "provenance", "qcore provenance"),
        cosigned=None if cosigned is None else read_evidence(cosigned, "co-signed role", "qcore repo cosign"),
    )
    return publish_release(open_store(repository), submission, load_keys(keys), now=datetime.now(UTC))


def provenance(
    *,
    package: Path,
    out: Path,
    key: Path,
    builder: str,
    parameters: Mapping[str, str | int],
    inputs: Mapping[str, Path],
    invocation: str = "",
) -> "Build":
    """Return the provenance of `package`, signed into `out` with the private key file `key`.

    Args:
        package: the .qpkg file.
        out: where the signed statement goes.
        key: the gate's or the publisher's; publishing takes no other.
        builder: URI of what built it.
        parameters: recipe, target, seed ... by name.
        inputs: the files that it was built from, by name; their digests are stated.
        invocation: the run.

    Raises:
        PackageError: it is not a package that we made.
        ReleaseError: the key cannot be used.
        OSError: an input cannot be read.
    """
    from qcore.files import sha256_file, write_atomic
    from qcore.release.keys import load_signer
    from qcore.release.provenance import Build, sign_provenance
    from qcore.release.subject import opened_package

    refuse_overwrite(out, package, key, *inputs.values())
    with opened_package(package) as opened:
        build = Build(
            package_sha256=opened.sha256,
            builder=builder,
            parameters=dict(parameters),
            inputs={name: sha256_file(path) for name, path in inputs.items()},
            qcore_version=__version__,
            invocation=invocation,
        )
    write_atomic(out, sign_provenance(build, load_signer(key)))
    return build
