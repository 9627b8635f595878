"""Training on files: a model in, a trained one out, by one of several methods with good defaults.

Each method is a short recipe, which is what `qcore compress` would apply; whoever wants other steps writes one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qcore.errors import ConfigError
from qcore.steps.compression import CompressionSummary, trained
from qcore.steps.guard import OnEpoch, Progress, silent, unseen
from qcore.steps.training import Training

if TYPE_CHECKING:
    from qcore.canonical import Json
    from qcore.recipe import Recipe

METHODS = ("qat", "prune", "channels", "cluster", "decompose", "distill", "finetune")
WHOLE_BITS = 8
"""With fewer bits the weights are rounded to second order first: training then starts from less error."""
_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "weight_bits": ("qat",),
        "sparsity": ("prune",),
        "pattern": ("prune",),
        "score": ("prune",),
        "schedule": ("prune",),
        "clusters": ("cluster",),
        "macs": ("channels", "decompose"),
        "size": ("channels", "decompose"),
        "latency": ("channels",),
    }
)
"""Option -> the methods that have it; what is not here is of the step that trains."""
_AUGMENT = ("pad_crop", "flip")
_TRAINING: "Mapping[str, Mapping[str, Json]]" = MappingProxyType(
    {
        "prune": {"learning_rate": 5e-3, "epochs": 15},
        "channels": {"learning_rate": 2e-2, "epochs": 40},
        "decompose": {"learning_rate": 2e-3},
        "distill": {"learning_rate": 2e-2, "epochs": 20},
    }
)
"""How each method trains by default, where not as the step does: where much was taken away, much must move."""
_FEW_BITS: "Mapping[str, Json]" = MappingProxyType({"learning_rate": 2e-4, "temperature": 4})
"""Of weights with few levels every change is a large one: at the rate for eight bits they never settle."""
_PATTERN_END, _PATTERN_RATE = 0.3, 1e-2
"""A pattern comes in few large steps: the last one must not come late, and much must move behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuning:
    """How a model is trained; None stands for the default of the step.

    `qat` trains the quantized model as it will be written, `prune` sets small weights to zero while it trains the rest,
    `channels`, `cluster` and `decompose` train what these steps left, `distill` the float weights by another model, and
    `finetune` the float weights. `teacher` is the file of the model that teaches, by default the one that is trained.
    """

    method: str = "qat"
    target: str = "host"
    teacher: str | None = None
    weight_bits: int | None = None
    sparsity: float | None = None
    pattern: str | None = None
    score: str | None = None
    schedule: str | None = None
    clusters: int | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    teacher_weight: float | None = None
    temperature: float | None = None
    patience: int | None = None
    pad_crop: int | None = None
    flip: bool | None = None
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
    for option, methods in _OF.items():
        if option in how.given and how.method not in methods:
            raise ConfigError(f"{option} is for method {' and '.join(methods)}; {how.method} has none; leave it out")
    if how.teacher is None and how.method == "distill":
        raise ConfigError("method distill learns from another model and got none; pass --teacher FILE")
    own = {k: v for k, v in how.given.items() if k in _OF}
    learns = {k: v for k, v in how.given.items() if k not in (*_OF, *_AUGMENT, "method", "target")}
    if augment := {k: v for k, v in how.given.items() if k in _AUGMENT}:
        learns["augment"] = augment
    steps = _steps(how.method, own, learns)
    return check_config({"name": how.method, "steps": steps}, Recipe, f"options of method {how.method}")


def _steps(method: str, own: dict[str, object], learns: dict[str, object]) -> "list[Json]":
    """Return the steps of `method` with the options `own`, and of the training with the options `learns`."""
    fold = {"method": "fold-batchnorm"}
    train = {"method": "finetune", **_TRAINING.get(method, {}), **learns}
    match method:
        case "qat":
            ranges = {"ranges": "percentile", "percentile": 99.999}
            rounded = own.get("weight_bits", WHOLE_BITS) != WHOLE_BITS
            return [
                fold,
                {"method": "gemm-head"},
                {"method": "equalize"},
                {"method": "quantize", **ranges, **own},
                *([{"method": "round-weights"}] if rounded else []),
                {"method": "qat", **(_FEW_BITS if rounded else {}), **learns},
            ]
        case "prune":
            if "pattern" in own:
                train = {**train, "learning_rate": _PATTERN_RATE, **learns}
                own = {"end": _PATTERN_END, **own}
            return [fold, {**train, "sparsify": own}]
        case "channels":
            return [fold, {"method": "prune-channels", **own}, train]
        case "cluster" | "decompose":
            return [fold, {"method": method, **own}, train]
        case _:
            return [train]
