"""Component `finetune`: a model trained, quantized or not, with live curves."""

from typing import Optional

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def finetune(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    trained: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    teacher: Optional[dsl.Input[dsl.Model]] = None,
    method: str = "qat",
    target: str = "x86-avx2",
    weight_bits: Optional[int] = None,
    epochs: int = 10,
    batch: int = 64,
    learning_rate: Optional[float] = None,
) -> None:
    """Train an ONNX model on the splits `train` and `validation` of a data card.

    Args:
        model: Float ONNX model.
        data: Data card, or a folder with exactly one.
        trained: The state with the smallest loss on the validation samples; the one before training is one of them.
        summary: What every step did, and how every epoch went (JSON).
        metrics: Validation loss and accuracy before and after, samples and seconds.
        teacher: ONNX model that teaches, with the same inputs and outputs; without it the model as it was teaches.
        method: qat (the model as it will be quantized), finetune (zeros stay zero), distill (needs a teacher) or
            prune (half of the weights, then finetune).
        target: Target profile of qat, or path to a profile file in the image.
        weight_bits: Bits of weights for qat; without it those of the target.
        epochs: How often every sample is learnt from.
        batch: Samples per step.
        learning_rate: Of the weights; without it the default of the method.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts, training_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("finetune") as t:
        how = steps.Finetuning(
            method=method,
            target=target,
            teacher=teacher.path if teacher else None,
            weight_bits=weight_bits,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
        )
        t.params(how.given)
        old, out = Path(model.path), Path(trained.path)
        made = steps.finetune(model=old, data=Path(data.path), out=out, how=how, progress=t.progress, on_epoch=t.epoch)
        write_json(Path(summary.path), made.to_json())
        trained.metadata.update(file_facts(out, "onnx"))
        t.metrics({"size_bytes": made.size_bytes, **training_facts(made.to_json())}, kfp=metrics)
        t.tags({"model.sha256": made.sha256})
        t.artifact(Path(summary.path), name="summary.json")
