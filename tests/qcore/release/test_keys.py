"""Keys: made once, readable by the owner only, never overwritten; every wrong file is named in one line."""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from simulators import World

from qcore.errors import ReleaseError
from qcore.release.keys import create_keys, import_signer, load_keys, load_public_key, load_signer
from qcore.release.repository import init_repository, status
from qcore.release.signers import service_entry
from qcore.release.store import DirectoryStore


def test_a_ring_has_every_role_and_comes_back_the_same(tmp_path: Path) -> None:
    made = create_keys(tmp_path / "keys", ["stable", "beta"])
    loaded = load_keys(tmp_path / "keys")
    assert {n: s.public_key for n, s in loaded.signers.items()} == {n: s.public_key for n, s in made.signers.items()}
    assert len(loaded.root) == 3
    assert loaded.channels == ("beta", "stable")
    assert len({s.public_key.keyid for s in loaded.signers.values()}) == 9


def test_private_keys_are_for_the_owner_and_marked_as_development_keys(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys", ["stable"])
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "keys").glob("*.pem")} == {0o600}
    assert "DEVELOPMENT KEYS" in (tmp_path / "keys" / "README.txt").read_text()


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path, ["stable"])
    before = (tmp_path / "root1.pem").read_bytes()
    with pytest.raises(ReleaseError, match=r"root1\.pem exists"):
        create_keys(tmp_path, ["beta"])
    assert (tmp_path / "root1.pem").read_bytes() == before
    assert not (tmp_path / "channel-beta.pem").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_not_a_private_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gate.pem").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"gate\.pem is not a PEM private key"):
        load_signer(tmp_path / "gate.pem")


def test_missing_file_and_missing_role_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"gate\.pem cannot be read: No such file"):
        load_signer(tmp_path / "gate.pem")
    with pytest.raises(ReleaseError, match="no signing keys in"):
        load_keys(tmp_path)
    create_keys(tmp_path, ["stable"])
    (tmp_path / "publisher.pem").unlink()
    with pytest.raises(ReleaseError, match=r"publisher\.pem is missing; held: ") as e:
        load_keys(tmp_path).signer("publisher")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", "../x", "Stable", "a/b", ".hidden", "x.", "a..b", "x" * 65, "é"])
