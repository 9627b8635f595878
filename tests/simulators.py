"""A small world for release and device tests: a real model, real keys, a real repository, and a store that dies."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcore.canonical import sha256_bytes
from qcore.device.config import DeviceConfig
from qcore.release.evidence import sign_decision
from qcore.release.keys import KeyRing, create_keys
from qcore.release.location import open_store
from qcore.release.manifest import Compatibility, Golden, Provenance, RuntimeRange, TensorInfo, Tolerance
from qcore.release.package import Package, PackageSource, build_package
from qcore.release.proposal import Submission
from qcore.release.repository import Release, init_repository, publish_release
from qcore.release.s3 import S3Store
from qcore.release.store import DirectoryStore, Object
from qcore.release.subject import manifest_digest
from qcore.report import Check, GateDecision, GatedPackage, Outcome
from qcore.waiver import Override, Owner, format_time

FAMILY = "digits"
HARDWARE = "x86-vnni"
CPU = "CPUExecutionProvider"
COMPAT = Compatibility(
    hardware=(HARDWARE,),
    cpu_features=(),
    onnxruntime=RuntimeRange(minimum="1.20", tested="1.24.1", below="2"),
    opset=17,
    providers=(CPU,),
    memory_bytes=None,
    control_flow=False,
)
BASELINE, DATA, POLICY, REPORT = ("1" * 64, "2" * 64, "3" * 64, "4" * 64)


def now() -> datetime:
    return datetime.now(UTC)


def tiny_model(seed: int = 0) -> bytes:
    """Return an ONNX model y = x @ w of 4 inputs and 3 outputs."""
    w = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_golden(path: Path, model: bytes, *, error: float = 0.0) -> None:
    """Write 5 golden samples of `model`; `error` shifts the stored outputs."""
    x = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)
    y = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    np.savez(path, **{"input:x": x, "output:y": y + np.float32(error)})


def package_source(folder: Path, version: str = "1.0.0", *, seed: int = 0, error: float = 0.0) -> PackageSource:
    """Return the inputs of a package, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed)
    (folder / "model.onnx").write_bytes(model)
    write_golden(folder / "golden.npz", model, error=error)
    (folder / "labels.json").write_text('["zero","one","two"]')
    (folder / "card.md").write_text("# tiny\n")
    (folder / "sbom.cdx.json").write_text('{"bomFormat":"CycloneDX"}')
    return PackageSource(
        family=FAMILY,
        version=version,
        model=folder / "model.onnx",
        golden=folder / "golden.npz",
        labels=folder / "labels.json",
        card=folder / "card.md",
        sbom=folder / "sbom.cdx.json",
        compat=COMPAT,
        inputs=(TensorInfo(name="x", dtype="float32", shape=("N", 4)),),
        outputs=(TensorInfo(name="y", dtype="float32", shape=("N", 3)),),
        golden_limits=Golden(n=5, tolerances=(Tolerance(provider=CPU, max_abs_error=1e-4, argmax_agreement=1.0),)),
        provenance=Provenance(data_sha256=DATA, qcore_version="0.1.0"),
    )


def gated(package: Package) -> GatedPackage:
    """Return `package` as a decision names it."""
    m = package.manifest
    return GatedPackage(sha256=package.sha256, manifest_sha256=manifest_digest(m), family=m.family, version=m.version)


def about(package: Package, outcome: Outcome = "pass") -> GateDecision:
    """Return a gate decision about this package."""
    local = decision(package.manifest.model_sha256, outcome)
    return dataclasses.replace(local, package=gated(package), decided=format_time(now()))


def waivable(
    owner: Owner, names: Sequence[str] = ("top1",), outcome: Outcome = "fail", max_days: int = 14
) -> GateDecision:
    """Return a local decision of one check per name, all of `outcome`, that `owner` may waive."""
    first = decision("a" * 64, outcome)
    checks = tuple(dataclasses.replace(first.checks[0], name=name) for name in names)
    override = Override(owners=(owner,), checks=tuple(names), max_days=max_days)
    return dataclasses.replace(first, checks=checks, override=override)


