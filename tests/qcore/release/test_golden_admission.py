"""Golden samples are plain arrays of the stated sizes, or refused before numpy sees them."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulators import package_source

from qcore.errors import PackageError
from qcore.release.golden_admission import admit_golden
from qcore.release.manifest import ReleaseManifest
from qcore.release.package import build_package

GOOD = {"input:x": np.zeros((5, 4), np.float32), "output:y": np.ones((5, 3), np.float32)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ReleaseManifest:
    folder = tmp_path_factory.mktemp("package")
    return build_package(package_source(folder), folder / "p.qpkg").manifest


def npz(path: Path, arrays: dict[str, object], save: Callable[..., None] = np.savez) -> Path:
    save(path, **arrays)
    return path


def with_member(path: Path, content: bytes, **options: object) -> Path:
    """Write an npz whose input is `content`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input:x.npy", content, **options)  # type: ignore[arg-type]  # compression, by name
        buffer = io.BytesIO()
        np.save(buffer, GOOD["output:y"])
        archive.writestr("output:y.npy", buffer.getvalue())
    return path


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    width = 2 if version[0] == 1 else 4
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text + data


def header(shape: str = "(5, 4)", descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}   "


def refusal(path: Path, manifest: ReleaseManifest) -> str:
    with pytest.raises(PackageError) as e:
        admit_golden(path, manifest)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("kind", ["<f4", "<f2", "<f8", "|i1", "|u1", "<i8", "|b1", "<U7", "|S5", "<i4"])
@pytest.mark.parametrize("shape", [(5, 4), (5,), (5, 1, 2, 3), ()])
def test_what_numpy_writes_is_admitted(
    tmp_path: Path, manifest: ReleaseManifest, kind: str, shape: tuple[int, ...]
) -> None:
    admit_golden(npz(tmp_path / "g.npz", {**GOOD, "input:x": np.zeros(shape, kind)}), manifest)


def test_all_versions_of_the_format_are_read(tmp_path: Path, manifest: ReleaseManifest) -> None:
    for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        admit_golden(with_member(tmp_path / "g.npz", npy(header(), bytes(80), version)), manifest)


def test_pickles_are_refused_by_their_header(tmp_path: Path, manifest: ReleaseManifest) -> None:
    evil = np.array([{"a": 1}], dtype=object)
    assert "objects are never loaded" in refusal(npz(tmp_path / "g.npz", {**GOOD, "input:x": evil}), manifest)
    records = np.zeros(5, [("a", "<f4"), ("b", "O")])
    assert "objects are never loaded" in refusal(npz(tmp_path / "g.npz", {**GOOD, "input:x": records}), manifest)
    whole = with_member(tmp_path / "g.npz", b"\x80\x04\x95 a pickle in the place of an array")
    assert "not an .npy file" in refusal(whole, manifest)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(header("(999999999999, 4)"), bytes(80)), "wants 15999999999984"),
        (npy(header("(999999999999, 999999999999, 999999999999)"), bytes(80)), "wants 39999"),
        (npy(header("(5, 4)", "'<f999999'"), bytes(80)), "wants 19999980"),
        (npy(header("(9999999999999,)"), bytes(80)), "not one of plain numbers"),
        (npy(header("(-5, 4)"), bytes(80)), "not one of plain numbers"),
        (npy(header("(5, 4)", "'<M8[ns]'"), bytes(160)), "not one of plain numbers"),
        (npy(header("(5, 4)", "__import__('os')"), bytes(80)), "not one of plain numbers"),
        (npy("{" * 4000, bytes(80)), "not one of plain numbers"),
        (npy(header("(" + "1, " * 1300 + "1)"), bytes(4)), "1301 dimensions; allowed: 32"),
        (npy(header() + " " * 5000, bytes(80)), "a header of"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (npy(header(), bytes(79)), "79 bytes of values, shape (5, 4) wants 80"),
        (npy(header(), bytes(81)), "81 bytes of values"),
        (npy(header())[:20], "not one of plain numbers"),
        (npy(header(), bytes(80), b"\x04\x00"), "not an .npy file"),
        (b"", "not an .npy file"),
    ],
)
def test_headers_that_claim_what_is_not_there_are_refused(
    tmp_path: Path, manifest: ReleaseManifest, content: bytes, reason: str
) -> None:
    path = with_member(tmp_path / "g.npz", content)
    assert reason in refusal(path, manifest)


def test_deflated_bombs_are_refused(tmp_path: Path, manifest: ReleaseManifest) -> None:
    bomb = with_member(
        tmp_path / "g.npz", npy(header("(5, 1000000)"), bytes(20_000_000)), compress_type=zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 30_000
    assert "compressed inside the .npz" in refusal(bomb, manifest)
    assert "compressed" in refusal(npz(tmp_path / "g.npz", GOOD, np.savez_compressed), manifest)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"input:x": GOOD["input:x"]},
        {**GOOD, "input:z": np.zeros(1)},
        {**GOOD, "extra": np.zeros(1)},
        {"input:x": GOOD["input:x"], "output:z": GOOD["output:y"]},
    ],
)
def test_arrays_are_those_of_the_manifest(tmp_path: Path, manifest: ReleaseManifest, arrays: dict[str, object]) -> None:
    assert "golden.npz" not in refusal(npz(tmp_path / "g.npz", arrays), manifest)


def test_twice_the_same_array_and_other_numbers_of_samples_are_refused(
    tmp_path: Path, manifest: ReleaseManifest
) -> None:
    path = with_member(tmp_path / "g.npz", npy(header(), bytes(80)))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("input:x.npy", npy(header(), bytes(80)))
    assert "holds" in refusal(path, manifest)
    fewer = npz(tmp_path / "g.npz", {**GOOD, "output:y": np.ones((4, 3), np.float32)})
    assert "expected n=5" in refusal(fewer, manifest)


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"PK\x05\x06" + b"\xff" * 18, b"x" * 5000])
def test_files_that_are_no_archive_are_one_line(tmp_path: Path, manifest: ReleaseManifest, data: bytes) -> None:
    (tmp_path / "g.npz").write_bytes(data)
    refusal(tmp_path / "g.npz", manifest)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bent_samples_are_refused_or_load_as_plain_arrays(
    tmp_path: Path, manifest: ReleaseManifest, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **GOOD)  # type: ignore[arg-type]  # arrays by name
    bent = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(bent) - 1))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip":
                bent[position] ^= data.draw(st.integers(1, 255))
            case "insert":
                bent.insert(position, data.draw(st.integers(0, 255)))
            case "delete":
                del bent[position]
            case _:
                del bent[position + 1 :]
    path = tmp_path / "bent.npz"
    path.write_bytes(bent)
    try:
        admit_golden(path, manifest)
    except PackageError as e:
        lines = str(e).splitlines()
        assert len(lines) == 1
        return
    with np.load(path, allow_pickle=False) as loaded:
        names = set(loaded.files)
        try:
            arrays = {name: loaded[name] for name in names}
        except (zipfile.BadZipFile, ValueError):
            return  # a checksum, which only reading tells: the self-test's process says so
    assert names == set(GOOD)
    assert sum(a.nbytes for a in arrays.values()) <= len(bent)


def test_it_needs_the_standard_library_only() -> None:
    code = (
        "import sys, json; import qcore.release.golden_admission; "
        "print(json.dumps([m for m in ('numpy', 'onnx') if m in sys.modules]))"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) == []
