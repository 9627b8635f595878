"""A publisher that is killed: `python killed_publisher.py LOCATION KEYS PACKAGE EVIDENCE N`.

It dies by SIGKILL at the N-th durable operation on the store: in a folder right before it changes a name or opens a
file to write (so that everything before it is done), in S3 right after the server acknowledged a write. With fewer
operations than N it publishes and exits with 0.
"""

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from qcore.release.keys import load_keys
from qcore.release.location import open_store
from qcore.release.proposal import Submission
from qcore.release.repository import publish_release
from qcore.release.store import DirectoryStore

CHANGES = ("os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir")


def main(location: str, keys: str, package: str, evidence: str, n: str) -> None:
    """Publish, or die on the way."""
    left = int(n)

    def count(*_: object, **__: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and str(args[0]).startswith(location):
            count()

    store = open_store(location)
    ring = load_keys(Path(keys))
    submission = Submission(package=Path(package), evidence=Path(evidence).read_bytes())
    if isinstance(store, DirectoryStore):
        sys.addaudithook(audit)
    else:
        store.client.meta.events.register("after-call.s3.PutObject", count)  # type: ignore[attr-defined]  # an S3Store
    publish_release(store, submission, ring, now=datetime.now(UTC))


if __name__ == "__main__":
    main(*sys.argv[1:])
