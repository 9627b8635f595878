"""The key ring: one signer per role, in a folder that is readable by the owner only.

`create_keys` makes a whole development ring in one folder: ed25519, PKCS8 PEM. In production each role's key lives with
one service, so a ring may hold a subset; a function that needs a missing key says which. Nothing here decides what a
key may sign: the signed root and targets metadata do (`repository.py`). Where a key lies is in `signers.py`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import Key, Signer, SSlibKey
from tuf.api.metadata import Root

from qcore.errors import ReleaseError
from qcore.files import fsync_dir, write_atomic
from qcore.release.manifest import check_name
from qcore.release.signers import (
    SERVICE_SUFFIX,
    new_key,
    read_passphrase,
    service_entry,
    signer_of_pem,
    signer_of_service,
)

ROOT_NAMES = ("root1", "root2", "root3")
"""Offline keys of the roles root and targets."""
ROOT_THRESHOLD = 2
ONLINE_NAMES = ("gate", "publisher", "snapshot", "timestamp")
OLD = ".old"
"""Behind the name of a key that is being rotated out; only snapshot and timestamp have a time with both keys."""
NEW = ".new"
"""Behind the name of a key that is made for a rotation which is not finished; it signs nothing yet."""
GATE = "gate"
PUBLIC_GATE = "gate.pub"
"""The gate's public key, for whoever checks evidence without the repository."""
PINNED_ROOT = "root.json"
"""The trusted root metadata beside the keys: what the repository is verified against, and what devices pin."""

README = """DEVELOPMENT KEYS

Made by qcore for one machine: every role's private key lies in this folder, so whoever reads it (and knows the
passphrase, if one was set when they were made) can publish anything. Never copy it to a shared disk or into git. In
production the root keys are made offline and each online role has its own key service.

root1-3.pem      roles root and targets, any 2 of 3 sign
gate.pem         signs gate decisions, and each release as the co-signer
gate.pub         its public half, for `qcore gate verify`; no secret
publisher.pem    signs each release as the publisher
channel-*.pem    one per channel: which release devices are pointed at
snapshot.pem, timestamp.pem    freshness
root.json        (made by the repository) the trusted root that devices pin
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRing:
    """The signers found in `folder`, by file name without `.pem` or `.signer.json`."""

    folder: Path
    signers: Mapping[str, Signer]

    def signer(self, name: str) -> Signer:
        """Return the signer `name`.

        Raises:
            ReleaseError: the ring does not hold it.
        """
        if name not in self.signers:
            held = ", ".join(sorted(self.signers)) or "none"
            raise ReleaseError(
                f"signing key {self.folder / name}.pem is missing; held: {held}; "
                "run this where that key is, make it with `qcore repo new-key`, "
                "or make a development ring with `qcore repo init`"
            )
        return self.signers[name]

    def public_key(self, name: str) -> Key:
        """Return the public key of `name`: of the signer that is held, else of the file `name.pub` beside the ring.

        Raises:
            ReleaseError: there is neither.
        """
        public = self.folder / f"{name}.pub"
        return load_public_key(public) if name not in self.signers and public.exists() else self.signer(name).public_key

    def channel(self, channel: str) -> Signer:
        """Return the signer of the channel `channel`."""
        return self.signer(f"channel-{channel}")

    def for_role(self, name: str, root: Root) -> tuple[Signer, ...]:
        """Return the signers of the top role `name` that `root` trusts: two while its key is being rotated.

        Raises:
            ReleaseError: none of them is held.
        """
        known = root.roles[name].keyids
        held = [self.signers[n] for n in (name, f"{name}{OLD}") if n in self.signers]
        trusted = tuple(s for s in held if s.public_key.keyid in known)
        return trusted or (self.signer(name),)  # a wrong key is refused where its signature is verified

    @property
    def root(self) -> tuple[Signer, ...]:
        """The root signers held here; empty on a machine that only publishes."""
        return tuple(self.signers[n] for n in ROOT_NAMES if n in self.signers)

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels whose key is held here."""
        return tuple(sorted(n.removeprefix("channel-") for n in self.signers if n.startswith("channel-")))

    @property
    def pinned_root(self) -> Path:
        """Where the trusted root metadata lies."""
        return self.folder / PINNED_ROOT


