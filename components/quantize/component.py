"""Component `quantize`: float model and calibration table in, integer model out."""

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def quantize(
    model: dsl.Input[dsl.Model],
    table: dsl.Input[dsl.Artifact],
    quantized: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    recipe: str = "int8",
    target: str = "x86-avx2",
) -> None:
    """Quantize a float ONNX model for one target, by a recipe.

    Args:
        model: Float ONNX model, the one that was calibrated.
        table: Calibration table of that model.
        quantized: The model with integer kernels (QDQ form).
        summary: What was changed and what was skipped, with reasons (JSON).
        recipe: Name of a shipped recipe, or path to a recipe file in the image.
        target: Name of a shipped target profile, or path to a profile file in the image.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts, scheme_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("quantize") as t:
        files = {"model": Path(model.path), "table": Path(table.path), "out": Path(quantized.path)}
        result = steps.quantize(**files, target=target, recipe=recipe)
        write_json(Path(summary.path), result.to_json())
        quantized.metadata.update(file_facts(Path(quantized.path), "onnx"))
        scheme = scheme_facts(recipe, target)
        t.params(scheme, on="parent")
        t.params(scheme)
        t.metrics({"size_bytes": result.size_bytes})
        t.tags({"model.sha256": result.sha256})
        t.artifact(Path(summary.path), name="summary.json")
