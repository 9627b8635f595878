"""Packages: deterministic, and read only in the exact form in which they are written."""

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from simulators import COMPAT, CPU, about, now, package_source, run_python

from qcore.canonical import canonical_json
from qcore.errors import GateRefused, ModelError, PackageError
from qcore.release.admission import admit_file
from qcore.release.cosign import Proof, check_evidence
from qcore.release.evidence import sign_decision
from qcore.release.manifest import LABELS, MEMBERS, MODEL, Golden, ReleaseManifest, Tolerance, manifest_from_json
from qcore.release.package import (
    MANIFEST,
    MAX_PACKAGE_BYTES,
    Package,
    build_package,
    read_manifest,
    unpack_package,
)
from qcore.release.subject import opened_package

Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]  # only files


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, to: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return build_package(package_source(tmp_path / "src"), tmp_path / "p.qpkg").path


def test_equal_inputs_give_equal_bytes_whatever_the_folder_and_time(tmp_path: Path) -> None:
    a = build_package(package_source(tmp_path / "a"), tmp_path / "a.qpkg")
    for path in (tmp_path / "a").iterdir():
        path.touch()
        path.chmod(0o600)
    b = build_package(package_source(tmp_path / "a"), tmp_path / "deep" / "b.qpkg")
    assert a.path.read_bytes() == b.path.read_bytes()
    assert a.sha256 == hashlib.sha256(b.path.read_bytes()).hexdigest()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["b.qpkg"]


def test_any_tar_and_zstd_can_read_it_manifest_first(package: Path) -> None:
    found = members_of(package)
    assert [info.name for info, _ in found] == [f"{n}.zst" if n != MANIFEST else n for n in (MANIFEST, *MEMBERS)]
    assert {(i.mtime, i.uid, i.gid, i.mode) for i, _ in found} == {(0, 0, 0, 0o644)}
    manifest = json.loads(found[0][1])
    model = zstandard.ZstdDecompressor().decompress(found[4][1])
    assert hashlib.sha256(model).hexdigest() == manifest["members"][3]["sha256"]


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    source = package_source(tmp_path / "src")
    built = build_package(source, tmp_path / "p.qpkg")
    manifest = unpack_package(built.path, tmp_path / "slot")
    assert manifest == built.manifest == read_manifest(built.path)
    for name in MEMBERS:
        assert (tmp_path / "slot" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "slot").iterdir()) == sorted([MANIFEST, *MEMBERS])


def test_labels_are_optional(tmp_path: Path) -> None:
    built = build_package(replace(package_source(tmp_path / "src"), labels=None), tmp_path / "p.qpkg")
    assert [m.path for m in unpack_package(built.path, tmp_path / "slot").members] == [
        m for m in MEMBERS if m != LABELS
    ]


def test_a_missing_or_empty_input_leaves_nothing_behind(tmp_path: Path) -> None:
    source = package_source(tmp_path / "src")
    (tmp_path / "src" / "empty").touch()
    for model in (tmp_path / "none.onnx", tmp_path / "src" / "empty"):
        with pytest.raises(PackageError):
            build_package(replace(source, model=model), tmp_path / "out" / "p.qpkg")
    assert list((tmp_path / "out").iterdir()) == []


def instead(m: Members, other: tuple[tarfile.TarInfo, bytes]) -> Members:
    """Return the members with another one where golden.npz is."""
    return [*m[:2], other, *m[3:]]