def create_keys(folder: Path, channels: Sequence[str]) -> KeyRing:
    """Return a new development ring: three root keys, four online keys, and one key per channel.

    The files are encrypted if the environment gives a passphrase (`signers.read_passphrase`).

    Args:
        folder: made if missing, mode 0700; a key that exists in it is never overwritten.
        channels: channel names, at least one, of `[a-z0-9._-]`.

    Raises:
        ReleaseError: a key exists already, a channel name is not allowed, or the folder cannot be written.
    """
    if not channels:
        raise ReleaseError("no channel named; allowed: at least one; name the channel that devices follow, e.g. stable")
    for channel in channels:
        check_name("channel", channel, ReleaseError)
    names = [*ROOT_NAMES, *ONLINE_NAMES, *(f"channel-{c}" for c in dict.fromkeys(channels))]
    for name in names:
        for path in (folder / f"{name}.pem", folder / f"{name}{SERVICE_SUFFIX}"):
            if path.exists():
                raise ReleaseError(f"{path} exists and is never overwritten; pass an empty folder")
    try:
        if folder.exists() and any(folder.iterdir()):
            _write_ring(folder, names)
        else:  # a ring is there whole or not at all, wherever this is interrupted
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
            _write_ring(made, names)
            made.rename(folder)
            fsync_dir(folder.parent)
    except OSError as e:
        raise ReleaseError(f"keys cannot be written to {folder}: {e.strerror}; pass a folder you can write to") from e
    return load_keys(folder)


def _write_ring(folder: Path, names: Sequence[str]) -> None:
    if not (folder / "README.txt").exists():
        write_atomic(folder / "README.txt", README.encode())
    passphrase = read_passphrase()
    for name in names:
        private, public = new_key(passphrase)
        _write_private(folder / f"{name}.pem", private)
        if name == GATE:
            write_atomic(folder / PUBLIC_GATE, public)
    fsync_dir(folder)


def load_keys(folder: Path) -> KeyRing:
    """Return the ring of the keys that lie in `folder`; it may be a part of a ring.

    Raises:
        ReleaseError: no such folder, no key in it, or a file that is not a private key.
    """
    ring = load_ring(folder)
    if not ring.signers:
        raise ReleaseError(
            f"no signing keys in {folder}; expected *.pem or *.signer.json; make them with `qcore repo init`"
        )
    return ring


def load_ring(folder: Path) -> KeyRing:
    """Return the ring in `folder`, which may hold no private key at all: only the pinned root and public keys.

    Raises:
        ReleaseError: a file in it is not a private key, or one is there twice.
    """
    signers: dict[str, Signer] = {}
    for suffix in (".pem", SERVICE_SUFFIX):
        names = (*ROOT_NAMES, *ONLINE_NAMES, f"snapshot{OLD}", f"timestamp{OLD}")
        paths = [folder / f"{n}{suffix}" for n in names]
        spare = (f"{NEW}{suffix}", f"{OLD}{suffix}")
        channels = (p for p in sorted(folder.glob(f"channel-*{suffix}")) if not p.name.endswith(spare))
        for path in (*(p for p in paths if p.exists()), *channels):
            name = path.name.removesuffix(suffix)
            if name in signers:
                raise ReleaseError(f"{folder} holds {name} twice, as file and in a service; remove one of them")
            signers[name] = load_signer(path)
    return KeyRing(folder=folder, signers=signers)


def load_signer(path: Path) -> Signer:
    """Return the signer that the file `path` holds (`.pem`) or names (`.signer.json`); of a folder, the gate's in it.

    Raises:
        ReleaseError: the file is missing, damaged or does not open; see `signer_of_pem` and `signer_of_service`.
    """
    if path.is_dir():
        return load_keys(path).signer(GATE)
    return signer_of_service(path) if path.name.endswith(SERVICE_SUFFIX) else signer_of_pem(path)


def import_signer(folder: Path, name: str, uri: str) -> Path:
    """Return the file in `folder` that now names the key service's key `uri` as the signer `name`.

    Raises:
        ReleaseError: there is no such role, it has a key already, or the service does not answer.
    """
    refuse_unknown_name(name)
    path = folder / f"{name}{SERVICE_SUFFIX}"
    for held in (folder / f"{name}.pem", path):
        if held.exists():
            raise ReleaseError(f"{held} exists and is never overwritten; move it away first")
    entry = service_entry(uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, entry)
        if name == GATE:
            write_atomic(folder / PUBLIC_GATE, json.loads(entry)["public_key"]["key"]["keyval"]["public"].encode())
    except OSError as e:
        raise ReleaseError(f"{path} cannot be written: {e.strerror}; pass a folder you can write to") from e
    return path


