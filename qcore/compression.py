"""Recipes: the ordered steps of one compression run, and nothing but their order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, assert_never

import onnx_ir as ir
from pydantic import Field

from qcore.calibration import CalibrationTable
from qcore.config import Config, load_config
from qcore.errors import ConfigError
from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.methods.half import Float16Step, to_float16
from qcore.methods.prune import PruneStep, prune
from qcore.methods.quantize import QuantizeStep, quantize
from qcore.methods.weights import QuantizeWeightsStep, quantize_weights
from qcore.target import TargetProfile, shipped_or_file

RECIPES = Path(__file__).with_name("recipes")


class FoldBatchnormStep(Config):
    """The recipe step `fold-batchnorm`; it has no options."""

    method: Literal["fold-batchnorm"] = "fold-batchnorm"


class GemmHeadStep(Config):
    """The recipe step `gemm-head`; it has no options."""

    method: Literal["gemm-head"] = "gemm-head"


Step = Annotated[
    FoldBatchnormStep
    | GemmHeadStep
    | PruneStep
    | QuantizeStep
    | QuantizeDynamicStep
    | QuantizeWeightsStep
    | Float16Step,
    Field(discriminator="method"),
]


class Recipe(Config):
    """Steps in the order in which they are applied; at most one `quantize`, and it comes last."""

    name: str = Field(pattern=r"^[a-z0-9.-]+$")
    description: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)

    @property
    def needs_calibration(self) -> bool:
        """Whether a step reads a calibration table."""
        return any(isinstance(s, QuantizeStep) for s in self.steps)

    @property
    def reads_target(self) -> bool:
        """Whether a step looks at the target profile."""
        return any(isinstance(s, QuantizeStep | QuantizeDynamicStep) for s in self.steps)


def load_recipe(name: str) -> Recipe:
    """Return the shipped recipe `name`, or the recipe in the YAML file `name`.

    Raises:
        ConfigError: there is no such recipe, an unknown field, a value out of range, or a step after `quantize`.
    """
    recipe = load_config(shipped_or_file(name, RECIPES, "recipe"), Recipe, "recipe")
    if any(isinstance(s, QuantizeStep) for s in recipe.steps[:-1]):
        raise ConfigError(f"recipe {recipe.name}: a step follows quantize; allowed: quantize is the last step")
    return recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedStep:
    """What one step did: method, names that changed, nodes that were left alone and why."""

    method: str
    changed: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """The model after a recipe, and what each step did."""

    model: ir.Model
    steps: tuple[AppliedStep, ...]


def compress(
    model: ir.Model, recipe: Recipe, target: TargetProfile, calibrated: Callable[[ir.Model], CalibrationTable] | None
) -> Compressed:
    """Return `model` after all steps of `recipe`; the argument is not changed.

    Args:
        model: float model.
        recipe: steps in order.
        target: profile of the device.
        calibrated: gives the table of the model that `quantize` is about to see; None where no step needs one.

    Raises:
        ConfigError: a step needs a table and there is none.
    """
    applied = []
    for step in recipe.steps:
        table = calibrated(model) if isinstance(step, QuantizeStep) and calibrated is not None else None
        rewrite = apply_step(model, step, target, table)
        model = rewrite.model
        applied.append(AppliedStep(method=step.method, changed=rewrite.changed, skipped=rewrite.skipped))
    return Compressed(model=model, steps=tuple(applied))


def apply_step(model: ir.Model, step: Step, target: TargetProfile, table: CalibrationTable | None) -> Rewrite:
    """Return `model` after one step; `table` is only read by `quantize`.

    Raises:
        ConfigError: `quantize` without a table.
    """
    match step:
        case FoldBatchnormStep():
            return fold_batchnorm(model)
        case GemmHeadStep():
            return conv_head_to_gemm(model)
        case PruneStep():
            return prune(model, step)
        case QuantizeStep():
            if table is None:
                raise ConfigError("step quantize needs a calibration table; run `qcore calibrate` first")
            return quantize(model, step, target, table)
        case QuantizeDynamicStep():
            return quantize_dynamic(model, step, target)
        case QuantizeWeightsStep():
            return quantize_weights(model, step)
        case Float16Step():
            return to_float16(model, step)
        case _:
            assert_never(step)
