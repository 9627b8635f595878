"""The canary: what was just published, read by the client that devices have, before anyone says that it is out.

Three clients read the new state: one that knows nothing but the pinned root, one that holds the state before, and one
whose clock is at three quarters of the timestamp's life, when the next refresh must long have happened.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from qcore.errors import ReleaseError

LATE = 0.75
BASE = "memory:///"
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
TIMESTAMP_KEY = "metadata/timestamp.json"
"""The one object of a repository that changes."""


class MemoryFetcher(FetcherInterface):
    """Hands out the metadata files of one state, by store key."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Serve `files`."""
        self.files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        key = url.removeprefix(BASE)
        if key not in self.files:
            raise DownloadHTTPError(f"{key} is not there", 404)
        return iter([self.files[key]])


def refuse_unreadable(
    pinned: bytes, before: Mapping[str, bytes], after: Mapping[str, bytes], paths: Iterable[str], now: datetime
) -> None:
    """Return if clients can read the state `after` and find each of `paths` in it.

    Args:
        pinned: the root metadata that clients are given.
        before: metadata files of the state before, by store key.
        after: those of the new state.
        paths: target paths that must be found.
        now: aware.

    Raises:
        ReleaseError: one cannot; which, and why.
    """
    expires = Metadata[Timestamp].from_bytes(after[TIMESTAMP_KEY]).signed.expires
    late = now + LATE * max(expires - now, timedelta(0))
    wanted = list(paths)
    for who, at, known in (
        ("a new client", now, None),
        ("a client that knows the state before", now, before),
        (f"a client at {late:%Y-%m-%d %H:%M}", late, None),
    ):
        with tempfile.TemporaryDirectory(prefix="qcore-canary-") as folder:
            try:
                if known is not None:
                    _client(folder, pinned, known, LONG_AGO).refresh()
                client = _client(folder, pinned, after, at)
                client.refresh()
                missing = [p for p in wanted if client.get_targetinfo(p) is None]
            except (RepositoryError, DownloadError) as e:
                raise ReleaseError(
                    f"committed, but {who} cannot read it ({e}); mend the repository: `qcore repo status` shows what "
                    "expires, `qcore repo refresh` signs again"
                ) from e
        if missing:
            raise ReleaseError(f"committed, but {who} does not find {missing[0]}; mend the delegations")


def _client(folder: str, pinned: bytes, files: Mapping[str, bytes], at: datetime) -> Updater:
    """Return a client whose clock says `at`; tuf reads the clock in a private place, so this is the only one here."""
    client = Updater(folder, f"{BASE}metadata/", fetcher=MemoryFetcher(files), bootstrap=pinned)
    client._trusted_set.reference_time = at
    return client
