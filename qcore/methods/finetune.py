"""Options of the recipe steps that train: `finetune` for float models, `qat` for quantized ones.

What they ask for is done in `qcore.training`, which needs torch; writing and checking a recipe does not.
"""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from qcore.config import Config
from qcore.numerics.sparsity import pattern_of

FEWEST_LABELS = 1000
"""Of fewer labelled samples labels teach a model its samples and not its task: then the teacher alone teaches."""


FEWEST_FOR_STATISTICS = 16
"""A batch of fewer samples says too little of means and deviations."""


class Augment(Config):
    """What happens to images before they are learnt from, at random.

    `pad_crop` moves the image by up to so many pixels, `flip` mirrors every second one left to right.
    """

    pad_crop: int = Field(default=0, ge=0, le=256)
    flip: bool = False


class Sparsify(Config):
    """Zeros that come while the model is trained, so that what is left can make up for them.

    `sparsity` of all weights together (`scope` model) or of every layer, or a `pattern` N:M along the inputs of each.
    The weights that go are those of the least `score`: their size (magnitude; over the whole model relative to their
    layer, LAMP), or the size that training would give them if none was left out (movement). From the share `start` of
    all steps to the share `end`, every `every` steps, they are chosen anew; how many go then rises to the end (schedule
    polynomial) or is constant. Only states from the end on are kept. Layers in `exclude` stay as they are.
    """

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    pattern: str | None = None
    scope: Literal["layer", "model"] = "model"
    score: Literal["magnitude", "movement"] = "magnitude"
    schedule: Literal["polynomial", "constant"] = "polynomial"
    start: float = Field(default=0.0, ge=0, lt=1)
    end: float = Field(default=0.5, gt=0, lt=1)
    every: int = Field(default=20, ge=1)
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.pattern is not None:
            pattern_of(self.pattern)
            if given := sorted(self.model_fields_set & {"sparsity", "scope"}):
                raise ValueError(f"{given[0]} and pattern are both given; allowed: one of them")
        if self.start >= self.end:
            raise ValueError(f"start is {self.start} and end is {self.end}; allowed: start < end")
        return self


class TrainingStep(Config):
    """What all training has in common.

    `train` and `validation` name splits of the data card; without a split `train` the calibration split is learnt
    from, and without `validation` one sample in ten of `train` judges. What is kept is the state with the smallest loss
    on the validation samples, the one before training included: training never makes that worse.

    `teacher` is the file of an ONNX model with the same inputs and outputs, its path relative to the current folder;
    without one the model that the recipe began with teaches. `teacher_weight` is the share of its outputs in the loss,
    the rest is for labels; without it the share is 0.5 where there are at least 1,000 labelled samples (0 where a model
    would teach itself), else 1 (distillation). `temperature` softens both sides' outputs. `features` names tensors that
    both models have and that should be equal, too.

    `epochs` over the samples, `batch` samples a step. `learning_rate` is a share of the size of each tensor (the
    root of its mean square), since equalized layers, and those with folded batch norms, differ a thousandfold; it
    rises over the first `warmup` share of all steps and then follows `schedule`. `clip_norm` bounds the gradient, 0
    does not; `ema` averages weights over steps, 0 does not; `patience` ends training after so many epochs without a
    better one, 0 never does. Weights that are zero stay zero (`keep_zeros`) and weights that share few values go on
    sharing them (`keep_clusters`). `precision` is that of products while the model learns: auto is bfloat16 on CUDA
    and float32 elsewhere; weights, sums of the optimizer and what judges are float32.
    """

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0)
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    train: str = "train"
    validation: str = "validation"
    seed: int = Field(default=0, ge=0)


class FinetuneStep(TrainingStep):
    """The recipe step `finetune`: trains the float weights of the model as it is at that point of the recipe.

    With `sparsify` weights become zero meanwhile. With `batch_norms` every convolution has a batch norm behind it while
    it learns, which is folded again afterwards; without the option it has where there are at least 1,000 samples, a
    batch is 16 or more, and no weights share values.
    """

    method: Literal["finetune"] = "finetune"
    temperature: float = Field(default=4.0, gt=0)
    batch_norms: bool | None = None
    sparsify: Sparsify | None = None


class QatStep(TrainingStep):
    """The recipe step `qat`: quantization-aware training, behind `quantize`.

    The model is trained as it will be written: every tensor is rounded as its integers will be, gradients pass
    straight through. It starts from the solution of the steps before it. `learn_scales` trains scales too (LSQ), at
    `scale_learning_rate`, which is in octaves.
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
