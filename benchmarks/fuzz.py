"""Fuzz what reads foreign bytes, for a bounded time: `python benchmarks/fuzz.py TARGET --seconds N`.

Targets: `package` (reader), `manifest` (its JSON), `admission` (ONNX as wire format), `golden` (`.npz` headers),
`evidence` (signed envelopes). atheris leads the mutations by coverage; it is no dependency of qcore:
`pip install atheris` into the environment. A finding is any error but the reader's own refusal, a refusal of more than
one line, more than a few seconds for one input, or an accepted input that breaks what the reader promises; atheris
writes the input to `crash-*`. Exit code 0: none found.
"""

import argparse
import dataclasses
import json
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qcore"]):
    from qcore.canonical import canonical_json
    from qcore.errors import QcoreError
    from qcore.release import admission, evidence, golden_admission, manifest, package

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

WORK = Path(tempfile.mkdtemp(prefix="qcore-fuzz-"))
Target = Callable[[bytes], None]


def read_package(data: bytes) -> None:
    """Whatever is unpacked lies in its folder and is what the manifest says.

    Bytes that begin with an odd one are tried as the stored frame of golden.npz in an archive that is right otherwise.
    """
    path, slot = WORK / "p.qpkg", WORK / "slot"
    path.write_bytes(around(data[1:]) if data[:1] and data[0] & 1 else data)
    try:
        found = package.unpack_package(path, slot)
        assert {p.name for p in slot.iterdir()} == {package.MANIFEST, *(m.path for m in found.members)}
        assert all((slot / m.path).stat().st_size == m.size_bytes for m in found.members)
    finally:
        for p in slot.glob("*"):
            p.unlink()
        if slot.is_dir():
            slot.rmdir()


def around(frame: bytes) -> bytes:
    """Return a package whose manifest vouches for the size of `frame`, but not for what is in it."""
    members = tuple(
        dataclasses.replace(m, stored_size_bytes=max(1, len(frame))) if m.path == manifest.GOLDEN else m
        for m in MANIFEST.members
    )
    head = canonical_json(dataclasses.replace(MANIFEST, members=members).to_json())
    parts = [tar_member(package.MANIFEST, head)]
    parts += [tar_member(f"{m.path}.zst", frame if m.path == manifest.GOLDEN else FRAMES[m.path]) for m in members]
    body = b"".join(parts)
    return body + bytes(1024 + -(len(body) + 1024) % tarfile.RECORDSIZE)


def tar_member(name: str, content: bytes) -> bytes:
    """Return header, content and padding of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(format=tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def read_manifest(data: bytes) -> None:
    """What is accepted comes back as the same value."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    found = manifest.manifest_from_json(value)
    assert manifest.manifest_from_json(json.loads(canonical_json(found.to_json()))) == found


def read_model(data: bytes) -> None:
    """What is admitted, protobuf reads too."""
    admission.admit(data)
    import onnx

    onnx.ModelProto().ParseFromString(data)


def read_golden(data: bytes) -> None:
    """What is admitted asks for no more memory than it has bytes.

    Bytes that begin with an odd one are tried as the input array in an archive that is right otherwise.
    """
    path = WORK / "g.npz"
    path.write_bytes(data)
    if data[:1] and data[0] & 1:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("input:x.npy", data[1:])
            archive.writestr("output:y.npy", ANSWERS)
    golden_admission.admit_golden(path, MANIFEST)


def read_evidence(data: bytes) -> None:
    """Nothing is accepted without the key's signature: what is, says what the seed says."""
    assert evidence.verify_evidence(data, [KEY]) == DECISION


TARGETS: dict[str, Target] = {
    "package": read_package,
    "manifest": read_manifest,
    "admission": read_model,
    "golden": read_golden,
    "evidence": read_evidence,
}
SEEDS: dict[str, bytes] = {}
FRAMES: dict[str, bytes] = {}


def make_seeds() -> None:
    """Fill SEEDS with one good input of each kind, and keep what the readers' promises are held against."""
    global ANSWERS, DECISION, KEY, MANIFEST
    from securesystemslib.signer import CryptoSigner
    from simulators import about, package_source

    source = package_source(WORK / "src")
    built = package.build_package(source, WORK / "seed.qpkg")
    signer = CryptoSigner.generate_ed25519()
    MANIFEST, KEY, DECISION = built.manifest, signer.public_key, about(built)
    ANSWERS = zipfile.ZipFile(source.golden).read("output:y.npy")
    with tarfile.open(built.path) as tar:
        FRAMES.update({i.name.removesuffix(".zst"): tar.extractfile(i).read() for i in tar})  # type: ignore[union-attr]  # files
    SEEDS["package"] = built.path.read_bytes()
    SEEDS["manifest"] = canonical_json(built.manifest.to_json())
    SEEDS["admission"] = source.model.read_bytes()
    SEEDS["golden"] = source.golden.read_bytes()
    SEEDS["evidence"] = evidence.sign_decision(DECISION, signer)


def one_input(target: Target) -> Target:
    """Return what atheris calls: refusals in one line are the right answer, everything else is a finding."""

    def run(data: bytes) -> None:
        try:
            target(data)
        except QcoreError as e:
            if "\n" in str(e):
                raise AssertionError("a refusal of more than one line") from e

    return run


def main() -> None:
    """Run one target until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args()
    make_seeds()
    corpus = WORK / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(SEEDS[args.target])
    inner = {
        "package": FRAMES[manifest.GOLDEN],
        "golden": zipfile.ZipFile(WORK / "src" / "golden.npz").read("input:x.npy"),
    }
    if args.target in inner:
        (corpus / "inner").write_bytes(b"\x01" + inner[args.target])
    limits = [
        "-timeout=10",
        "-rss_limit_mb=2048",
        f"-max_len={2 * len(SEEDS[args.target]) + 1024}",
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={args.seconds}", *limits, str(corpus)], one_input(TARGETS[args.target])
    )
    os.chdir(WORK)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
