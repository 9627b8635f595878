"""The co-signer: the gate's key signs additions with their own proof, and nothing else."""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from simulators import DATA, FAMILY, POLICY, about, decision, gated, now, package_source
from tuf.api.metadata import Delegations, TargetFile, Targets

from qcore.canonical import sha256_bytes
from qcore.errors import GateRefused
from qcore.release.approval import Approval
from qcore.release.cosign import Proof, Terms, cosign
from qcore.release.evidence import sign_decision
from qcore.release.package import Package, build_package
from qcore.report import GateDecision, Outcome
from qcore.waiver import format_time

GATE, OTHER = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()
NOW = now().replace(microsecond=0)
PATH, EVIDENCE = f"models/{FAMILY}/1.0.0.qpkg", f"models/{FAMILY}/1.0.0.evidence.json"


def target(path: str, data: bytes, custom: object = None) -> TargetFile:
    return TargetFile(len(data), {"sha256": sha256_bytes(data)}, path, {} if custom is None else {"custom": custom})


def decided(package: Package, outcome: Outcome = "pass") -> GateDecision:
    """Return a decision about this package, of the time that the co-signer's clock shows."""
    return replace(about(package, outcome), decided=format_time(NOW))


class Case:
    """A proposal that the gate signs; tests change one thing of it."""

    def __init__(self, package: Package) -> None:
        self.old = Targets(version=3, expires=NOW + timedelta(days=10))
        self.old.targets["models/digits/0.9.0.qpkg"] = target("models/digits/0.9.0.qpkg", b"old", {"counter": 4})
        self.new = copy.deepcopy(self.old)
        self.new.version, self.new.expires = 4, NOW + timedelta(days=90)
        self.package = package
        evidence = sign_decision(decided(package), GATE)
        self.proof = Proof(sha256=package.sha256, manifest=package.manifest, evidence=evidence)
        custom = {"counter": 5, "model_sha256": package.manifest.model_sha256, "evidence": EVIDENCE}
        custom |= {"compat": package.manifest.compat.to_json(), "flash_bytes": package.manifest.flash_bytes}
        self.new.targets[PATH] = target(PATH, package.path.read_bytes(), custom)
        self.new.targets[EVIDENCE] = target(EVIDENCE, evidence)
        self.proofs = {PATH: self.proof}
        self.terms: dict[str, object] = {}

    def evidence(self, data: bytes) -> None:
        self.proofs[PATH] = replace(self.proof, evidence=data)
        self.new.targets[EVIDENCE] = target(EVIDENCE, data)

    def custom(self, name: str, value: object) -> None:
        self.new.targets[PATH].custom[name] = value

    def judge(self, at: datetime = NOW) -> None:
        trusted = [GATE.public_key]
        approval = Approval(policies={POLICY: "any"}, data=(DATA,))
        terms = Terms(gate_keys=trusted, build_keys=trusted, approval=approval, served=(), now=at)
        cosign(self.old, self.new, self.proofs, replace(terms, **self.terms))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(build_package(package_source(tmp_path / "src"), tmp_path / "p.qpkg"))


def test_a_proved_addition_is_signed(case: Case) -> None:
    case.judge()


def test_a_pure_refresh_is_signed(case: Case) -> None:
    del case.new.targets[PATH], case.new.targets[EVIDENCE]
    case.proofs = {}
    case.judge()


def gate_says(case: Case, **changes: object) -> bytes:
    """Return signed evidence about the case's package, but for `changes`."""
    return sign_decision(replace(decided(case.package), **changes), GATE)  # type: ignore[arg-type]  # fields by name


def other_package(case: Case, **changes: str) -> bytes:
    return gate_says(case, package=replace(gated(case.package), **changes))


def delegate(case: Case) -> None:
    case.new.delegations = Delegations(keys={}, roles={})


CHANGES: list[tuple[str, Callable[[Case], object], str]] = [
    ("old version", lambda c: setattr(c.new, "version", 3), "version 3"),
    ("endless expiry", lambda c: setattr(c.new, "expires", NOW + timedelta(days=91)), "expiry"),
    ("expired already", lambda c: setattr(c.new, "expires", NOW), "expiry"),
    ("own delegations", delegate, "delegations"),
    ("removal", lambda c: c.new.targets.pop("models/digits/0.9.0.qpkg"), "removed or changed"),
    ("edit", lambda c: setattr(c.new.targets["models/digits/0.9.0.qpkg"], "length", 9), "removed or changed"),
    ("no proof", lambda c: c.proofs.clear(), "each package needs exactly its evidence"),
    ("no evidence target", lambda c: c.new.targets.pop(EVIDENCE), "each package needs exactly its evidence"),
    ("stowaway", lambda c: c.new.targets.update(x=target("x", b"")), "each package needs exactly its evidence"),
    ("old counter", lambda c: c.custom("counter", 4), "counter 4 is not above 4"),
    ("no counter", lambda c: c.custom("counter", None), "custom counter is None"),
    ("true as counter", lambda c: c.custom("counter", True), "custom counter is True"),
    ("other model named", lambda c: c.custom("model_sha256", "0" * 64), "do not name the evaluated model"),
    ("other evidence named", lambda c: c.custom("evidence", "x"), "do not name the evaluated model"),
    ("other bytes", lambda c: setattr(c.new.targets[PATH], "hashes", {"sha256": "0" * 64}), "is not the package of"),
    ("other evidence bytes", lambda c: c.new.targets.update({EVIDENCE: target(EVIDENCE, b"x")}), "is not the evidence"),
    ("foreign gate", lambda c: c.evidence(sign_decision(decision("0" * 64), OTHER)), "signed by unknown key"),
    ("other model measured", lambda c: c.evidence(sign_decision(decision("0" * 64), GATE)), "not the one evaluated"),
    ("local decision", lambda c: c.evidence(gate_says(c, package=None)), "names no package"),
    (
        "other package",
        lambda c: c.evidence(other_package(c, sha256="0" * 64)),
        "evidence is about package 000000000000",
    ),
    ("other manifest", lambda c: c.evidence(other_package(c, manifest_sha256="0" * 64)), "states another manifest"),
    ("other version", lambda c: c.evidence(other_package(c, version="2.0.0")), "states another manifest"),
]


@pytest.mark.parametrize(("change", "reason"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_every_other_proposal_is_refused_with_its_reason(
    case: Case, change: Callable[[Case], object], reason: str
) -> None:
    change(case)
    with pytest.raises(GateRefused, match=reason):
        case.judge()


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_only_a_pass_is_signed(case: Case, outcome: str) -> None:
    case.evidence(sign_decision(decided(case.package, outcome), GATE))  # type: ignore[arg-type]  # parametrized literal
    with pytest.raises(GateRefused, match=f"gate outcome is {outcome}"):
        case.judge()
