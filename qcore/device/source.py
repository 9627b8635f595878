"""Where releases come from (a folder, a server, a bundle) behind tuf's fetcher interface, and the bounded download.

ngclient verifies metadata; targets are downloaded here, into a part file on the device's own disk, because ngclient
uses a temporary file elsewhere and never syncs. Resuming is not here yet.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError, LengthOrHashMismatchError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from qcore.device.bundle import BUNDLE_BASE, BundleFetcher
from qcore.device.config import BUNDLE_PREFIX, DeviceConfig
from qcore.device.refusals import refusal
from qcore.errors import ConfigError

CHUNK = 1 << 18
TIMEOUT_S = 30
RESERVE_BYTES = 1 << 20
"""Free space that an update leaves on the disk."""
LIMITS = UpdaterConfig(max_root_rotations=64, max_delegations=8, timestamp_max_length=8192, snapshot_max_length=1 << 19)


class FolderFetcher(FetcherInterface):
    """Reads a repository in a folder as if it were a server."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(url.removeprefix("file://"))
        try:
            f = path.open("rb")
        except FileNotFoundError as e:
            raise DownloadHTTPError(f"{path} is not there", 404) from e
        except OSError as e:
            raise DownloadError(f"{path} cannot be read: {e.strerror}") from e
        return _blocks(f)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A repository whose metadata are refreshed and verified."""

    updater: Updater
    fetcher: FetcherInterface
    targets_url: str

    def download(self, target: TargetFile, folder: Path) -> Path:
        """Return the part file with exactly the signed bytes of `target`, durable; a wrong one is removed.

        Raises:
            UpdateError: E_HASH or E_NOSPACE.
            DownloadError, OSError: the source or the disk failed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, target.length)
        part = folder / f"{target.hashes['sha256']}.part"
        received = 0
        with part.open("w+b") as f:
            for chunk in self.fetcher.fetch(f"{self.targets_url}/{target.get_prefixed_paths()[0]}"):
                received += len(chunk)
                if received > target.length:
                    break
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
            try:
                target.verify_length_and_hashes(f)
            except LengthOrHashMismatchError as e:
                part.unlink()
                raise refusal(
                    "E_HASH",
                    f"{target.path} differs from what was signed ({received} bytes received, {target.length} signed); "
                    "publish it again; the active model is unchanged",
                ) from e
        return part


def open_source(config: DeviceConfig) -> Source:
    """Return the repository after tuf verified its metadata from the pinned root on.

    Raises:
        ConfigError: the pinned root cannot be read.
        RepositoryError, DownloadError, OSError: as tuf raises them.
    """
    try:
        pinned = config.root.read_bytes()
    except OSError as e:
        raise ConfigError(
            f"root {config.root} cannot be read: {e.strerror}; copy the repository's root.json there"
        ) from e
    fetcher, base = _access(config.repository)
    cache = config.state_dir / "metadata"
    updater = Updater(str(cache), f"{base}/metadata/", fetcher=fetcher, config=LIMITS, bootstrap=pinned)
    updater.refresh()
    return Source(updater=updater, fetcher=fetcher, targets_url=f"{base}/targets")


def _access(repository: str) -> tuple[FetcherInterface, str]:
    """Return how `repository` is read, and the address of its top folder."""
    if repository.startswith(("http://", "https://")):
        return Urllib3Fetcher(socket_timeout=TIMEOUT_S), repository.rstrip("/")
    if repository.startswith(BUNDLE_PREFIX):
        return BundleFetcher(Path(repository.removeprefix(BUNDLE_PREFIX))), BUNDLE_BASE
    return FolderFetcher(), f"file://{repository}"


def require_space(folder: Path, needed_bytes: int) -> None:
    """Return if `folder` has room for `needed_bytes` and the reserve.

    Raises:
        UpdateError: E_NOSPACE.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + RESERVE_BYTES:
        raise refusal(
            "E_NOSPACE",
            f"{folder} has {free} bytes free, {needed_bytes + RESERVE_BYTES} are needed; free some space, try again",
        )


def _blocks(f: BufferedReader) -> Iterator[bytes]:
    with f:
        while block := f.read(CHUNK):
            yield block
