"""Evaluation on Kubeflow Pipelines with one task per shard of the split; the report is that of one process.

`shards` is the list [1, 2, ... N] and `count` is N: a loop cannot count for itself when the pipeline is compiled.
"""

from kfp import dsl

from qcore.components.evaluate_shard import evaluate_shard
from qcore.components.merge_reports import merge_reports
from qcore.pipelines.release.pipeline import tracked


@dsl.pipeline(name="evaluate-sharded", description="Evaluate shards of a split in parallel and merge them.")  # type: ignore[untyped-decorator]
def evaluate_sharded(
    candidate_uri: str,
    baseline_uri: str,
    data_uri: str,
    data_sha256: str,
    baseline_sha256: str,
    shards: list[int] = [1, 2, 3, 4],
    count: int = 4,
    split: str = "evaluation",
) -> dsl.Artifact:
    """Compose the steps; every argument is explained at the component that takes it."""
    names = {"candidate": candidate_uri, "baseline": baseline_uri}
    models = {
        name: dsl.importer(artifact_uri=uri, artifact_class=dsl.Model).set_display_name(f"import {name}").output
        for name, uri in names.items()
    }
    data = dsl.importer(artifact_uri=data_uri, artifact_class=dsl.Dataset).set_display_name("import data").output
    options = {"split": split, "data_sha256": data_sha256, "baseline_sha256": baseline_sha256}
    with dsl.ParallelFor(shards, name="shards") as shard:
        part = tracked(evaluate_shard(**models, data=data, shard=shard, shards=count, **options), cache=True)
    return tracked(merge_reports(parts=dsl.Collected(part.outputs["part"])), cache=True).outputs["report"]
