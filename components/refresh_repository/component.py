"""Component `refresh_repository`: signatures that near their expiry, made again; for a scheduled pipeline."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def refresh_repository(repository: str, keys: str) -> str:
    """Sign again each role that has lived an eighth of its life and whose keys are held.

    Args:
        repository: Folder of the repository, or s3://bucket/prefix.
        keys: Folder with the keys of snapshot, timestamp and channels, mounted from a secret.

    Returns:
        The roles that were signed, with commas between; empty if nothing was due.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.tracker import Tracker

    with Tracker("refresh-repository") as t:
        roles = ", ".join(steps.refresh(repository=repository, keys=Path(keys)))
        t.params({"signed": roles or "nothing was due"})
        return roles
