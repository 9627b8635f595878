"""Component `publish`: the package into the signed repository, after the evidence is verified again."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def publish(
    package: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Artifact],
    release: dsl.Output[dsl.Artifact],
    repository: str,
    keys: str,
    channel: str = "stable",
    cosigned: Optional[dsl.Input[dsl.Artifact]] = None,
) -> None:
    """Publish a package to a channel of the repository; refuses evidence that is not a signed pass for these bytes.

    Args:
        package: The .qpkg file.
        evidence: The gate's signed decision.
        release: What was published (JSON).
        repository: Folder of the repository, or s3://bucket/prefix.
        keys: Folder with the publisher's and the channel's private keys, mounted from a secret.
        channel: Channel that devices follow.
        cosigned: The role that the component cosign signed. Absent: the gate's key lies among `keys` too.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker
    from qcore.tracking.verdict import track_publication

    with Tracker("publish") as t:
        files = {"package": Path(package.path), "evidence": Path(evidence.path)}
        role = Path(cosigned.path) if cosigned else None
        result = steps.publish(**files, repository=repository, keys=Path(keys), channel=channel, cosigned=role)
        write_json(Path(release.path), result.to_json())
        release.metadata.update(file_facts(Path(release.path), "qcore-release"))
        name = f"{result.family} {result.version}"
        t.params({"channel": channel})
        t.tags({"qcore.release": name, "qcore.channel": channel, "qcore.counter": result.counter}, on="parent")
        t.artifact(Path(release.path), "release", name="release.json", on="parent")
        track_publication(t, result.channel, result.counter)
