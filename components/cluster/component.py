"""Component `cluster`: few distinct weights, so that packages are small."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def cluster(
    model: dsl.Input[dsl.Model],
    clustered: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    clusters: int = 16,
) -> None:
    """Let the weights of every layer of a float ONNX model take only a few values.

    Args:
        model: Float ONNX model.
        clustered: The model with few distinct weights; as large as before, and smaller inside a package.
        summary: What was changed and what was skipped, with reasons (JSON).
        clusters: Distinct values of every layer's weights, 2 to 256.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("cluster") as t:
        t.params({"clusters": clusters})
        result = steps.cluster(model=Path(model.path), out=Path(clustered.path), clusters=clusters)
        write_json(Path(summary.path), result.to_json())
        clustered.metadata.update(file_facts(Path(clustered.path), "onnx"))
        t.metrics(result.sizes)
        t.tags({"model.sha256": result.sha256})
        t.artifact(Path(summary.path), name="summary.json")