def test_channel_names_that_are_not_safe_in_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReleaseError, match=r"channel .* is not allowed"):
        create_keys(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()


@pytest.fixture
def passphrase(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QCORE_KEY_PASSPHRASE", "correct horse é")
    return "correct horse é"


def test_with_a_passphrase_every_key_is_encrypted_and_opens_with_it_alone(
    tmp_path: Path, passphrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_keys(tmp_path / "keys", ["stable"])
    files = sorted((tmp_path / "keys").glob("*.pem"))
    assert len(files) == 8
    assert all(f.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") for f in files)
    monkeypatch.delenv("QCORE_KEY_PASSPHRASE")
    with pytest.raises(ReleaseError, match="is encrypted; set QCORE_KEY_PASSPHRASE_FILE"):
        load_keys(tmp_path / "keys")
    secret = tmp_path / "passphrase"
    monkeypatch.setenv("QCORE_KEY_PASSPHRASE_FILE", str(secret))
    with pytest.raises(ReleaseError, match="cannot be read: No such file"):
        load_keys(tmp_path / "keys")
    secret.write_text("\n")
    with pytest.raises(ReleaseError, match="which is empty"):
        load_keys(tmp_path / "keys")
    secret.write_text("wrong\n")
    with pytest.raises(ReleaseError, match="does not open with the passphrase") as e:
        load_keys(tmp_path / "keys")
    assert "wrong" not in str(e.value)
    secret.write_text(f"{passphrase}\n")
    loaded = load_keys(tmp_path / "keys")
    assert loaded.signer("gate").public_key == made.signer("gate").public_key
    loaded.signer("gate").public_key.verify_signature(made.signer("gate").sign(b"x"), b"x")


class Kms(BaseHTTPRequestHandler):
    """GetPublicKey and Sign of AWS KMS (JSON 1.1) for one P-256 key, as its API reference says; keys by alias."""

    keys: ClassVar[dict[str, ec.EllipticCurvePrivateKey]] = {}

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.keys.get(asked["KeyId"])
        if key is None:
            said = {"__type": "NotFoundException", "message": f"Alias {asked['KeyId']} is not found."}
        elif self.headers["X-Amz-Target"] == "TrentService.GetPublicKey":
            der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            said = {"PublicKey": base64.b64encode(der).decode(), "SigningAlgorithms": ["ECDSA_SHA_256"]}
        else:
            assert (asked["MessageType"], asked["SigningAlgorithm"]) == ("DIGEST", "ECDSA_SHA_256")
            signed = key.sign(base64.b64decode(asked["Message"]), ec.ECDSA(Prehashed(SHA256())))
            said = {"Signature": base64.b64encode(signed).decode()}
        body = json.dumps(said).encode()
        self.send_response(400 if key is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A key service on this machine that boto3 talks to; returns the URI of its key."""
    monkeypatch.setattr(Kms, "keys", {"alias/qcore-gate": ec.generate_private_key(ec.SECP256R1())})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kms)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    yield "awskms:alias/qcore-gate"
    server.shutdown()
    server.server_close()


def test_a_key_in_a_service_signs_like_one_in_a_file(tmp_path: Path, kms: str) -> None:
    create_keys(tmp_path, ["stable"])
    with pytest.raises(ReleaseError, match=r"gate\.pem exists and is never overwritten"):
        import_signer(tmp_path, "gate", kms)
    with pytest.raises(ReleaseError, match="no role signs with a key named 'gates'"):
        import_signer(tmp_path, "gates", kms)
    (tmp_path / "gate.pem").unlink()
    assert import_signer(tmp_path, "gate", kms) == tmp_path / "gate.signer.json"
    ring = load_keys(tmp_path)
    signature = ring.signer("gate").sign(b"payload")
    ring.signer("gate").public_key.verify_signature(signature, b"payload")
    assert load_public_key(tmp_path / "gate.pub").keyid == ring.signer("gate").public_key.keyid
    store = DirectoryStore(folder=tmp_path / "repository")
    init_repository(store, ring, ["stable"], now=datetime.now(UTC))
    World(folder=tmp_path, store=store, keys=ring).publish()  # a models role, which gate and publisher must sign
    assert [r.threshold for r in status(store, now=datetime.now(UTC)) if r.role == "models-digits"] == [2]


def test_a_service_that_refuses_is_one_line(tmp_path: Path, kms: str) -> None:
    with pytest.raises(ReleaseError, match=r"cannot be asked: .*alias/other"):
        service_entry("awskms:alias/other")
    with pytest.raises(ReleaseError, match="scheme 'file2'; allowed: awskms"):
        service_entry("file2:/etc/passwd")
    path = tmp_path / "gate.signer.json"
    path.write_bytes(service_entry(kms))
    signer = load_signer(path)
    Kms.keys.clear()
    with pytest.raises(ReleaseError, match="awskms:alias/qcore-gate did not sign") as e:
        signer.sign(b"payload")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"schema": "qcore.signer/1"}',
        '{"schema": "qcore.signer/1", "uri": "file2:/x", "public_key": {"keyid": "a", "key": {}}}',
        '{"schema": "qcore.signer/1", "uri": 5, "public_key": {"keyid": "a", "key": {"keytype": "x", "scheme": "y"}}}',
    ],
)
def test_a_damaged_signer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "gate.signer.json").write_text(content)
    with pytest.raises(ReleaseError, match=r"gate\.signer\.json does not name a signer"):
        load_keys(tmp_path)


def test_a_key_is_in_a_file_or_in_a_service(tmp_path: Path, kms: str) -> None:
    create_keys(tmp_path, ["stable"])
    (tmp_path / "gate.signer.json").write_bytes(service_entry(kms))
    with pytest.raises(ReleaseError, match="holds gate twice"):
        load_keys(tmp_path)
