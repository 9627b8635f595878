"""Component `decompose`: layers as chains of smaller ones."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def decompose(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    decomposed: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    macs: Optional[float] = None,
    size: Optional[float] = None,
    split: str = "calibration",
) -> None:
    """Write layers of a float ONNX model as chains of smaller ones, within a budget.

    Args:
        model: Float ONNX model.
        data: Data card, or a folder with exactly one; what a chain loses is measured on it.
        decomposed: The model with chains of layers; train it to get accuracy back.
        summary: What was changed and what was skipped, with reasons (JSON).
        macs: Share of the multiplications that may be left, in (0, 1); 0.5 without any budget.
        size: Share of the weights that may be left, instead.
        split: Name of the split of the card to read.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("decompose") as t:
        budget = {"macs": macs, "size": size}
        t.params({"split": split, **{what: share for what, share in budget.items() if share is not None}})
        result = steps.decompose(
            model=Path(model.path),
            data=Path(data.path),
            out=Path(decomposed.path),
            macs=macs,
            size=size,
            split=split,
            progress=t.progress,
        )
        write_json(Path(summary.path), result.to_json())
        decomposed.metadata.update(file_facts(Path(decomposed.path), "onnx"))
        t.metrics(result.sizes)
        t.tags({"model.sha256": result.sha256})
        t.artifact(Path(summary.path), name="summary.json")
