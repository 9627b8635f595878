"""Where a repository is said to lie: a folder, or the address of an S3 bucket; and the store that is opened there.

boto3 is loaded only when an address asks for it, so folders need nothing but the standard library.
"""

import re
from pathlib import Path

from qcore.errors import ReleaseError
from qcore.release.store import DirectoryStore, ErasableStore

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def open_store(location: str | Path) -> ErasableStore:
    """Return the store at `location`: a folder (made by the first write), or `s3://bucket/prefix`.

    Raises:
        ReleaseError: another scheme, an address that is not of this form, or boto3 is missing.
    """
    if not is_url(location):
        return DirectoryStore(folder=Path(location))
    try:
        from qcore.release.s3 import open_s3
    except ModuleNotFoundError as e:
        raise ReleaseError(
            f"store: package {e.name} is not installed; s3:// addresses need it; pip install 'kfp-qcore[s3]'"
        ) from e
    return open_s3(str(location))


def is_url(location: str | Path) -> bool:
    """Return whether `location` is an S3 address; False: a folder.

    Raises:
        ReleaseError: it has another scheme, or is an address that was made a Path (which loses a slash).
    """
    scheme = _SCHEME.match(str(location))
    if scheme is None:
        return False
    if not str(location).startswith("s3://"):
        raise ReleaseError(
            f"repository: an address that begins with {scheme[0]} cannot be written to; allowed: a folder, or "
            "s3://bucket/prefix as text; devices read the same repository over http(s)"
        )
    return True


def absolute_location(location: str | Path) -> str:
    """Return `location` as a process in another working folder finds it."""
    return str(location) if is_url(location) else str(Path(location).absolute())
