"""The verb that trains a model: parse, one call, print."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.epochs import training_progress
from qcore.cli.model import print_summary


class Method(StrEnum):
    """What is trained, and by whom."""

    qat = "qat"
    prune = "prune"
    channels = "channels"
    cluster = "cluster"
    decompose = "decompose"
    distill = "distill"
    finetune = "finetune"


class Score(StrEnum):
    """By what weights are set to zero."""

    magnitude = "magnitude"
    movement = "movement"


class Schedule(StrEnum):
    """How the number of zeros grows."""

    polynomial = "polynomial"
    constant = "constant"


def finetune(
    model: opt.Model,
    data: opt.Data,
    out: opt.Out,
    method: Annotated[
        Method,
        typer.Option(
            help="qat: the quantized model; prune: while weights become zero; channels, cluster, decompose: after it; "
            "distill: by --teacher; finetune: as it is."
        ),
    ] = Method.qat,
    target: opt.Target = "host",
    split: opt.CalibrationSplit = "calibration",
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="ONNX model that teaches, with the same inputs and outputs.")
    ] = None,
    weight_bits: Annotated[int | None, typer.Option(help="Of qat: bits of weights; default: the target's.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Of prune: fraction of weights to zero; default 0.5.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Of prune, instead: N:M, such as 2:4.")] = None,
    score: Annotated[Score | None, typer.Option(help="Of prune: which weights stay; default magnitude.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Of prune: default polynomial.")] = None,
    clusters: Annotated[int | None, typer.Option(help="Of cluster: values per weight tensor; default 16.")] = None,
    macs: Annotated[
        float | None, typer.Option(help="Of channels and decompose: share of the multiplications to keep.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="Of channels and decompose: share of the size to keep.")] = None,
    latency: Annotated[float | None, typer.Option(help="Of channels: share of the latency here to keep.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often every sample is learnt from; default 10.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step, of all processes together; default 64.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Relative to the size of each tensor; the default depends on the method.")
    ] = None,
    teacher_weight: Annotated[
        float | None,
        typer.Option(help="The teacher's share of the loss; default 0.5, with few labels or none 1."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Softens teacher and student; default 4, of qat 1.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better one.")] = None,
    pad_crop: Annotated[
        int | None, typer.Option(help="Move images by up to so many pixels while learning; default 0.")
    ] = None,
    flip: Annotated[bool | None, typer.Option("--flip", help="Mirror half of the images while learning.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of samples; default 0.")] = None,
    device: opt.Device = opt.DeviceKind.auto,
    as_json: opt.AsJson = False,
) -> None:
    """Train a model on the splits `train` and `validation` of a data card; a killed run goes on where it was.

    Without labels, or with few, the model as it was before teaches. Several processes share the work under torchrun:
    `torchrun --nproc-per-node 2 -m qcore finetune ...`.
    """
    how = steps.Finetuning(
        method=method.value,
        target=target,
        teacher=None if teacher is None else str(teacher),
        weight_bits=weight_bits,
        sparsity=sparsity,
        pattern=pattern,
        score=None if score is None else score.value,
        schedule=None if schedule is None else schedule.value,
        clusters=clusters,
        macs=macs,
        size=size,
        latency=latency,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        teacher_weight=teacher_weight,
        temperature=temperature,
        patience=patience,
        pad_crop=pad_crop,
        flip=flip,
        seed=seed,
    )
    with training_progress() as (report, on_epoch):
        summary = steps.finetune(
            model=model,
            data=data,
            out=out,
            how=how,
            split=split,
            device=device.value,
            progress=report,
            on_epoch=on_epoch,
        )
    print_summary(summary, as_json)
