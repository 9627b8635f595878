"""Component `package`: one file for devices, with golden samples."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def package(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    package: dsl.Output[dsl.Artifact],
    family: str,
    version: str,
    target: str = "x86-avx2",
    split: str = "evaluation",
    memory_mb: int = 0,
    control_flow: bool = False,
) -> None:
    """Build the package that devices install; the gate decides about it afterwards.

    Args:
        model: ONNX model, the candidate that is evaluated.
        data: Data-set card (YAML), or a folder holding exactly one; golden samples come from it.
        package: The .qpkg file.
        family: Name of the model on devices.
        version: Release version.
        target: Name of a shipped target profile, or path to a profile file in the image.
        split: Name of the split of the card that golden samples come from.
        memory_mb: MiB that a process needs that runs the model, where somebody measured it. 0: nobody did.
        control_flow: Declare that the model may hold If, Loop or Scan; only devices that allow it take it then.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import sha256_file
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("package") as t:
        result = steps.package(
            model=Path(model.path),
            data=Path(data.path),
            out=Path(package.path),
            family=family,
            version=version,
            target=target,
            split=split,
            memory_mb=memory_mb,
            control_flow=control_flow,
        )
        package.metadata.update(file_facts(result.path, "qpkg"))
        t.params({"family": family, "version": version, "target": target})
        t.metrics({"package_bytes": result.size_bytes, "flash_bytes": result.manifest.flash_bytes}, on="parent")
        digests = {"model.sha256": sha256_file(Path(model.path)), "package.sha256": result.sha256}
        t.tags({"package.sha256": result.sha256}, on="parent")
        t.artifact(result.path, "release", name=f"{family}-{version}.qpkg", on="parent")
        what = f"{family} {version} for {target}. The source run says what was decided, and why."
        t.version(family, "release", what, {**digests, "qcore.target": target})
