"""Calibration on Kubeflow Pipelines with one task per shard of the split; the merged table is that of one process.

`shards` is the list [1, 2, ... N] and `count` is N: a loop cannot count for itself when the pipeline is compiled.
"""

from kfp import dsl

from qcore.components.calibrate import calibrate
from qcore.components.merge_tables import merge_tables
from qcore.pipelines.release.pipeline import tracked


@dsl.pipeline(name="calibrate-sharded", description="Calibrate shards of a split in parallel and merge their tables.")  # type: ignore[untyped-decorator]
def calibrate_sharded(
    model_uri: str,
    data_uri: str,
    data_sha256: str,
    shards: list[int] = [1, 2, 3, 4],
    count: int = 4,
    split: str = "calibration",
    bins: int = 2048,
    decay: float = 0.99,
    tensors: list[str] = [],
) -> dsl.Artifact:
    """Compose the steps; every argument is explained at the component that takes it."""
    model = dsl.importer(artifact_uri=model_uri, artifact_class=dsl.Model).set_display_name("import model").output
    data = dsl.importer(artifact_uri=data_uri, artifact_class=dsl.Dataset).set_display_name("import data").output
    options = {"split": split, "bins": bins, "decay": decay, "tensors": tensors, "data_sha256": data_sha256}
    with dsl.ParallelFor(shards, name="shards") as shard:
        part = tracked(calibrate(model=model, data=data, shard=shard, shards=count, **options), cache=True)
    return tracked(merge_tables(tables=dsl.Collected(part.outputs["table"])), cache=True).outputs["table"]
