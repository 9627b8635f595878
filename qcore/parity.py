"""Parity: does one model file compute the same elsewhere as where it was evaluated?

The same integers are added by other kernels on the target. Each condition here is one way in which they do, run on the
same samples and held against what `qcore evaluate` measures. Nothing here knows files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcore.canonical import Digest, Json
from qcore.evaluation import Tensors, evaluate
from qcore.numerics.error import SQNR_LIMIT
from qcore.runtime import ort
from qcore.runtime.reference import load_reference

PARITY_SCHEMA = "qcore.parity/1"
AGREEMENT = 0.95
SQNR_DB = 20.0
"""Below this share of equal predictions, or with noise of more than 1 % of the outputs' power, a condition is far.
Roundings that fall on the other side alone left 0.96 and 24 dB or more (64 images, docs/benchmarks.md)."""

Verdict = Literal["equal", "near", "far"]
Samples = Iterable[tuple[NDArray[np.int64], Tensors, NDArray[np.int64] | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One way to run a model: what it stands for, and what to do where outputs are far from those evaluated."""

    name: str
    load: Callable[..., ort.Loaded]
    meaning: str
    remedy: str


_FUSION = (
    "the fused kernels compute something else than the file states: find the layer with `qcore layers` and hold it in "
    "float (`precision` of the recipe step quantize), or evaluate on the runtime of the target"
)
_THREADS = "the runtime is at fault: sums of integers have no order; fix its version and report this file to it"
CONDITIONS: tuple[Condition, ...] = (
    Condition(
        name="optimizations-off",
        load=ort.load_as_written,
        meaning="every node as the file states it, in float between DQ and Q: runtimes that fuse nothing",
        remedy=_FUSION,
    ),
    Condition(
        name="optimizations-basic",
        load=ort.load_basic,
        meaning="constants folded and nodes without effect dropped, nothing fused: providers without integer kernels",
        remedy=_FUSION,
    ),
    Condition(
        name="optimizations-all",
        load=ort.load,
        meaning="ONNX Runtime as it comes, with the kernels of this machine",
        remedy=(
            "this machine has no VNNI and its kernels saturate; quantize for it: --target host, or see saturating-pairs"
        ),
    ),
    Condition(
        name="one-thread",
        load=partial(ort.load_exact, threads=1),
        meaning="one thread, as on a device that gives the model one core",
        remedy=_THREADS,
    ),
    Condition(
        name="four-threads",
        load=partial(ort.load_exact, threads=4),
        meaning="four threads, which split layers elsewhere",
        remedy=_THREADS,
    ),
    Condition(
        name="exact-integers",
        load=load_reference,
        meaning="products of integers, 32-bit sums and requantization as ONNX defines them: NPUs, ARM, x86 with VNNI",
        remedy="the runtime rounds elsewhere than ONNX says; judge the model on the runtime of the target",
    ),
    Condition(
        name="saturating-pairs",
        load=partial(load_reference, saturate_pairs=True),
        meaning="sums of two uint8 x int8 products saturate in 16 bits: x86 CPUs without VNNI",
        remedy=(
            "for x86 without VNNI quantize with --target x86-avx2 (uint8 weights, whose kernel does not saturate) or "
            "with `reduce_range: true` in the target profile (7-bit weights, which cost accuracy themselves); else "
            "install it on CPUs with VNNI only"
        ),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionResult:
    """How far a model is under one condition from what was evaluated.

    `agreement` is None where outputs name no class, `top1` without labels; `sqnr_db` is that of the worst output.
    """

    name: str
    verdict: Verdict
    agreement: float | None
    top1: float | None
    sqnr_db: float
    meaning: str
    advice: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityOf:
    """What was measured: the model file, its target profile if it names one, the samples, and what ran it."""

    model: str
    model_sha256: Digest
    target: str | None
    data: str
    split: str
    data_sha256: Digest
    n: int
    runtime: Mapping[str, str]
    qcore_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """All conditions in the order of `CONDITIONS`; `top1` is the accuracy as evaluated, None without labels."""

    measured: ParityOf
    top1: float | None
    conditions: tuple[ConditionResult, ...]

    @property
    def worst(self) -> ConditionResult | None:
        """The condition farthest from what was evaluated: least agreement, then least SQNR; None if all are equal."""
        apart = [c for c in self.conditions if c.verdict != "equal"]
        return min(apart, key=lambda c: (1.0 if c.agreement is None else c.agreement, c.sqnr_db), default=None)

    def advice(self) -> str:
        """Return what to make of the worst case, in a sentence or two."""
        worst = self.worst
        if worst is None:
            return "Every condition gives the same numbers to the bit."
        how = "near what" if worst.verdict == "near" else "far from what"
        return f"Worst case: {worst.name}, {how} was evaluated; {worst.advice}."

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.parity/1`)."""
        m, worst = self.measured, self.worst
        return {
            "schema": PARITY_SCHEMA,
            "model": {"name": m.model, "sha256": m.model_sha256},
            "data": {"name": m.data, "split": m.split, "sha256": m.data_sha256, "n": m.n},
            "target": m.target,
            "runtime": dict(m.runtime),
            "qcore_version": m.qcore_version,
            "as_evaluated": {"top1": self.top1},
            "conditions": [asdict(c) for c in self.conditions],
            "worst": None if worst is None else worst.name,
            "limits": {"agreement": AGREEMENT, "sqnr_db": SQNR_DB},
            "advice": self.advice(),
        }


def measure_parity(
    model: bytes, name: str, samples: Callable[[str], Samples], conditions: Sequence[Condition] = CONDITIONS
) -> tuple[float | None, tuple[ConditionResult, ...]]:
    """Return the accuracy of `model` as evaluated, and its distance from that under each condition.

    Args:
        model: the bytes of an ONNX file.
        name: what messages call it.
        samples: called with the name of each condition; gives the batches of `qcore.evaluation.evaluate`, the same
            every time. They are read anew, so that memory does not grow with their number.
        conditions: which.

    Raises:
        ModelError, DataError: as `evaluate`.
    """
    default = ort.on_samples(ort.load_exact(model, name=name))
    results, top1 = [], None
    for condition in conditions:
        predict = ort.on_samples(condition.load(model, name=f"{name} ({condition.name})"))
        metrics = evaluate(predict, default, samples(condition.name)).metrics
        top1 = metrics.get("baseline_top1")
        results.append(_result(condition, metrics))
    return top1, tuple(results)


def _result(condition: Condition, metrics: Mapping[str, float]) -> ConditionResult:
    agreement, sqnr_db = metrics.get("agreement"), metrics["output_sqnr_db"]
    verdict: Verdict = "near"
    if sqnr_db >= SQNR_LIMIT:
        verdict = "equal"
    elif sqnr_db < SQNR_DB or (agreement is not None and agreement < AGREEMENT):
        verdict = "far"
    return ConditionResult(
        name=condition.name,
        verdict=verdict,
        agreement=agreement,
        top1=metrics.get("top1"),
        sqnr_db=sqnr_db,
        meaning=condition.meaning,
        advice=condition.remedy if verdict == "far" else "nothing to do",
    )
