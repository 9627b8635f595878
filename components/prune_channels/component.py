"""Component `prune_channels`: whole channels removed, down to a budget."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def prune_channels(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    pruned: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    macs: Optional[float] = None,
    size: Optional[float] = None,
    latency: Optional[float] = None,
    split: str = "calibration",
) -> None:
    """Remove channels of a float ONNX model, down to a share of its cost.

    Args:
        model: Float ONNX model.
        data: Data card, or a folder with exactly one; losses are measured and made good on it.
        pruned: The model with fewer channels; train it to get accuracy back.
        summary: What was changed and what was skipped, with reasons (JSON).
        macs: Share of the multiply-accumulates to keep, in (0, 1); 0.6 without any budget.
        size: Share of the file size to keep. Of several budgets all hold.
        latency: Share of the latency to keep, measured on the machine that runs the component.
        split: Name of the split of the card to read.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("prune_channels") as t:
        budget = {"macs": macs, "size": size, "latency": latency}
        t.params({"split": split, **{what: share for what, share in budget.items() if share is not None}})
        files = {"model": Path(model.path), "data": Path(data.path), "out": Path(pruned.path)}
        result = steps.prune_channels(**files, macs=macs, size=size, latency=latency, split=split, progress=t.progress)
        write_json(Path(summary.path), result.to_json())
        pruned.metadata.update(file_facts(Path(pruned.path), "onnx"))
        t.metrics(result.sizes)
        t.tags({"model.sha256": result.sha256})
        t.artifact(Path(summary.path), name="summary.json")