def decision(model_sha256: str, outcome: Outcome = "pass") -> GateDecision:
    """Return a gate decision about the model of this digest, local: it names no package."""
    bound = 0.97 if outcome == "pass" else 0.95
    check = Check(name="top1", outcome=outcome, observed=0.98, bound=bound, limit=0.96, reason="measured")
    return GateDecision(
        outcome=outcome,
        checks=(check,),
        confidence=0.95,
        n=360,
        model_sha256=model_sha256,
        baseline_sha256=BASELINE,
        data_sha256=DATA,
        policy_sha256=POLICY,
        report_sha256=REPORT,
        qcore_version="0.1.0",
        metrics={"top1": 0.98},
    )


@dataclass(frozen=True)
class World:
    """A repository with one channel `stable`, its keys, and a folder for everything else."""

    folder: Path
    store: DirectoryStore | S3Store
    keys: KeyRing

    def package(self, version: str = "1.0.0", *, seed: int = 0, error: float = 0.0) -> Package:
        source = package_source(self.folder / f"src-{version}-{seed}", version, seed=seed, error=error)
        return build_package(source, self.folder / f"{version}-{seed}.qpkg")

    def evidence(self, package: Package, outcome: Outcome = "pass") -> bytes:
        return sign_decision(about(package, outcome), self.keys.signer("gate"))

    def submission(self, package: Package) -> Submission:
        return Submission(package=package.path, evidence=self.evidence(package))

    def publish(self, version: str = "1.0.0", *, seed: int = 0, error: float = 0.0) -> Release:
        package = self.package(version, seed=seed, error=error)
        return publish_release(self.store, self.submission(package), self.keys, now=now())

    def object_path(self, release: Release) -> Path:
        """Return the file of the published package."""
        parent, _, name = release.target.rpartition("/")
        return self.store.folder / "targets" / parent / f"{release.sha256}.{name}"

    def device(self, name: str = "dev-1", **changes: object) -> DeviceConfig:
        config = DeviceConfig(
            device_id=name,
            hardware=HARDWARE,
            family=FAMILY,
            repository=read_address(self.store),
            root=self.keys.pinned_root,
            state_dir=self.folder / "devices" / name,
            selftest=(sys.executable, "-c", "pass"),  # the real one is slow; tests of it say so
        )
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]  # fields by name, for tests


def make_world(folder: Path, when: datetime | None = None, *, location: str | None = None) -> World:
    """Return a new world whose repository (in `folder` or at `location`) was signed at `when` (now)."""
    keys = create_keys(folder / "keys", ["stable"])
    store = open_store(location or folder / "repo")
    init_repository(store, keys, ["stable"], now=when or now())
    return World(folder=folder, store=store, keys=keys)


def read_address(store: DirectoryStore | S3Store) -> str:
    """Return where devices read this store: its folder, or the server's address, which anybody may read."""
    if isinstance(store, DirectoryStore):
        return str(store.folder)
    return f"{store.client.meta.endpoint_url}/{store.bucket}/{store.prefix}".rstrip("/")


class Crash(Exception):  # noqa: N818 - the process is gone
    """The power went away."""


class CrashingStore:
    """A store whose process dies right after its `lives`-th successful write."""

    def __init__(self, store: DirectoryStore, lives: int) -> None:
        self.store, self.lives = store, lives

    def get(self, key: str) -> Object | None:
        return self.store.get(key)

    def list(self, prefix: str) -> list[str]:
        return self.store.list(prefix)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._count(self.store.put_if_absent(key, data))

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        return self._count(self.store.put_if_match(key, data, etag))

    def _count(self, written: bool) -> bool:
        self.lives -= written
        if self.lives == 0:
            raise Crash
        return written


def run_python(args: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Return the finished process of this interpreter."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, timeout=60)


def forget_metadata_cache(config: DeviceConfig) -> None:
    """Lose what tuf cached, as an unsynced disk does."""
    for path in (config.state_dir / "metadata").rglob("*"):
        if path.is_file() or path.is_symlink():
            path.unlink()


def digest(path: Path) -> str:
    return sha256_bytes(path.read_bytes())
