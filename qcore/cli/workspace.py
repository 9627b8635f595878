"""A workspace: the folder in which a laptop plays every part (signing keys, repository, tracking, one device)."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qcore.files import write_atomic

if TYPE_CHECKING:
    from qcore.device.updater import Installed


TIMESTAMP = "metadata/timestamp.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The embedded defaults below one folder: development keys, a folder as repository, sqlite tracking, a device."""

    folder: Path

    @property
    def keys(self) -> Path:
        """The development key ring."""
        return self.folder / "keys"

    @property
    def repository(self) -> Path:
        """The signed repository."""
        return self.folder / "repository"

    @property
    def runs(self) -> Path:
        """One folder per pipeline run."""
        return self.folder / "runs"

    @property
    def tracking_uri(self) -> str:
        """MLflow's database."""
        return f"sqlite:///{(self.folder / 'mlflow.db').absolute()}"


def prepare(folder: Path, channel: str) -> Workspace:
    """Return the workspace in `folder` with keys and repository, which are made if there are none."""
    workspace = Workspace(folder=folder)
    make_repository(workspace.repository, workspace.keys, [channel])
    return workspace


def make_repository(repository: str | Path, keys: Path, channels: list[str]) -> bool:
    """Make what is missing of keys and repository; return whether anything was.

    One process at a time, and again after a crash: keys without a repository get one, complete ones stay as they are.
    A store behind an address is proven first.

    Raises:
        ReleaseError: the store does not keep its conditions, or holds a repository of other keys.
    """
    from qcore.release.doctor import examine, refuse_unproven
    from qcore.release.keys import create_keys, load_keys
    from qcore.release.location import is_url, open_store
    from qcore.release.repository import init_repository

    keys.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(keys.parent):
        store = open_store(repository)
        if (keys / "root.json").exists() and store.get(TIMESTAMP) is not None:
            return False
        if is_url(repository):
            typer.echo(f"proving the conditional writes of {repository}", err=True)
            refuse_unproven(examine(store))
        if not any(keys.glob("*.pem")):
            typer.echo(f"making development keys in {keys}", err=True)
            create_keys(keys, channels)
        typer.echo(f"making an empty repository in {repository}", err=True)
        ring = load_keys(keys)
        init_repository(store, ring, list(ring.channels), now=datetime.now(UTC))
        return True


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder` while the block runs; others wait."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def refresh(workspace: Workspace) -> None:
    """Sign again what nears its expiry, as the scheduled job of a real repository does."""
    from qcore.release.keys import load_keys
    from qcore.release.location import open_store
    from qcore.release.repository import refresh as sign_again

    sign_again(open_store(workspace.repository), load_keys(workspace.keys), now=datetime.now(UTC))


def install_on_device(
    device: Path, *, repository: Path, root: Path, family: str, channel: str, hardware: str
) -> "Installed":
    """Return what the local device in the folder `device` runs after its updater did its work.

    The device is configured by `device/device.toml`, written once, and trusts its own copy of the root metadata.
    """
    from qcore.device.config import DeviceConfig
    from qcore.device.updater import install

    pinned = device / "root.json"
    if not pinned.exists():
        write_atomic(pinned, root.read_bytes())
    config = device / "device.toml"
    write_atomic(config, _toml(device.absolute(), repository.absolute(), family, channel, hardware).encode())
    return install(
        DeviceConfig(
            device_id=device_name(family, hardware),
            hardware=hardware,
            family=family,
            channel=channel,
            repository=str(repository.absolute()),
            root=pinned.absolute(),
            state_dir=(device / "state").absolute(),
        )
    )


def device_name(family: str, hardware: str) -> str:
    """Return a stable name for the local device."""
    return f"local-{family}-{hardware}"[:64].rstrip("-._")


def _toml(device: Path, repository: Path, family: str, channel: str, hardware: str) -> str:
    values = {
        "device_id": device_name(family, hardware),
        "hardware": hardware,
        "family": family,
        "channel": channel,
        "repository": str(repository),
        "root": str(device / "root.json"),
        "state_dir": str(device / "state"),
    }
    quoted = {k: v.replace("\\", "\\\\").replace('"', '\\"') for k, v in values.items()}
    return "".join(f'{k} = "{v}"\n' for k, v in quoted.items())
