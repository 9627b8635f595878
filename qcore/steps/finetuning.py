"""Training on files: a model in, a trained one out, by one of four methods with good defaults.

Each method is a short recipe, which is what `qcore compress` would apply; whoever wants other steps writes one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import ConfigError
from qcore.steps.compression import CompressionSummary, trained
from qcore.steps.guard import OnEpoch, Progress, silent, unseen
from qcore.steps.training import Training

if TYPE_CHECKING:
    from qcore.canonical import Json
    from qcore.recipe import Recipe

METHODS = ("qat", "prune", "distill", "finetune")
SPARSITY = 0.5
WHOLE_BITS = 8
"""With fewer bits the weights are rounded to second order first: training then starts from less error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuning:
    """How a model is trained; None stands for the default of the training step.

    `qat` trains the quantized model as it will be written, `prune` the float weights after the smallest were set to
    zero, `distill` the float weights by another model, and `finetune` the float weights. `teacher` is the file of the
    model that teaches, by default the one that is trained. `target` and `weight_bits` are of `qat`, `sparsity` is of
    `prune`; the rest are options of the step that trains.
    """

    method: str = "qat"
    target: str = "host"
    teacher: str | None = None
    weight_bits: int | None = None
    sparsity: float | None = None
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    teacher_weight: float | None = None
    temperature: float | None = None
    patience: int | None = None
    seed: int | None = None

    @property
    def given(self) -> dict[str, object]:
        """What is not left to defaults, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def finetune(
    *,
    model: Path,
    data: Path,
    out: Path,
    how: Finetuning,
    split: str = "calibration",
    device: str = "auto",
    progress: Progress = silent,
    on_epoch: OnEpoch = unseen,
) -> CompressionSummary:
    """Return the summary of `out`: `model` trained on the splits `train` and `validation` of the data card.

    Args:
        model: float ONNX model.
        data: data card; without a split `train` the split `split` is learnt from.
        out: where the trained model goes.
        how: what is done.
        split: what `qat` calibrates on.
        device: "cpu", "cuda" or "auto".
        progress: told how far it is.
        on_epoch: told how each epoch went.

    Raises:
        ConfigError: an option that the method does not have, or a value out of range.
    """
    training = Training(data=data, split=split, device=device, progress=progress, on_epoch=on_epoch)
    return trained(model, out, recipe_of(how), how.target, training)


def recipe_of(how: Finetuning) -> "Recipe":
    """Return the recipe that `how` stands for.

    Raises:
        ConfigError: as `finetune`.
    """
    from qcore.config import check_config
    from qcore.recipe import Recipe

    if how.method not in METHODS:
        raise ConfigError(f"method is {how.method!r}; allowed: {', '.join(METHODS)}")
    if how.weight_bits is not None and how.method != "qat":
        raise ConfigError(f"weight_bits is for method qat, which quantizes; {how.method} does not; leave it out")
    if how.sparsity is not None and how.method != "prune":
        raise ConfigError(f"sparsity is for method prune; {how.method} prunes nothing; leave it out")
    if how.teacher is None and how.method == "distill":
        raise ConfigError("method distill learns from another model and got none; pass --teacher FILE")
    options = {k: v for k, v in how.given.items() if k not in ("method", "target", "weight_bits", "sparsity")}
    learns: dict[str, Json] = {"method": "qat" if how.method == "qat" else "finetune", **options}
    steps: list[dict[str, Json]] = []
    if how.method == "qat":
        steps = [{"method": m} for m in ("fold-batchnorm", "gemm-head", "equalize")]
        bits = {} if how.weight_bits is None else {"weight_bits": how.weight_bits}
        steps += [{"method": "quantize", "ranges": "percentile", "percentile": 99.999, **bits}]
        steps += [{"method": "round-weights"}] if (how.weight_bits or WHOLE_BITS) < WHOLE_BITS else []
    elif how.method == "prune":
        steps = [{"method": "prune", "sparsity": SPARSITY if how.sparsity is None else how.sparsity}]
    return check_config({"name": how.method, "steps": [*steps, learns]}, Recipe, f"options of method {how.method}")
