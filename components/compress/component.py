"""Component `compress`: a model through the steps of any recipe, with live curves where one of them trains."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def compress(
    model: dsl.Input[dsl.Model],
    compressed: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    data: Optional[dsl.Input[dsl.Dataset]] = None,
    recipe: str = "int8",
    target: str = "x86-avx2",
    split: str = "calibration",
    recipe_yaml: str = "",
) -> None:
    """Apply all steps of a recipe to a float ONNX model.

    Args:
        model: Float ONNX model.
        compressed: The model after the last step.
        summary: What every step did and what it skipped, with reasons, and how every epoch of training went (JSON).
        metrics: Size, size inside a package for recipes that only pack smaller, and what training gained.
        data: Data card, or a folder with exactly one; for recipes that calibrate, run the model on samples, or train.
        recipe: Name of a shipped recipe, or path to a recipe file in the image.
        target: Name of a shipped target profile, or path to a profile file in the image.
        split: Split of the card to calibrate on; training learns from it, too, if the card has no split `train`.
        recipe_yaml: Recipe as YAML text, taken instead of `recipe`. Empty: `recipe`.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts, recipe_name, text_file, training_facts
    from qcore.tracking.tracker import Tracker

    named = recipe_name(recipe, recipe_yaml)
    with Tracker(f"compress {named}") as t, text_file(recipe_yaml, "recipe.yaml") as own:
        t.params({"recipe": named, "target": target, "split": split})
        t.params({"recipe_yaml": recipe_yaml} if own else {})
        made = steps.compress(
            model=Path(model.path),
            out=Path(compressed.path),
            data=Path(data.path) if data else None,
            recipe=str(own or recipe),
            target=target,
            split=split,
            progress=t.progress,
            on_epoch=t.epoch,
        )
        write_json(Path(summary.path), made.to_json())
        compressed.metadata.update(file_facts(Path(compressed.path), "onnx"))
        t.metrics({**made.sizes, **training_facts(made.to_json())}, kfp=metrics)
        t.tags({"model.sha256": made.sha256})
        t.artifact(Path(summary.path), name="summary.json")
