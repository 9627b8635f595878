"""Component `calibrate`: the ranges of activations on sample inputs."""

from typing import List

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def calibrate(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    table: dsl.Output[dsl.Artifact],
    split: str = "calibration",
    bins: int = 2048,
    decay: float = 0.99,
    tensors: List[str] = [],
    shard: int = 1,
    shards: int = 1,
    data_sha256: str = "",
) -> None:
    """Measure the ranges of a model's activations on sample inputs.

    Args:
        model: Float ONNX model.
        data: Data-set card (YAML), or a folder holding exactly one.
        table: Calibration table: mergeable statistics of every activation.
        split: Name of the split of the card to read.
        bins: Number of histogram bins per tensor.
        decay: Of the moving average, per sample.
        tensors: Names or patterns of the activations to measure; none: all that a target may quantize.
        shard: Which part of the split to read, from 1.
        shards: Number of parts; `merge_tables` puts them together.
        data_sha256: Digest of the data; part of the cache key, so give another one when card or samples change.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import card_facts, file_facts, part_name
    from qcore.tracking.tracker import Tracker

    with Tracker(part_name("calibrate", shard, shards)) as t:
        t.params({"split": split, "bins": bins, "decay": decay, "data_digest": data_sha256})
        t.params({"shard": shard, "shards": shards, "tensors": tensors})
        result = steps.calibrate(
            model=Path(model.path),
            data=Path(data.path),
            out=Path(table.path),
            split=split,
            bins=bins,
            decay=decay,
            tensors=tensors,
            shard=(shard, shards),
            progress=t.progress,
        )
        table.metadata.update(file_facts(Path(table.path), "qcore-calibration"))
        card = card_facts(Path(data.path))
        t.params({"calibration_samples": result.size, **card}, on="parent")
        t.dataset(f"{card['data']}/{split}", result.data_sha256, "calibration", source=data.uri)
        t.tags({"model.sha256": result.model_sha256, "data.sha256": result.data_sha256})
