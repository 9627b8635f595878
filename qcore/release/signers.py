"""Where a private key lies: in a PEM file, plain or encrypted, or in a service that signs and never shows it.

A service is named by a URI of securesystemslib (`awskms:`, `gcpkms:`, `azurekms:`, `hv:` of Vault, `hsm:`), kept with
the public key in `NAME.signer.json`, so that nothing has to be asked to know what may be trusted. The passphrase of
encrypted files comes from the environment: a secret that is mounted as a file, or a variable.
"""

import json
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, SecretsHandler, Signature, Signer

from qcore.canonical import Json, canonical_json
from qcore.errors import ReleaseError

SIGNER_SCHEMA = "qcore.signer/1"
SERVICE_SUFFIX = ".signer.json"
PASSPHRASE = "QCORE_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
PASSPHRASE_FILE = "QCORE_KEY_PASSPHRASE_FILE"  # noqa: S105 - the same
SCHEMES = ("awskms", "azurekms", "gcpkms", "hsm", "hv")
"""Services that may hold a key. `file2:` is left out: it reads plain PEM only, which a `.pem` in the ring is."""


def read_passphrase() -> bytes | None:
    """Return the passphrase that the environment gives, None if it gives none.

    Raises:
        ReleaseError: the file that QCORE_KEY_PASSPHRASE_FILE names cannot be read, or is empty.
    """
    if path := os.environ.get(PASSPHRASE_FILE):
        try:
            found = Path(path).read_bytes().rstrip(b"\r\n")
        except OSError as e:
            raise ReleaseError(f"{PASSPHRASE_FILE} names {path}, which cannot be read: {e.strerror}; mount it") from e
        if not found:
            raise ReleaseError(f"{PASSPHRASE_FILE} names {path}, which is empty; write the passphrase into it")
        return found
    return os.environb.get(PASSPHRASE.encode()) or None


def new_key(passphrase: bytes | None) -> tuple[bytes, bytes]:
    """Return a new ed25519 key as PEM: the private half (PKCS8, encrypted with a passphrase), and the public."""
    key = Ed25519PrivateKey.generate()
    hidden = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signer_of_pem(path: Path) -> Signer:
    """Return the signer of the private key in the PEM file `path`.

    Raises:
        ReleaseError: it is missing, encrypted without the right passphrase, no private key, or of a type that cannot
            sign.
    """
    data = _read(path)
    encrypted = b"ENCRYPTED" in data
    passphrase = read_passphrase() if encrypted else None
    if encrypted and passphrase is None:
        raise ReleaseError(
            f"signing key {path} is encrypted; set {PASSPHRASE_FILE} to a file that holds its passphrase, or "
            f"{PASSPHRASE} to the passphrase"
        )
    try:
        return CryptoSigner(load_pem_private_key(data, passphrase))
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        if encrypted:
            raise ReleaseError(f"signing key {path} does not open with the passphrase that is set; set its own") from e
        raise ReleaseError(
            f"{path} is not a PEM private key (PKCS8, ed25519); pass the .pem file that `qcore repo init` made"
        ) from e


def signer_of_service(path: Path) -> Signer:
    """Return the signer that the file `path` (`qcore.signer/1`) names; the service is asked when something is signed.

    Raises:
        ReleaseError: the file is missing or damaged, or the service's library is not installed.
    """
    try:
        value = json.loads(_read(path))
        if value["schema"] != SIGNER_SCHEMA:
            raise ValueError(f"schema {value['schema']!r}")
        uri, public = value["uri"], Key.from_dict(value["public_key"]["keyid"], dict(value["public_key"]["key"]))
        _check_scheme(uri)
        return ServiceSigner(uri, Signer.from_priv_key_uri(uri, public))
    except UnsupportedLibraryError as e:
        raise ReleaseError(f"{path}: {e}; install securesystemslib with that service's extra") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ReleaseError(
            f"{path} does not name a signer ({e!r}); write it with `qcore repo import-key`, which asks the service"
        ) from e


class ServiceSigner(Signer):
    """A signer in a service, whose failures are one line: what could not be asked, and what it said."""

    def __init__(self, uri: str, inner: Signer) -> None:
        """Pass on to `inner`, which `uri` names."""
        self.uri, self.inner = uri, inner

    @property
    def public_key(self) -> Key:
        """The public key that was kept beside the URI."""
        return self.inner.public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> "ServiceSigner":
        """Return the signer of `priv_key_uri`, as securesystemslib wants it of every signer."""
        return cls(priv_key_uri, Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler))

    def sign(self, payload: bytes) -> Signature:
        """Return the service's signature of `payload`.

        Raises:
            ReleaseError: the service did not sign.
        """
        try:
            return self.inner.sign(payload)
        except _service_errors() as e:
            raise ReleaseError(
                f"{self.uri} did not sign: {' '.join(str(e).split())}; check the key's state and your right to sign"
            ) from e


def service_entry(uri: str) -> bytes:
    """Return the content of a `.signer.json`: `uri`, and the public key, which the service is asked for.

    Raises:
        ReleaseError: another scheme, or the service does not answer with a key.
    """
    scheme, _, name = uri.partition(":")
    try:
        _check_scheme(uri)
        importer = getattr(SIGNER_FOR_URI_SCHEME[scheme], "import_")  # noqa: B009 - not of the base class
        stated, public = importer(name) if scheme not in ("hsm",) else importer()
    except UnsupportedLibraryError as e:
        raise ReleaseError(f"{uri}: {e}; install securesystemslib with that service's extra") from e
    except ValueError as e:
        raise ReleaseError(f"{uri}: {e}; pass a URI such as awskms:alias/qcore-gate") from e
    except _service_errors() as e:
        raise ReleaseError(f"{uri} cannot be asked: {' '.join(str(e).split())}; check its name and your access") from e
    entry: Json = {
        "schema": SIGNER_SCHEMA,
        "uri": stated,
        "public_key": {"keyid": public.keyid, "key": public.to_dict()},
    }
    return canonical_json(entry) + b"\n"


def _service_errors() -> tuple[type[Exception], ...]:
    """Return what signing in a service may raise: errors of securesystemslib, of the network, and of AWS's library."""
    try:
        from botocore import exceptions
    except ImportError:
        return (SecureSystemsError, OSError)
    return (SecureSystemsError, OSError, exceptions.BotoCoreError, exceptions.ClientError)


def _check_scheme(uri: str) -> None:
    scheme = uri.partition(":")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}; allowed: {', '.join(SCHEMES)}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ReleaseError(
            f"signing key {path} cannot be read: {e.strerror}; correct the path, or make a "
            "development ring with `qcore repo init`, a key of its own with `qcore repo new-key`"
        ) from e
