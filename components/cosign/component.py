"""Component `cosign`: the gate's signature on the role that releases a package; it holds this key and no other."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def cosign(
    package: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Artifact],
    cosigned: dsl.Output[dsl.Artifact],
    repository: str,
    keys: str,
) -> None:
    """Check a package against its evidence and what is approved, and sign the role that would release it.

    Args:
        package: The .qpkg file.
        evidence: The gate's signed decision about it.
        cosigned: The new models role with the gate's signature; publish adds the publisher's.
        repository: Folder of the repository, or s3://bucket/prefix; it is only read.
        keys: Folder with the gate's key and the pinned root.json, mounted from a secret of its own.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("cosign"):
        files = {"package": Path(package.path), "evidence": Path(evidence.path), "out": Path(cosigned.path)}
        steps.cosign(**files, repository=repository, keys=Path(keys))
        cosigned.metadata.update(file_facts(Path(cosigned.path), "qcore-cosigned-role"))
