"""Build provenance: which builder made a package, from what, with which parameters; a signed SLSA statement.

It says where bytes come from and nothing about how good they are: that is the gate's evidence, which a release needs.
Provenance is optional; where it is given, it is published beside the evidence and must be about the same package.

Source: SLSA provenance v1 (slsa.dev/spec/v1.0/provenance); in-toto attestation spec v1; DSSE v1.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from securesystemslib.signer import Key, Signer

from qcore.canonical import Digest, Json, canonical_json
from qcore.errors import GateRefused
from qcore.release.envelope import STATEMENT_TYPE, Kind, open_statement, sign_statement

KIND = Kind(
    name="provenance",
    predicate_type="https://slsa.dev/provenance/v1",
    again="pass the file that `qcore provenance` wrote",
)
PACKAGE = "package.qpkg"
BUILD_TYPE = "urn:kfp-qcore:package:v1"
Parameter = str | int


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """How a package was made.

    Args:
        package_sha256: of all bytes of the package.
        builder: who vouches for the build, as a URI.
        parameters: recipe, target, seed ... by name.
        inputs: SHA-256 of every input by name: float model, data, recipe file ...
        qcore_version: of the code that built it.
        invocation: the run, such as a pipeline run's id; empty where there is none.
    """

    package_sha256: Digest
    builder: str
    parameters: Mapping[str, Parameter]
    inputs: Mapping[str, Digest]
    qcore_version: str
    invocation: str = ""


def sign_provenance(build: Build, signer: Signer) -> bytes:
    """Return `build` as a signed SLSA v1 statement in a DSSE envelope, canonical JSON."""
    return sign_statement(_statement(build), signer)


def verify_provenance(envelope: bytes, keys: Sequence[Key]) -> Build:
    """Return the build inside `envelope` after one of `keys` vouched for every byte of it.

    Raises:
        GateRefused: not an envelope, unsigned, signed by none of `keys`, changed after signing, or not ours.
    """
    statement, _, _ = open_statement(envelope, KIND, keys)
    try:
        definition, details = (statement["predicate"][k] for k in ("buildDefinition", "runDetails"))
        build = Build(
            package_sha256=statement["subject"][0]["digest"]["sha256"],
            builder=details["builder"]["id"],
            parameters=definition["externalParameters"],
            inputs={d["name"]: d["digest"]["sha256"] for d in definition["resolvedDependencies"]},
            qcore_version=details["builder"]["version"]["kfp-qcore"],
            invocation=details["metadata"]["invocationId"],
        )
        expected = json.loads(canonical_json(_statement(build)))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise GateRefused(f"provenance: not one that qcore wrote ({e!r}); {KIND.again}") from e
    if statement != expected:
        raise GateRefused(f"provenance: it says more or other things than a build of ours; {KIND.again}")
    return build


def _statement(build: Build) -> dict[str, Json]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": PACKAGE, "digest": {"sha256": build.package_sha256}}],
        "predicateType": KIND.predicate_type,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(build.parameters),
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": digest}} for name, digest in sorted(build.inputs.items())
                ],
            },
            "runDetails": {
                "builder": {"id": build.builder, "version": {"kfp-qcore": build.qcore_version}},
                "metadata": {"invocationId": build.invocation},
            },
        },
    }
