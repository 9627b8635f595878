"""The package as the gate sees it: opened as a device opens it, and held against what was measured.

A package is built before the gate decides, so that the decision can name it. Whoever builds it is not trusted: its
model must be byte for byte the one that the report measured, and the rest must be what that model needs.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qcore.canonical import Digest, sha256_bytes, sha256_json
from qcore.errors import GateRefused, ModelError, PackageError
from qcore.graph.io import parse_model
from qcore.release.admission import Allowance, admit_file
from qcore.release.golden_admission import admit_golden
from qcore.release.manifest import GOLDEN, MODEL, ReleaseManifest
from qcore.release.package import MAX_PACKAGE_BYTES, unpack_package
from qcore.report import EvaluationReport, GatedPackage
from qcore.target import TARGET_KEY


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedPackage:
    """A package after its bytes were read once and every digest recomputed; `folder` holds its members for a while."""

    data: bytes
    sha256: Digest
    manifest: ReleaseManifest
    folder: Path


@contextmanager
def opened_package(path: Path) -> Iterator[OpenedPackage]:
    """Yield the package `path`, unpacked by the device's reader into a folder that lasts as long as the block.

    What is checked is what was read: a writer at `path` cannot change it meanwhile.

    Gate, publisher and auditor all open packages here, so none of them passes on what a device would not load.

    Raises:
        PackageError: it cannot be read, is not one that we made, or holds a model or samples that are not admitted.
    """
    try:
        if (size := path.stat().st_size) > MAX_PACKAGE_BYTES:
            raise PackageError(f"package {path} has {size} bytes; allowed: {MAX_PACKAGE_BYTES}; make the model smaller")
        with tempfile.TemporaryDirectory(prefix="qcore-package-") as work:
            copied, folder = Path(work) / "package.qpkg", Path(work) / "unpacked"
            data = path.read_bytes()
            copied.write_bytes(data)
            manifest = unpack_package(copied, folder)
            copied.unlink()
            admit_members(folder, manifest)
            yield OpenedPackage(data=data, sha256=sha256_bytes(data), manifest=manifest, folder=folder)
    except OSError as e:
        raise PackageError(
            f"package {path} cannot be checked: {e.filename or ''} {e.strerror}; correct the path, or free space in "
            "the temporary folder"
        ) from e


def admit_members(folder: Path, manifest: ReleaseManifest) -> None:
    """Return if the unpacked members in `folder` are what a device may load, with what `manifest` declares.

    Raises:
        PackageError: with the first thing that is not admitted.
        OSError: a member cannot be read.
    """
    try:
        admit_file(folder / MODEL, Allowance(control_flow=manifest.compat.control_flow))
    except ModelError as e:
        raise PackageError(f"the packaged model cannot be released: {e}") from e
    admit_golden(folder / GOLDEN, manifest)


def manifest_digest(manifest: ReleaseManifest) -> Digest:
    """Return the digest of `manifest.json` as it lies in the package."""
    return sha256_json(manifest.to_json())


def package_of(path: Path, report: EvaluationReport) -> GatedPackage:
    """Return what a decision on `report` says about the package `path`, after it was held against the report.

    Raises:
        PackageError: it cannot be read, is not one that we made, or holds what is not admitted.
        GateRefused: it holds another model than the one measured, golden samples of other data, or is for a device
            that the model was not made for.
    """
    with opened_package(path) as opened:
        manifest, raw = opened.manifest, (opened.folder / MODEL).read_bytes()
        if (manifest.model_sha256, len(raw)) != (report.model.sha256, report.model.size_bytes):
            raise GateRefused(
                f"the package holds model {manifest.model_sha256[:12]}, the report measured "
                f"{report.model.sha256[:12]}; evaluate the model that is packaged"
            )
        _refuse_unfit(manifest, raw, report)
        return GatedPackage(
            sha256=opened.sha256,
            manifest_sha256=manifest_digest(manifest),
            family=manifest.family,
            version=manifest.version,
        )


def _refuse_unfit(manifest: ReleaseManifest, raw: bytes, report: EvaluationReport) -> None:
    """Refuse a manifest that says of its model what neither the model nor the report says."""
    if manifest.provenance is None:
        raise GateRefused("the package does not say where its golden samples come from; build it with `qcore package`")
    if manifest.provenance.data_sha256 != report.data.sha256:
        raise GateRefused(
            f"the package's golden samples are of data {manifest.provenance.data_sha256[:12]}, the report measured "
            f"{report.data.sha256[:12]}; package with the card and split that were evaluated"
        )
    model = parse_model(raw, "the packaged model")
    made_for = model.metadata_props.get(TARGET_KEY)
    if made_for is not None and manifest.compat.hardware != (made_for,):
        raise GateRefused(
            f"the package is for {', '.join(manifest.compat.hardware)}, its model was quantized for {made_for}; "
            "package for that target"
        )
    constants = model.graph.initializers
    found = [
        tuple(v.name for v in values if v.name not in constants) for values in (model.graph.inputs, model.graph.outputs)
    ]
    stated = [tuple(t.name for t in tensors) for tensors in (manifest.inputs, manifest.outputs)]
    if found != stated or manifest.compat.opset != model.opset_imports[""]:
        raise GateRefused(
            f"the package states inputs and outputs {stated} and opset {manifest.compat.opset}, its model has {found} "
            f"and {model.opset_imports['']}; build it with `qcore package`"
        )
