"""The layer report: what was measured about each layer, a verdict in words, and the JSON form.

A layer's error in a quantized model has two parts: what the layer itself rounds away (*local*) and what came in with
its inputs (*accumulated*, which holds both). Only the first can be mended at the layer.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qcore.canonical import Digest, Json
from qcore.graph.rewrite import Skipped
from qcore.layers.probe import Comparison, Probe, Quantizer, WeightError
from qcore.numerics.error import limited_db

LAYERS_SCHEMA = "qcore.layers/1"
LOCAL_DB = 20.0
"""A layer alone below this is at fault itself: it adds noise of more than 1 % of its signal's power. Eight bits over
a range that fits give 30 to 45 dB."""
ACCUMULATED_DB = 12.0
"""Noise of 1/16 of the signal's power. EfficientNet-Lite0, 32 images: in a per-channel file that agrees with float on
98 % of 400 images every layer is above 15 dB; in a per-tensor file that loses 25 points most are at 5 to 12 dB."""
CORE = 0.999
_SATURATED = 1e-3
_FEW_LEVELS = 0.25

Verdict = Literal["fine", "local", "accumulated"]
Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """Distance from the float model's tensor over all samples: `sqnr_db` cut to +-300, and the cosine of the angle."""

    sqnr_db: float
    cosine: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeUse:
    """How an activation quantizer fits the values that the float model has there.

    `low` and `high` are the ends of the quantizer's range, `observed_low` and `observed_high` those of the values,
    rounded to its levels. `saturated` is the share of values beyond the range, `unused` the share of levels outside
    of what was observed, `core` the share of levels that hold 99.9 % of the values (half of the rest on each side).
    `sqnr_db` is that of the quantizer alone.
    """

    low: float
    high: float
    observed_low: float
    observed_high: float
    saturated: float
    unused: float
    core: float
    sqnr_db: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """One layer: its errors, the verdict, and in words why and what may help.

    `source` names the layer before it that is itself at fault and worst, where the verdict is `accumulated`.
    """

    node: str
    op_type: str
    tensor: str
    verdict: Verdict
    why: str
    source: str | None
    accumulated: Error
    local: Error | None
    weights: WeightError | None
    activation: RangeUse | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredFile:
    """A model file: its name without folders, and the SHA-256 of its bytes."""

    name: str
    sha256: Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSamples:
    """What was fed: name of the card, split, digest of exactly these samples as prepared, and their number."""

    name: str
    split: str
    sha256: Digest
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a report is about; `target` is the profile in the model's metadata, `runtime` what ran it and how."""

    model: MeasuredFile
    baseline: MeasuredFile
    data: MeasuredSamples
    target: str | None
    runtime: Mapping[str, str]
    qcore_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """All layers in graph order, and what they were measured on."""

    measured: Measured
    layers: tuple[LayerError, ...]
    skipped: tuple[Skipped, ...]

    def count(self, verdict: Verdict) -> int:
        """Return how many layers have `verdict`."""
        return Counter(layer.verdict for layer in self.layers)[verdict]

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.layers/1`)."""
        value = asdict(self)
        return {
            "schema": LAYERS_SCHEMA,
            **value.pop("measured"),
            **value,
            "limits": {"local_db": LOCAL_DB, "accumulated_db": ACCUMULATED_DB, "core": CORE},
            "verdicts": {verdict: self.count(verdict) for verdict in get_args(Verdict)},
            "advice": self.advice(),
        }

    def advice(self) -> str:
        """Return in one or two sentences what to do next."""
        local = sorted((e for e in self.layers if e.verdict == "local"), key=_local_db)
        if not local and not self.count("accumulated"):
            return "No layer stands out. If the model is still not good enough, measure `qcore sensitivity`."
        if not local:
            return (
                "No single layer is at fault: small errors add up. Bias correction or better weight rounding helps "
                "all layers a little; `qcore sensitivity` says which are worth more bits."
            )
        worst = ", ".join(e.node for e in local[:3])
        return (
            f"Mend the layers that are at fault themselves first, worst first: {worst}. What the layers behind them "
            "show comes from there; run this report again afterwards."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSums:
    """What was added up over all samples: scalars by output name, and counts of levels by output name."""

    samples: int
    scalars: Mapping[str, float]
    levels: Mapping[str, NDArray[np.int64]]


def add_up(probes: Iterable[Probe], outputs: Iterable[tuple[int, Tensors]]) -> LayerSums:
    """Return the sums over `outputs`: per batch the number of samples and the outputs of the probed graph.

    Each batch is read once and not kept.
    """
    quantizers = {p.quantizer.integers: p.quantizer for p in probes if p.quantizer is not None}
    levels = {name: np.zeros(q.qmax - q.qmin + 1, np.int64) for name, q in quantizers.items()}
    scalars: dict[str, float] = {}
    samples = 0
    for n, tensors in outputs:
        samples += n
        for name, value in tensors.items():
            if name in levels:
                _count(levels[name], value, quantizers[name].qmin)
            else:
                scalars[name] = scalars.get(name, 0.0) + float(value)
    return LayerSums(samples=samples, scalars=scalars, levels=levels)


def judge_layers(probes: Iterable[Probe], sums: LayerSums) -> tuple[LayerError, ...]:
    """Return every probed layer with its errors and the verdict."""
    result: list[LayerError] = []
    worst: dict[str, LayerError | None] = {}
    for probe in probes:
        before = [e for name in probe.after if (e := worst.get(name)) is not None]
        source = min(before, key=_local_db, default=None)
        layer = _judged(probe, sums, source)
        result.append(layer)
        candidates = [e for e in (source, layer if layer.verdict == "local" else None) if e is not None]
        worst[probe.node] = min(candidates, key=_local_db, default=None)
    return tuple(result)


def _local_db(layer: LayerError) -> float:
    return float("inf") if layer.local is None else layer.local.sqnr_db


def _count(levels: NDArray[np.int64], integers: NDArray[np.generic], qmin: int) -> None:
    flat = integers.reshape(-1)
    for start in range(0, flat.size, 1 << 16):  # bincount widens what it reads to 64 bits
        part = flat[start : start + (1 << 16)].astype(np.int64) - qmin
        levels += np.bincount(part, minlength=len(levels))


def _judged(probe: Probe, sums: LayerSums, source: LayerError | None) -> LayerError:
    accumulated = _error(probe.accumulated, sums)
    local = None if probe.local is None else _error(probe.local, sums)
    activation = None if probe.quantizer is None else _range_use(probe.quantizer, sums)
    verdict: Verdict = "fine"
    if local is not None and local.sqnr_db < LOCAL_DB:
        verdict, why, source = "local", _cause(probe, local, activation), None
    elif accumulated.sqnr_db < ACCUMULATED_DB:
        verdict = "accumulated"
        why = f"the error came in; the worst layer before it is {source.node}" if source else "many small errors add up"
    else:
        why, source = "", None
    return LayerError(
        node=probe.node,
        op_type=probe.op_type,
        tensor=probe.tensor,
        verdict=verdict,
        why=why,
        source=source.node if source else None,
        accumulated=accumulated,
        local=local,
        weights=probe.weights,
        activation=activation,
    )


def _cause(probe: Probe, local: Error, activation: RangeUse | None) -> str:
    """Return in words what makes the local error: the part whose own noise comes nearest to all of it."""
    if activation is not None and activation.sqnr_db < local.sqnr_db + 3:
        if activation.saturated > _SATURATED:
            return f"{100 * activation.saturated:.2g} % of its outputs saturate: calibrate a wider range"
        if activation.core < _FEW_LEVELS:
            return f"99.9 % of its outputs use {100 * activation.core:.2g} % of the levels: cut the range or equalize"
        return "its outputs need more than these levels: 16-bit activations"
    if probe.weights is not None and probe.weights.weak_channels_sqnr_db < LOCAL_DB:
        return (
            f"weights of a tenth of its channels keep {probe.weights.weak_channels_sqnr_db:.0f} dB or less: "
            "per-channel scales, cross-layer equalization or better rounding"
        )
    return "its inputs and weights are rounded too coarsely together: 16-bit activations, or leave it float"


def _error(names: Comparison, sums: LayerSums) -> Error:
    signal, noise, power, product = (
        sums.scalars[name] for name in (names.signal, names.noise, names.power, names.product)
    )
    norm = float(np.sqrt(signal) * np.sqrt(power))
    if noise == 0 or not np.isfinite(norm):
        cosine = 1.0 if noise == 0 else 0.0
    else:
        cosine = product / norm if norm > 0 else 0.0
    return Error(sqnr_db=limited_db(signal, noise), cosine=min(max(cosine, -1.0), 1.0))


def _range_use(q: Quantizer, sums: LayerSums) -> RangeUse:
    levels = sums.levels[q.integers]
    total = int(levels.sum())
    used = np.flatnonzero(levels)
    step = (q.high - q.low) / (len(levels) - 1)
    tail = (1 - CORE) / 2 * total
    running = np.cumsum(levels)
    first = int(np.searchsorted(running, tail, side="right"))
    last = int(np.searchsorted(running, total - tail, side="left"))
    return RangeUse(
        low=q.low,
        high=q.high,
        observed_low=q.low + step * int(used[0]),
        observed_high=q.low + step * int(used[-1]),
        saturated=sums.scalars[q.beyond] / total,
        unused=1 - (int(used[-1]) - int(used[0]) + 1) / len(levels),
        core=(last - first + 1) / len(levels),
        sqnr_db=_error(q.rounding, sums).sqnr_db,
    )
