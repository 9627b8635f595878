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
) -> None:
    """Measure a candidate against its baseline, sample by sample, with latency and size.

    Args:
        candidate: ONNX model that may be released.
        baseline: Float ONNX model that it is held against.
        data: Data-set card (YAML), or a folder holding exactly one.
        report: Evaluation report (JSON): per-sample results, metrics, latency, sizes, digests.
        metrics: The metrics as numbers.
        split: Name of the split of the card to read.
        data_sha256: Digest of the data; part of the cache key, so give another one when card or samples change.
        baseline_sha256: SHA-256 that the baseline file must have; part of the cache key. Empty: any file.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import expect_model, file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("evaluate") as t:
        t.params({"split": split, "data_digest": data_sha256})
        expect_model(Path(baseline.path), baseline_sha256)
        ours, theirs, card, out = (Path(a.path) for a in (candidate, baseline, data, report))
        result = steps.evaluate(candidate=ours, baseline=theirs, data=card, out=out, split=split, progress=t.progress)
        report.metadata.update(file_facts(out, "qcore-evaluation"))
        t.metrics({**result.metrics, "latency_p50_ms": result.model.latency_ms.p50, "n": result.n}, kfp=metrics)
        t.params({"data": result.data.name, "evaluation_split": split}, on="parent")
        t.dataset(f"{result.data.name}/{split}", result.data.sha256, "evaluation", source=data.uri)
        t.artifact(out, name="report.json")
