"""One line per refusal, beginning with a short code that a fleet can count; and the codes of foreign errors.

E_HASH: bytes differ from what was signed. E_STALE: signatures expired. E_ROLLBACK: older than what was seen, or below
the floor. E_UNSIGNED: too few trusted signatures. E_METADATA: unusable metadata. E_PACKAGE: not a package of ours.
E_MODEL: a model that is not admitted. E_INCOMPATIBLE: not for this device. E_SELFTEST: the self-test said no, or could
not run. E_QUARANTINED: failed here before. E_NO_RELEASE: nothing offered. E_NO_PREVIOUS: nothing to go back to.
E_UNREACHABLE: no answer. E_NOSPACE: disk full. E_IO: disk failed. E_BUSY: another agent runs. E_STATE: the state file
is damaged. E_CONFIG, E_INTERNAL: see the text.

Nothing here decides; the checks are in `updater.py`.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3
from tuf.api import exceptions as tuf

from qcore.errors import ModelError, PackageError, UpdateError

_BY_TUF_ERROR: tuple[tuple[type[Exception], str, str], ...] = (
    (tuf.ExpiredMetadataError, "E_STALE", "the repository's signatures are too old; run `qcore repo refresh` there"),
    (
        tuf.BadVersionNumberError,
        "E_ROLLBACK",
        "the repository shows an older state than this device has seen; check it",
    ),
    (tuf.UnsignedMetadataError, "E_UNSIGNED", "a role lacks signatures of trusted keys; do not trust this repository"),
    (tuf.LengthOrHashMismatchError, "E_HASH", "metadata differ from what was signed; check the repository's files"),
    (tuf.RepositoryError, "E_METADATA", "the metadata cannot be used; check the repository's files"),
    (tuf.DownloadLengthMismatchError, "E_HASH", "a file is longer than was signed; check the repository's files"),
    (tuf.DownloadError, "E_UNREACHABLE", "check `repository` in the configuration and the network"),
    (urllib3.exceptions.HTTPError, "E_UNREACHABLE", "check `repository` in the configuration and the network"),
)


def refusal(code: str, text: str) -> UpdateError:
    """Return the error of `code`; `text` says what, observed, allowed and the next step."""
    return UpdateError(f"{code}: {' '.join(text.split())}")


def code_of(error: Exception) -> str:
    """Return the code that the message of `error` begins with, E_INTERNAL if there is none."""
    code = str(error).partition(":")[0]
    return code if code.startswith("E_") else "E_INTERNAL"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of tuf, the network, the file system and the package reader into UpdateErrors about `what`.

    Raises:
        UpdateError: in place of each of them.
    """
    try:
        yield
    except (tuf.RepositoryError, tuf.DownloadError, urllib3.exceptions.HTTPError) as e:
        code, advice = next((c, a) for kind, c, a in _BY_TUF_ERROR if isinstance(e, kind))
        raise refusal(code, f"{what}: {e}; {advice}; the active model is unchanged") from e
    except PackageError as e:
        raise refusal("E_PACKAGE", f"{what}: {e}") from e
    except ModelError as e:
        raise refusal("E_MODEL", f"{what}: {e}; the active model is unchanged") from e
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check state_dir, its owner and the disk"
        raise refusal(
            "E_NOSPACE" if full else "E_IO", f"{what}: {e.filename or ''} {e.strerror or e}; {advice}; then try again"
        ) from e