def twice(m: Members, i: int) -> Members:
    return [*m[: i + 1], m[i], *m[i + 1 :]]


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda m: twice(m, 5), "file 'sbom.cdx.json.zst' where|padding is not zero|bytes after"),
        (lambda m: twice(m, 2), "found file 'golden.npz.zst' where labels.json.zst"),
        (lambda m: twice(m, 0), "found file 'manifest.json' where card.md.zst"),
        (lambda m: [*m, file("extra.txt", b"x")], "end of archive"),
        (lambda m: m[:-1], "the end of the archive where sbom.cdx.json.zst"),
        (lambda m: m[:1], "the end of the archive where card.md.zst"),
        (lambda m: [*m[:2], m[3], m[2], *m[4:]], "found file 'labels.json.zst' where golden.npz.zst"),
        (lambda m: m[1:], "starts with file 'card.md.zst', expected manifest.json"),
        (lambda m: instead(m, file("../golden.npz.zst", m[2][1])), "found file '../golden.npz.zst' where"),
        (lambda m: instead(m, file("/etc/golden.npz.zst", m[2][1])), "found file '/etc/golden.npz.zst' where"),
        (lambda m: instead(m, file("a/../../golden.npz.zst", m[2][1])), "found file 'a/../../golden.npz.zst' where"),
        (lambda m: instead(m, file("GOLDEN.npz.zst", m[2][1])), "found file 'GOLDEN.npz.zst' where"),
        (lambda m: instead(m, file("golden.npz.zs\u0165", m[2][1])), "found file 'golden.npz.zs.+ where"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.SYMTYPE, "/etc/passwd")), "found symbolic link"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.LNKTYPE, "manifest.json")), "found hard link"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.FIFOTYPE)), "found special file"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.CHRTYPE)), "found special file"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.BLKTYPE)), "found special file"),
        (lambda m: instead(m, special("golden.npz.zst", tarfile.DIRTYPE)), "found folder"),
    ],
)
def test_every_other_archive_is_refused(
    package: Path, tmp_path: Path, attack: Callable[[Members], Members], message: str
) -> None:
    bad = write_tar(tmp_path / "bad.qpkg", attack(members_of(package)))
    with pytest.raises(PackageError, match=message):
        unpack_package(bad, tmp_path / "in" / "slot")
    assert {p.parent for p in (tmp_path / "in").rglob("*") if p.is_file()} <= {tmp_path / "in" / "slot"}


def with_manifest(found: Members, changes: dict[str, Any]) -> Members:
    return [file("manifest.json", canonical_json({**json.loads(found[0][1]), **changes})), *found[1:]]


def with_golden(members: Members, stored: bytes, **stated: Any) -> Members:
    """Return the members with other stored bytes of golden.npz, and a manifest that vouches for their size."""
    listed = json.loads(members[0][1])["members"]
    listed[1] |= {"stored_size_bytes": len(stored), **stated}
    return instead(with_manifest(members, {"members": listed}), file("golden.npz.zst", stored))


def limits(n: object = 5, **changes: object) -> dict[str, object]:
    return {"n": n, "tolerances": [{"provider": CPU, "max_abs_error": 0.1, "argmax_agreement": 1.0, **changes}]}


def needs(**changes: object) -> dict[str, object]:
    return {**COMPAT.to_json(), **changes}


