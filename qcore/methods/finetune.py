"""Options of the recipe steps that train: `finetune` for float models, `qat` for quantized ones.

What they ask for is done in `qcore.training`, which needs torch; writing and checking a recipe does not.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from qcore.config import Config

FEWEST_LABELS = 1000
"""Of fewer labelled samples labels teach a model its samples and not its task: then the teacher alone teaches."""


class Augment(Config):
    """What happens to images before they are learnt from, at random.

    `pad_crop` moves the image by up to so many pixels, `flip` mirrors every second one left to right.
    """

    pad_crop: int = Field(default=0, ge=0)
    flip: bool = False


class TrainingStep(Config):
    """What all training has in common.

    `train` and `validation` name splits of the data card; without a split `train` the calibration split is learnt
    from, and without `validation` one sample in ten of `train` judges. What is kept is the state with the smallest loss
    on the validation samples, the one before training included: training never makes that worse.

    `teacher` is the file of an ONNX model with the same inputs and outputs, its path relative to the current folder;
    without one the model that the recipe began with teaches. `teacher_weight` is the share of its outputs in the loss,
    the rest is for labels; without it the share is 0.5 where there are at least 1,000 labelled samples, else 1
    (distillation). `temperature` softens both sides' outputs. `features` names tensors that both models have and that
    should be equal, too.

    `epochs` over the samples, `batch` samples a step; `learning_rate` rises over the first `warmup` share of all steps
    and then follows `schedule`; `clip_norm` bounds the gradient, 0 does not; `ema` averages weights over steps, 0 does
    not; `patience` ends training after so many epochs without a better one, 0 never does. Weights that are zero stay
    zero (`keep_zeros`) and weights that share few values go on sharing them (`keep_clusters`).
    """

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_norm: float = Field(default=1.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    patience: int = Field(default=0, ge=0)
    teacher: str | None = None
    teacher_weight: float | None = Field(default=None, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    features: tuple[str, ...] = ()
    augment: Augment = Augment()
    keep_zeros: bool = True
    keep_clusters: bool = True
    train: str = "train"
    validation: str = "validation"
    seed: int = Field(default=0, ge=0)


class FinetuneStep(TrainingStep):
    """The recipe step `finetune`: trains the float weights of the model as it is at that point of the recipe."""

    method: Literal["finetune"] = "finetune"


class QatStep(TrainingStep):
    """The recipe step `qat`: quantization-aware training, behind `quantize`.

    The model is trained as it will be written: every tensor is rounded as its integers will be, gradients pass
    straight through. It starts from the solution of the steps before it. `learning_rate` is a share of the size of each
    tensor (the root of its mean square), since equalized layers differ a thousandfold. `learn_scales` trains scales too
    (LSQ), at `scale_learning_rate`, which is in octaves.
    """

    method: Literal["qat"] = "qat"
    learning_rate: float = Field(default=1e-3, gt=0)
    learn_scales: bool = True
    scale_learning_rate: float = Field(default=1e-4, gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What one epoch gave; the one numbered 0 is the state before training.

    `loss` is the mean over the steps (None for 0), `validation` the loss on the validation samples, `accuracy` their
    share of right classes (None without labels); `seconds` of this epoch.
    """

    number: int
    loss: float | None
    validation: float
    accuracy: float | None
    seconds: float
