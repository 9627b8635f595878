"""Component `evaluate`: candidate and baseline on exactly the same samples."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    candidate: dsl.Input[dsl.Model],
    baseline: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    split: str = "evaluation",
    data_sha256: str = "",
    baseline_sha256: str = "",
    champion: str = "",
    champion_sha256: str = "",
) -> None:
    """Measure a candidate against its baseline, sample by sample, with latency, memory and size.

    Args:
        candidate: ONNX model that may be released.
        baseline: Float ONNX model that it is held against.
        data: Data-set card (YAML), or a folder holding exactly one.
        report: Evaluation report (JSON): per-sample results, metrics, costs, digests.
        metrics: The metrics and costs as numbers.
        split: Name of the split of the card to read.
        data_sha256: Digest of the data; part of the cache key, so give another one when card or samples change.
        baseline_sha256: SHA-256 that the baseline file must have; part of the cache key. Empty: any file.
        champion: Path to the released model, ONNX or package (.qpkg), such as one in a mounted repository. Empty: none.
        champion_sha256: SHA-256 that the champion's file must have; part of the cache key. Empty: any file.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.derived import cost_metrics
    from qcore.tracking.facts import expect_champion, expect_model, file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("evaluate") as t:
        t.params({"split": split, "data_digest": data_sha256})
        expect_model(Path(baseline.path), baseline_sha256)
        released, out = expect_champion(champion, champion_sha256), Path(report.path)
        result = steps.evaluate(
            candidate=Path(candidate.path),
            baseline=Path(baseline.path),
            data=Path(data.path),
            out=out,
            split=split,
            champion=released,
            progress=t.progress,
        )
        report.metadata.update(file_facts(out, "qcore-evaluation"))
        t.metrics({**result.metrics, **cost_metrics(result), "n": result.n}, kfp=metrics)
        t.params({"data": result.data.name, "evaluation_split": split}, on="parent")
        t.artifact(out, name="report.json")
