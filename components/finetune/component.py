"""Component `finetune`: a model trained, quantized, sparse, smaller or as it is, with live curves."""

from typing import Any, Optional

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
    weight_bits: int = 0,
    epochs: int = 0,
    batch: int = 0,
    learning_rate: Optional[float] = None,
    sparsity: Optional[float] = None,
    pattern: Optional[str] = None,
    score: Optional[str] = None,
    schedule: Optional[str] = None,
    clusters: int = 0,
    macs: Optional[float] = None,
    size: Optional[float] = None,
    latency: Optional[float] = None,
    teacher_weight: Optional[float] = None,
    temperature: Optional[float] = None,
    patience: int = 0,
    pad_crop: int = 0,
    flip: Optional[bool] = None,
    seed: int = 0,
) -> None:
    """Train an ONNX model on the splits `train` and `validation` of a data card.

    Args:
        model: Float ONNX model.
        data: Data card, or a folder with exactly one.
        trained: The state with the smallest loss on the validation samples; the one before training is one of them.
        summary: What every step did, and how every epoch went (JSON).
        metrics: Validation loss and accuracy before and after, samples and seconds.
        teacher: ONNX model that teaches, with the same inputs and outputs; without it the model as it was teaches.
        method: qat (the model as it will be quantized), prune (weights become zero while it learns), channels, cluster
            or decompose (channels removed, few distinct weights, or layers as chains; then training), distill (needs a
            teacher) or finetune (as it is; zeros stay zero).
        target: Target profile of qat, or path to a profile file in the image.
        weight_bits: Bits of weights for qat. 0: those of the target.
        epochs: How often every sample is learnt from. 0: the default of the method.
        batch: Samples per step. 0: 64.
        learning_rate: Relative to the size of each tensor; without it the default of the method.
        sparsity: Share of all weights that prune sets to zero, in (0, 1); 0.5 without it and `pattern`.
        pattern: N:M such as 2:4 for prune, instead: N of every M weights along a layer's inputs stay.
        score: What prune chooses weights by, magnitude or movement; without it magnitude.
        schedule: How the number of zeros of prune grows, polynomial or constant; without it polynomial.
        clusters: Distinct values of every layer's weights for cluster, 2 to 256. 0: 16.
        macs: Share of the multiply-accumulates to keep for channels and decompose, in (0, 1); without any budget 0.6
            (and 0.75 of the latency) and 0.5.
        size: Share of the file size to keep for channels, of the weights for decompose; decompose takes one budget.
        latency: Share of the latency to keep for channels, measured on the machine that runs the component.
        teacher_weight: The teacher's share of the loss, in [0, 1]; without it 0.5, with few labels or none 1.
        temperature: Softens the outputs of teacher and student; without it 4, for qat 1.
        patience: Epochs without a better one after which training ends. 0: none do.
        pad_crop: Pixels by up to which images are moved while they are learnt from.
        flip: Whether half of the images are mirrored while they are learnt from; without it none.
        seed: Of the order of samples.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.files import write_json
    from qcore.tracking.facts import file_facts, training_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("finetune") as t:
        school = {"epochs": epochs or None, "batch": batch or None, "learning_rate": learning_rate}
        teachers = {"teacher": teacher.path if teacher else None, "teacher_weight": teacher_weight}
        images = {"pad_crop": pad_crop or None, "flip": flip, "seed": seed or None, "patience": patience or None}
        zeros = {"sparsity": sparsity, "pattern": pattern, "score": score, "schedule": schedule}
        whole = {"weight_bits": weight_bits or None, "clusters": clusters or None}
        budget = {"macs": macs, "size": size, "latency": latency}
        options: dict[str, Any] = {**school, **teachers, **images, **zeros, **whole, **budget}
        how = steps.Finetuning(method=method, target=target, temperature=temperature, **options)
        t.params(how.given)
        old, out = Path(model.path), Path(trained.path)
        made = steps.finetune(model=old, data=Path(data.path), out=out, how=how, progress=t.progress, on_epoch=t.epoch)
        write_json(Path(summary.path), made.to_json())
        trained.metadata.update(file_facts(out, "onnx"))
        t.metrics({**made.sizes, **training_facts(made.to_json())}, kfp=metrics)
        t.tags({"model.sha256": made.sha256})
        t.artifact(Path(summary.path), name="summary.json")
