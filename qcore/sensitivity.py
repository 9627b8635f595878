"""Sensitivity: how far the model's output moves when one layer alone is quantized, measured and not guessed.

Proxies from weights rank layers hardly better than chance; one layer at a time on a few dozen samples ranks them
nearly as the whole data set would. The samples stay in memory, and the float outputs are computed once.

Source: the sensitivity of Cai et al. 2020, "ZeroQ" (arXiv 2001.00281): output KL with one layer quantized.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.canonical import Digest, Json
from qcore.errors import ModelError
from qcore.numerics.error import output_error

SENSITIVITY_SCHEMA = "qcore.sensitivity/1"
Tensors = Mapping[str, NDArray[np.generic]]
Predict = Callable[[Tensors], Mapping[str, NDArray[np.generic]]]
Run = Callable[[str], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallSet:
    """What sensitivities are measured on: model inputs in batches, the task of the data, and how a model runs."""

    batches: tuple[Tensors, ...]
    task: Literal["classification", "none"]
    predictor: Callable[[ir.Model], Predict]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """A layer and the output error (`output_error`) of the model in which it alone is quantized."""

    node: str
    op_type: str
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityReport:
    """All layers, the most sensitive first, and what they were measured on; `measure` says what the error is."""

    model_sha256: Digest
    data_sha256: Digest
    samples: int
    target: str
    precision: str
    measure: str
    layers: tuple[Sensitivity, ...]
    qcore_version: str

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.sensitivity/1`)."""
        value = asdict(self)
        value["model"] = {"sha256": value.pop("model_sha256")}
        value["data"] = {"sha256": value.pop("data_sha256")}
        return {"schema": SENSITIVITY_SCHEMA, **value}


def sensitivity(
    float_model: ir.Model,
    quantize_one: Callable[[str], ir.Model],
    nodes: Mapping[str, str],
    small: SmallSet,
    remember: Callable[[Run], Run] = lambda run: run,
) -> tuple[Sensitivity, ...]:
    """Return how sensitive each of `nodes` is, the most sensitive first; equals keep their order.

    Args:
        float_model: the reference.
        quantize_one: gives `float_model` with one layer quantized, by its name.
        nodes: names and op types of the layers to try.
        small: samples and how to run them.
        remember: wraps the trial, e.g. to keep results in a journal.

    Raises:
        ModelError: a model gives NaN or infinity.
    """

    @functools.cache
    def reference() -> dict[str, NDArray[np.generic]]:
        return outputs_of(small.predictor(float_model), small.batches)

    def run(node: str) -> float:
        return small_set_error(quantize_one(node), reference(), small)

    trial = remember(run)
    measured = [Sensitivity(node=node, op_type=op_type, error=trial(node)) for node, op_type in nodes.items()]
    return tuple(sorted(measured, key=lambda s: -s.error))


def outputs_of(predict: Predict, batches: Sequence[Tensors]) -> dict[str, NDArray[np.generic]]:
    """Return the outputs of all batches, joined along the first dimension."""
    parts = [predict(fed) for fed in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def small_set_error(model: ir.Model, reference: Tensors, small: SmallSet) -> float:
    """Return the output error of `model` against the `reference` outputs on the same samples.

    Raises:
        ModelError: `model` gives NaN or infinity, or other outputs.
    """
    try:
        return output_error(reference, outputs_of(small.predictor(model), small.batches), small.task)
    except ValueError as e:
        raise ModelError(f"outputs cannot be compared: {e}; check the model and the preprocessing") from e