def refuse_unknown_name(name: str) -> None:
    """Refuse a key name that no role has.

    Raises:
        ReleaseError: it is none of the ring's names.
    """
    roles = (*ROOT_NAMES, *ONLINE_NAMES)
    if name not in roles and not name.startswith("channel-"):
        raise ReleaseError(f"no role signs with a key named {name!r}; allowed: {', '.join(roles)}, channel-NAME")
    check_name("signer", name, ReleaseError)


def create_key(path: Path) -> Signer:
    """Return the signer of a new ed25519 key in `path`, readable by the owner only; an existing file stays as it is.

    Raises:
        ReleaseError: `path` exists or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_private(path, new_key(read_passphrase())[0])
        fsync_dir(path.parent)
    except FileExistsError as e:
        raise ReleaseError(f"{path} exists and is never overwritten; pass another path") from e
    except OSError as e:
        raise ReleaseError(f"key {path} cannot be written: {e.strerror}; pass a path you can write to") from e
    return load_signer(path)


def fresh_key(folder: Path, name: str, given: Path | None = None) -> Signer:
    """Return the key that shall replace `name`, in `name.new.pem`: made here, or a copy of the file `given`.

    One that an interrupted rotation left is taken up again.

    Raises:
        ReleaseError: it cannot be written.
    """
    suffix = SERVICE_SUFFIX if given is not None and given.name.endswith(SERVICE_SUFFIX) else ".pem"
    path = folder / f"{name}{NEW}{suffix}"
    if path.exists():
        return load_signer(path)
    if given is None:
        return create_key(path)
    load_signer(given)
    try:
        _write_private(path, given.read_bytes())
        fsync_dir(folder)
    except OSError as e:
        raise ReleaseError(f"{path} cannot be written: {e.strerror}; pass a folder you can write to") from e
    return load_signer(path)


def adopt_key(folder: Path, name: str) -> None:
    """Make the key in `name.new` the key `name`; the former one becomes `name.old`. Done already is success.

    Raises:
        ReleaseError: the files cannot be renamed.
    """
    suffixes = (".pem", SERVICE_SUFFIX)
    try:
        fresh = [folder / f"{name}{NEW}{s}" for s in suffixes if (folder / f"{name}{NEW}{s}").exists()]
        for suffix in suffixes if fresh else ():
            held = folder / f"{name}{suffix}"
            if held.exists():
                held.replace(folder / f"{name}{OLD}{suffix}")
        for path in fresh:
            path.replace(folder / path.name.replace(NEW, "", 1))
        fsync_dir(folder)
        if name == GATE:
            write_atomic(folder / PUBLIC_GATE, public_pem(load_keys(folder).signer(GATE).public_key))
    except OSError as e:
        raise ReleaseError(f"keys in {folder} cannot be renamed: {e.strerror}; check the folder, rotate again") from e


def retire_key(folder: Path, name: str) -> None:
    """Move `name.old` out of the ring, into its folder `retired`; keys are never deleted here.

    Raises:
        ReleaseError: it cannot be moved.
    """
    try:
        for suffix in (".pem", SERVICE_SUFFIX):
            path = folder / f"{name}{OLD}{suffix}"
            if path.exists():
                keyid = load_signer(path).public_key.keyid
                (folder / "retired").mkdir(mode=0o700, exist_ok=True)
                path.replace(folder / "retired" / f"{name}-{keyid[:8]}{suffix}")
        fsync_dir(folder)
    except OSError as e:
        raise ReleaseError(f"keys in {folder} cannot be moved: {e.strerror}; check the folder") from e


def public_pem(key: Key) -> bytes:
    """Return the public `key` as PEM."""
    public = str(key.keyval["public"])
    if key.keytype != "ed25519":
        return public.encode()
    crypto = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    return crypto.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_public_key(path: Path) -> Key:
    """Return the public key in the PEM file `path`, or the public half of a private one.

    Raises:
        ReleaseError: the file is missing or holds neither.
    """
    try:
        data = path.read_bytes()
        if b"PRIVATE KEY" in data or path.name.endswith(SERVICE_SUFFIX):
            return load_signer(path).public_key
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except OSError as e:
        raise ReleaseError(f"public key {path} cannot be read: {e.strerror}; correct the path") from e
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ReleaseError(f"{path} is not a public key in PEM; pass gate.pub of the gate's keys") from e


def _write_private(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
