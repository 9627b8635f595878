"""Recipes: the ordered steps of one compression run, as people write them, and which order makes sense.

Nothing here is applied: `compression.py` does that.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qcore.config import Config, load_config
from qcore.errors import ConfigError
from qcore.methods.absorb_bias import AbsorbBiasStep
from qcore.methods.cluster import ClusterStep
from qcore.methods.correct_bias import CorrectBiasStep
from qcore.methods.decompose import DecomposeStep
from qcore.methods.dynamic import QuantizeDynamicStep
from qcore.methods.equalize import EqualizeStep
from qcore.methods.finetune import FinetuneStep, QatStep
from qcore.methods.half import Float16Step
from qcore.methods.prune import PruneStep
from qcore.methods.prune_channels import PruneChannelsStep
from qcore.methods.quantize import QuantizeStep
from qcore.methods.round_weights import RoundWeightsStep
from qcore.methods.smooth import SmoothStep
from qcore.methods.weights import QuantizeWeightsStep
from qcore.target import shipped_or_file

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
    | ClusterStep
    | DecomposeStep
    | FinetuneStep
    | PruneChannelsStep
    | EqualizeStep
    | SmoothStep
    | AbsorbBiasStep
    | QuantizeStep
    | CorrectBiasStep
    | RoundWeightsStep
    | QatStep
    | QuantizeDynamicStep
    | QuantizeWeightsStep
    | Float16Step,
    Field(discriminator="method"),
]
BEFORE = EqualizeStep | SmoothStep | AbsorbBiasStep
"""Recovery steps that prepare a float model for `quantize`."""
AFTER = CorrectBiasStep | RoundWeightsStep
"""Recovery steps that mend a model behind `quantize`."""
TRAINING = FinetuneStep | QatStep
"""Steps that train: on the float model, and behind `quantize` and all that mends."""
FREE = (
    FoldBatchnormStep | GemmHeadStep | PruneStep | ClusterStep | QuantizeDynamicStep | QuantizeWeightsStep | Float16Step
)
"""Steps that need no data."""


class Recipe(Config):
    """Steps in the order in which they are applied; at most one `quantize`, and only recovery follows it.

    Recovery steps (`BEFORE` and `AFTER`) are kept only if the quantized model comes closer to the float one on samples
    that were held out.
    """

    name: str = Field(pattern=r"^[a-z0-9.-]+$")
    description: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)

    @property
    def quantize_step(self) -> QuantizeStep | None:
        """The step `quantize`, if there is one."""
        return next((s for s in self.steps if isinstance(s, QuantizeStep)), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether a step reads calibration data, as a table or as samples."""
        return self.quantize_step is not None or self.needs_samples

    @property
    def needs_samples(self) -> bool:
        """Whether a step runs the model on samples: a table is not enough."""
        return any(isinstance(s, BEFORE | AFTER | DecomposeStep | PruneChannelsStep) for s in self.steps)

    @property
    def reads_calibration_data(self) -> bool:
        """Whether a step reads the calibration split, counted in a table or sample by sample."""
        return self.needs_calibration or self.needs_samples

    @property
    def training_steps(self) -> tuple[TRAINING, ...]:
        """The steps that train."""
        return tuple(s for s in self.steps if isinstance(s, TRAINING))

    @property
    def only_packs_smaller(self) -> bool:
        """Whether a step makes weights that take less in a package and as much in the file."""
        sparse = any(isinstance(s, FinetuneStep) and s.sparsify is not None for s in self.steps)
        few = self.quantize_step is not None and (self.quantize_step.weight_bits or 8) < 8
        return sparse or few or any(isinstance(s, PruneStep | ClusterStep) for s in self.steps)

    @property
    def reads_target(self) -> bool:
        """Whether a step looks at the target profile."""
        return any(isinstance(s, QuantizeStep | QuantizeDynamicStep | BEFORE | AFTER) for s in self.steps)


def load_recipe(name: str) -> Recipe:
    """Return the shipped recipe `name`, or the recipe in the YAML file `name`.

    Raises:
        ConfigError: there is no such recipe, an unknown field, a value out of range, or steps in an order that makes
            no sense.
    """
    recipe = load_config(shipped_or_file(name, RECIPES, "recipe"), Recipe, "recipe")
    check_order(recipe)
    return recipe


def check_order(recipe: Recipe) -> None:
    """Refuse a recipe whose steps cannot follow each other.

    Raises:
        ConfigError: names the recipe and the rule.
    """
    quantized = trained = False
    for step in recipe.steps:
        if quantized and not isinstance(step, AFTER | QatStep):
            raise ConfigError(
                f"recipe {recipe.name}: step {step.method} follows quantize; allowed behind it: correct-bias, "
                "round-weights, qat"
            )
        if not quantized and isinstance(step, AFTER | QatStep):
            raise ConfigError(
                f"recipe {recipe.name}: step {step.method} mends a quantized model; put it behind quantize"
            )
        if trained and isinstance(step, AFTER):
            raise ConfigError(f"recipe {recipe.name}: step {step.method} would undo qat; put it before qat")
        quantized = quantized or isinstance(step, QuantizeStep)
        trained = trained or isinstance(step, QatStep)
    mends = next((s for s in recipe.steps if isinstance(s, AFTER | QatStep)), None)
    if mends is not None and recipe.quantize_step is not None and recipe.quantize_step.form != "qdq":
        raise ConfigError(f"recipe {recipe.name}: step {mends.method} mends QDQ models; allowed: form: qdq")
    prepares = next((s for s in recipe.steps if isinstance(s, BEFORE)), None)
    if prepares is not None and not quantized:
        raise ConfigError(
            f"recipe {recipe.name}: step {prepares.method} prepares for quantize, which is missing; add it"
        )
