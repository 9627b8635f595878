"""Parity: does one model file compute the same elsewhere as where it was evaluated?

The same integers are added by other kernels on the target. Each condition here is one way in which they do, run on the
same samples and held against what `qcore evaluate` measures. Nothing here knows files; the report that comes of it is
in `parity_report.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qcore.evaluation import Tensors, evaluate
from qcore.parity_report import ConditionName, ConditionResult, verdict_of
from qcore.runtime import ort
from qcore.runtime.reference import load_reference

Samples = Iterable[tuple[NDArray[np.int64], Tensors, NDArray[np.int64] | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One way to run a model: what it stands for, and what to do where outputs are far from those evaluated."""

    name: ConditionName
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


def measure_parity(
    model: bytes,
    name: str,
    samples: Callable[[str], Samples],
    conditions: Sequence[Condition] = CONDITIONS,
    named: bool = True,
) -> tuple[float | None, tuple[ConditionResult, ...]]:
    """Return the accuracy of `model` as evaluated, and its distance from that under each condition.

    Args:
        model: the bytes of an ONNX file.
        name: what messages call it.
        samples: called with the name of each condition; gives the batches of `qcore.evaluation.evaluate`, the same
            every time. They are read anew, so that memory does not grow with their number.
        conditions: which.
        named: whether outputs of two values or more name a class, so that agreement means something; those of a
            regression do not.

    Raises:
        ModelError, DataError: as `evaluate`.
    """
    default = ort.on_samples(ort.load_exact(model, name=name))
    results, top1 = [], None
    for condition in conditions:
        predict = ort.on_samples(condition.load(model, name=f"{name} ({condition.name})"))
        metrics = evaluate(predict, default, samples(condition.name)).metrics
        top1 = metrics.get("baseline_top1")
        results.append(_result(condition, metrics, named))
    return top1, tuple(results)


def _result(condition: Condition, metrics: Mapping[str, float], named: bool) -> ConditionResult:
    agreement, sqnr_db = metrics.get("agreement") if named else None, metrics["output_sqnr_db"]
    verdict = verdict_of(agreement, sqnr_db)
    return ConditionResult(
        name=condition.name,
        verdict=verdict,
        agreement=agreement,
        top1=metrics.get("top1"),
        sqnr_db=sqnr_db,
        meaning=condition.meaning,
        advice=condition.remedy if verdict == "far" else "nothing to do",
    )