def undeclared(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize("pack", [zstandard.compress, undeclared])
def test_a_zstd_bomb_stops_at_the_size_that_the_manifest_states(
    package: Path, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    bomb = pack(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    bad = write_tar(tmp_path / "bomb.qpkg", with_golden(members_of(package), bomb, size_bytes=1000))
    with pytest.raises(PackageError, match=r"golden\.npz: more than 1000 bytes"):
        unpack_package(bad, tmp_path / "slot")
    assert (tmp_path / "slot" / "golden.npz").stat().st_size <= 1000


def test_a_frame_that_asks_for_more_memory_than_a_device_gives_is_refused(package: Path, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stored = compressor.compress(b"x" * 100) + compressor.flush()
    bad = write_tar(tmp_path / "bad.qpkg", with_golden(members_of(package), stored, size_bytes=100))
    with pytest.raises(PackageError, match=r"golden\.npz: not decodable"):
        unpack_package(bad, tmp_path / "slot")


@pytest.mark.parametrize(
    "stored",
    [
        b"not zstd",
        zstandard.compress(b"other bytes"),
        zstandard.compress(b"x" * 999)[:-3],
        zstandard.compress(b"") + b"!!",
    ],
)
def test_payloads_that_are_not_the_stated_bytes_are_refused(package: Path, tmp_path: Path, stored: bytes) -> None:
    bad = write_tar(tmp_path / "bad.qpkg", with_golden(members_of(package), stored))
    with pytest.raises(PackageError, match=r"golden\.npz: "):
        unpack_package(bad, tmp_path / "slot")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "qcore.manifest/2"},
        {"surprise": 1},
        {"family": "../x"},
        {"version": "1.0/../../x"},
        {"members": []},
        {"members": "model.onnx"},
        {"members": [{"path": "/etc/passwd", "size_bytes": 1, "stored_size_bytes": 1, "sha256": "0" * 64}]},
        {"golden": limits(n=0)},
        {"golden": limits(n=True)},
        {"golden": limits(max_abs_error=-0.1)},
        {"golden": limits(argmax_agreement=1.1)},
        {"golden": limits(provider="QNNExecutionProvider")},
        {"golden": {**limits(), "tolerances": []}},
        {"golden": {**limits(), "tolerances": None}},
        {"compat": needs(hardware=[])},
        {"compat": needs(providers=[])},
        {"compat": needs(providers=[CPU, CPU])},
        {"compat": needs(opset=0)},
        {"compat": needs(opset=True)},
        {"compat": needs(control_flow=0)},
        {"compat": needs(memory_bytes=0)},
        {"compat": needs(memory_bytes=1.5)},
        {"compat": needs(cpu_features=["avx2"])},
        {"compat": needs(cpu_features=[[]])},
        {"compat": needs(cpu_features=[[1]])},
        {"compat": needs(onnxruntime="1.24")},
        {"compat": needs(onnxruntime={"minimum": "1.24", "tested": "1.23", "below": "2"})},
        {"compat": needs(onnxruntime={"minimum": "1.24", "tested": "2.0", "below": "2"})},
        {"compat": needs(onnxruntime={"minimum": "one", "tested": "1", "below": "2"})},
        {"compat": None},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [1.5]}]},
    ],
)
def test_a_manifest_with_anything_unknown_or_out_of_range_is_refused(
    package: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    bad = write_tar(tmp_path / "bad.qpkg", with_manifest(members_of(package), changes))
    with pytest.raises(PackageError, match=r"manifest|is not allowed|does not begin") as e:
        read_manifest(bad)
    assert "\n" not in str(e.value)


TRICKS = [
    "..",
    "a..b",
    "a/b",
    "a\\b",
    "a%2fb",
    "a+b",
    "a b",
    "a:b",
    "caf\u00e9",
    "\uff41",
    "a\u202eb",
    "a\0b",
    "a\n",
    "a.",
    ".a",
    "-a",
    "A",
    "",
    "a" * 65,
]


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("field", ["family", "version"])
def test_names_that_are_not_safe_in_target_paths_are_never_packaged(tmp_path: Path, field: str, name: str) -> None:
    """Both become part of `models/<family>/<version>.qpkg`, which clients put into URLs as it is."""
    with pytest.raises(PackageError, match=f"{field} .* is not allowed"):
        build_package(replace(package_source(tmp_path / "src"), **{field: name}), tmp_path / "p.qpkg")
    assert not (tmp_path / "p.qpkg").exists()


def test_a_manifest_must_be_canonical_and_small(package: Path, tmp_path: Path) -> None:
    members = members_of(package)
    for data in (members[0][1] + b"\n", members[0][1].replace(b'{"', b'{"schema":"x","', 1), b"[" * 9000, b"nul"):
        bad = write_tar(tmp_path / "bad.qpkg", [file("manifest.json", data), *members[1:]])
        with pytest.raises(PackageError, match=r"manifest\.json: not"):
            read_manifest(bad)
    huge = write_tar(tmp_path / "huge.qpkg", [file("manifest.json", b" " * (1 << 19)), *members[1:]])
    with pytest.raises(PackageError, match="524288 bytes; allowed"):
        read_manifest(huge)


def test_manifest_json_round_trip_keeps_the_value(package: Path) -> None:
    manifest = read_manifest(package)
    assert manifest_from_json(json.loads(canonical_json(manifest.to_json()))) == manifest
    assert manifest.model_sha256 == manifest.member(MODEL).sha256


def test_the_value_itself_holds_its_invariants(package: Path) -> None:
    manifest = read_manifest(package)
    bad = Golden(n=1, tolerances=(Tolerance(provider=CPU, max_abs_error=float("nan"), argmax_agreement=1.0),))
    with pytest.raises(PackageError, match="golden limits"):
        replace(manifest, golden=bad)
    with pytest.raises(PackageError, match="members"):
        ReleaseManifest(**{**{f: getattr(manifest, f) for f in manifest.__slots__}, "members": ()})


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\0" * 1024, b"-1".ljust(600, b"1")])
def test_a_file_that_is_no_package_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.qpkg").write_bytes(data)
    with pytest.raises(PackageError, match="not a package"):
        read_manifest(tmp_path / "x.qpkg")


LIMIT_RSS = """
import resource, sys
from pathlib import Path
from qcore.errors import PackageError
from qcore.release.package import unpack_package
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    unpack_package(Path(sys.argv[1]), Path(sys.argv[2]))
except PackageError as e:
    print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("pack", [zstandard.compress, undeclared], ids=["declared", "undeclared"])
def test_a_zstd_bomb_takes_no_memory(package: Path, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """256 MiB in a few kB: the reader's own process grows by less than its window and two chunks."""
    bomb = pack(bytes(1 << 28))
    bad = write_tar(tmp_path / "bomb.qpkg", with_golden(members_of(package), bomb, size_bytes=1 << 28))
    done = run_python(["-c", LIMIT_RSS, str(bad), str(tmp_path / "slot")])
    message, grown_kib = done.stdout.strip().splitlines()
    assert "bytes differ from the manifest" in message  # all of it was decoded, as its manifest says, and hashed
    assert int(grown_kib) < 24 << 10


@pytest.mark.parametrize("size", [(1 << 31) - 1, 1 << 31, (1 << 31) + 1, 1 << 32])
def test_around_two_gigabytes_the_first_field_decides_or_the_size(tmp_path: Path, size: int) -> None:
    """Sparse files: sizes are looked at before anything is read, hashed or allocated (RAUC's CVE-2026-34155)."""
    huge = tmp_path / "huge"
    with huge.open("wb") as f:
        f.truncate(size)
    with pytest.raises(
        ModelError, match="field 0" if size < 1 << 31 else f"has {size} bytes; admitted: 1 to 2147483647"
    ):
        admit_file(huge)
    if size >= 1 << 31:
        source = replace(package_source(tmp_path / "src"), model=huge)
        with pytest.raises(PackageError, match=f"has {size} bytes; allowed: 1 to 2147483647 for model.onnx"):
            build_package(source, tmp_path / "p.qpkg")
        assert not (tmp_path / "p.qpkg").exists()
    with pytest.raises(PackageError, match="not a package" if size <= MAX_PACKAGE_BYTES else "has 4294967296 bytes"):
        unpack_or_open(huge, size)


def unpack_or_open(path: Path, size: int) -> None:
    """Read the package as a device does, and as the gate does where that would not read gigabytes."""
    if size <= MAX_PACKAGE_BYTES:
        read_manifest(path)
        return
    with opened_package(path):
        pass


def test_a_manifest_cannot_claim_a_member_of_two_gigabytes(package: Path, tmp_path: Path) -> None:
    for key in ("size_bytes", "stored_size_bytes"):
        for value in (1 << 31, 1 << 63, 0, -1):
            listed = json.loads(members_of(package)[0][1])["members"]
            listed[3] |= {key: value}
            bad = write_tar(tmp_path / "bad.qpkg", with_manifest(members_of(package), {"members": listed}))
            with pytest.raises(PackageError, match=r"manifest: model\.onnx of"):
                read_manifest(bad)


SIGNER = CryptoSigner.generate_ed25519()


def edited(original: bytes, data: st.DataObject) -> bytes:
    """Return other bytes: one is flipped, added, taken away, or the end is cut or longer."""
    position = data.draw(st.integers(0, len(original) - 1), "position")
    byte = data.draw(st.integers(1, 255), "byte")
    match data.draw(st.sampled_from(["flip", "insert", "delete", "truncate", "append"]), "edit"):
        case "flip":
            return original[:position] + bytes([original[position] ^ byte]) + original[position + 1 :]
        case "insert":
            return original[:position] + bytes([byte]) + original[position:]
        case "delete":
            return original[:position] + original[position + 1 :]
        case "truncate":
            return original[:position]
        case _:
            return original + bytes([byte - 1])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_edit_is_refused_or_leaves_every_file_as_it_was(package: Path, data: st.DataObject) -> None:
    """The reader alone: what it accepts holds the same files; what else a manifest says, the signature holds."""
    bad = package.with_suffix(".changed")
    bad.write_bytes(edited(package.read_bytes(), data))
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        slot = Path(folder) / "slot"
        try:
            manifest = unpack_package(bad, slot)
        except PackageError as e:
            lines = str(e).splitlines()
            assert len(lines) == 1
            return
        files = {m.path: m.sha256 for m in manifest.members}
        assert files == {m.path: m.sha256 for m in read_manifest(package).members}
        assert files == {name: hashlib.sha256((slot / name).read_bytes()).hexdigest() for name in files}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_edited_package_is_one_that_the_gate_passed(package: Path, data: st.DataObject) -> None:
    """The release as a whole: whatever single byte changes, the signed evidence is about other bytes."""
    original = package.read_bytes()
    whole = Package(
        path=package,
        sha256=hashlib.sha256(original).hexdigest(),
        size_bytes=len(original),
        manifest=read_manifest(package),
    )
    evidence = sign_decision(about(whole), SIGNER)
    bad = package.with_suffix(".edited")
    bad.write_bytes(edited(original, data))
    try:
        with opened_package(bad) as opened:
            proof = Proof(sha256=opened.sha256, manifest=opened.manifest, evidence=evidence)
            with pytest.raises(GateRefused):
                check_evidence(proof, [SIGNER.public_key], now())
    except PackageError as e:
        lines = str(e).splitlines()
        assert len(lines) == 1
