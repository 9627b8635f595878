"""Component `evaluate_shard`: candidate and baseline on a part of the samples."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate_shard(
    candidate: dsl.Input[dsl.Model],
    baseline: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    part: dsl.Output[dsl.Artifact],
    shard: int,
    shards: int,
    split: str = "evaluation",
    data_sha256: str = "",
    baseline_sha256: str = "",
    champion: str = "",
    champion_sha256: str = "",
) -> None:
    """Measure a candidate against its baseline on one part of a split; `merge_reports` puts the parts together.

    Args:
        candidate: ONNX model that may be released.
        baseline: Float ONNX model that it is held against.
        data: Data-set card (YAML), or a folder holding exactly one.
        part: What was measured on the samples of this shard (JSON).
        shard: Which part of the split to read, from 1; the first one measures costs for all.
        shards: Number of parts.
        split: Name of the split of the card to read.
        data_sha256: Digest of the data; part of the cache key, so give another one when card or samples change.
        baseline_sha256: SHA-256 that the baseline file must have; part of the cache key. Empty: any file.
        champion: Path to the released model, ONNX or package (.qpkg), such as one in a mounted repository. Empty: none.
        champion_sha256: SHA-256 that the champion's file must have; part of the cache key. Empty: any file.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import expect_champion, expect_model, file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("evaluate_shard") as t:
        t.params({"split": split, "shard": shard, "shards": shards, "data_digest": data_sha256})
        expect_model(Path(baseline.path), baseline_sha256)
        steps.evaluate_shard(
            candidate=Path(candidate.path),
            baseline=Path(baseline.path),
            data=Path(data.path),
            out=Path(part.path),
            shard=(shard, shards),
            split=split,
            champion=expect_champion(champion, champion_sha256),
            progress=t.progress,
        )
        part.metadata.update(file_facts(Path(part.path), "qcore-evaluation-part"))
