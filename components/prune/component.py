"""Component `prune`: smallest weights to zero."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def prune(
    model: dsl.Input[dsl.Model],
    pruned: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    sparsity: float = 0.5,
    model_sha256: str = "",
    pattern: str = "",
) -> None:
    """Set the smallest weights of a float ONNX model to zero.

    Args:
        model: Float ONNX model.
        pruned: The model with its smallest weights set to zero.
        summary: What was changed and what was skipped, with reasons (JSON).
        sparsity: Share of weights to set to zero, in [0, 1); 0 leaves the model as it is.
        model_sha256: SHA-256 that the model file must have; part of the cache key. Empty: any file.
        pattern: N:M such as 2:4, taken instead of `sparsity`: N of every M weights along a layer's inputs stay.
            Empty: `sparsity`.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import expect_model, file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("prune") as t:
        zeros = {"pattern": pattern} if pattern else {"sparsity": sparsity}
        t.params(zeros)
        expect_model(Path(model.path), model_sha256)
        files = {"model": Path(model.path), "out": Path(pruned.path)}
        result = steps.prune(**files, sparsity=sparsity, pattern=pattern or None)
        write_json(Path(summary.path), result.to_json())
        pruned.metadata.update(file_facts(Path(pruned.path), "onnx"))
        t.params(zeros, on="parent")
        t.metrics(result.sizes)
        t.tags({"model.sha256": result.sha256})
        t.artifact(Path(summary.path), name="summary.json")
