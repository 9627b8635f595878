"""What candidate and baseline cost: time, memory, bytes. How much of it is measured depends on who asks."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcore.budgets import Budgets
    from qcore.data.dataset import Dataset
    from qcore.evaluation_part import Costs
    from qcore.measured import Download, Rounds
    from qcore.steps.guard import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Costing:
    """How much is measured of what models cost.

    Args:
        seconds: of timing one inference on one thread, and, with `all_cores`, again on all cores; not less than 20
            rounds, unless `max_runs` is less.
        warmup: calls that are not timed.
        max_runs: most rounds.
        all_cores: whether to time on all cores.
        starts: how many starts of a fresh process are timed, with their memory; 0 for none.
        packages: how many models are packed to see how large their package is: none, the candidate (1), both (2).
    """

    seconds: float
    warmup: int = 5
    max_runs: int = 200
    all_cores: bool = False
    starts: int = 0
    packages: int = 0


TIMING_SECONDS = 2.0
BRIEF = Costing(seconds=0.5)
ONE_RUN = Costing(seconds=0.0, warmup=0, max_runs=1)
LATENCY = Costing(seconds=TIMING_SECONDS)
"""For a curve; where nobody asks but a report has to hold a latency; for a choice by latency."""

STANDARD = Costing(seconds=TIMING_SECONDS, all_cores=True, starts=5, packages=1)
"""For a report. Of 5 starts the slowest one is a bound of the median at 96 %."""


def costing_of(detail: str, seconds: float = TIMING_SECONDS) -> Costing:
    """Return what a report of some `detail` measures: `brief`, `standard`, or `full`, with the baseline's package.

    With more `seconds` there are more rounds and starts in proportion.
    """
    grown = seconds / TIMING_SECONDS
    runs, starts = max(20, round(STANDARD.max_runs * grown)), max(5, round(STANDARD.starts * grown))
    if detail == "brief":
        return replace(LATENCY, seconds=seconds, max_runs=runs)
    packages = 2 if detail == "full" else STANDARD.packages
    return replace(STANDARD, seconds=seconds, max_runs=runs, starts=starts, packages=packages)


def costing_for(budgets: "Budgets") -> Costing | None:
    """Return what a search has to measure so that `budgets` can be judged; None: nothing but sizes of files."""
    asked = set(budgets.model_dump(exclude_none=True)) - {"size_bytes", "size_ratio", "download_bytes"}
    if not asked:
        return None
    times = {"latency_ms", "latency_ratio", "latency_all_cores_ratio"}
    return replace(
        LATENCY if asked & times else BRIEF,
        all_cores="latency_all_cores_ratio" in asked,
        starts=STANDARD.starts if asked & {"cold_start_ms", "memory_bytes", "memory_ratio"} else 0,
        packages=2 if "package_ratio" in asked else 1 if "package_bytes" in asked else 0,
    )


def pack(pool: ThreadPoolExecutor, files: Sequence[bytes], costing: Costing) -> list[Future[int]]:
    """Return the sizes in a package of the first `costing.packages` of `files`, worked out beside other things."""
    from qcore.release.package import packed_size

    return [pool.submit(packed_size, raw) for raw in files[: costing.packages]]


def measured_costs(
    files: Sequence[bytes], dataset: "Dataset", costing: Costing, progress: "Progress"
) -> "tuple[dict[str, Rounds], list[int | None]]":
    """Return the rounds by name, and the peak memory of candidate and baseline, the two `files`."""
    from qcore.data.dataset import batches
    from qcore.machine import cores
    from qcore.measured import Rounds
    from qcore.runtime import ort
    from qcore.runtime.starts import measure_starts

    steps = 1 + costing.all_cores + (costing.starts > 0)
    progress("measuring latency", 0, steps)
    one = [ort.load(raw, threads=1) for raw in files]
    sample = ort.samples(one[1], next(batches(dataset, one[1].fixed_batch or 1)))
    timing = {"budget_s": costing.seconds, "warmup": costing.warmup, "max_runs": costing.max_runs}
    columns: dict[str, Sequence[tuple[float, ...]]] = {"latency": ort.timed_rounds(one, sample, **timing)}
    feds = [ort.encoded(model, sample) for model in one]
    memory: list[int | None] = [None, None]
    progress("measuring latency", 1, steps)
    del one
    if costing.all_cores:
        every = [ort.load_in_turns(raw, threads=cores()) for raw in files]
        columns["latency_all_cores"] = ort.timed_rounds(every, sample, **timing)
        progress("measuring latency", 2, steps)
        del every
    if costing.starts:
        starts = measure_starts(files, feds, costing.starts)
        columns["cold_start"], memory = [s.ms for s in starts], [s.peak_memory_bytes for s in starts]
        progress("measuring latency", steps, steps)
    return {name: Rounds(candidate=c, baseline=b) for name, (c, b) in columns.items()}, memory


def costs_of(
    measured: "tuple[Mapping[str, Rounds], Sequence[int | None]]", packages: Sequence[int], machine: Mapping[str, str]
) -> "Costs":
    """Return what was measured of candidate and baseline as one value; the first or none of them may be packed."""
    from qcore.evaluation_part import Costs

    rounds, memory = measured
    return Costs(
        rounds=rounds,
        package_bytes=(packages[0] if packages else None, packages[1] if len(packages) > 1 else None),
        peak_memory_bytes=(memory[0], memory[1]),
        machine=machine,
        download=None,
    )


def download_of(released: bytes, candidate: bytes) -> "Download":
    """Return what a device that has the file `released` would download."""
    from qcore.canonical import sha256_bytes
    from qcore.measured import Download
    from qcore.release.delta import delta_bytes

    return Download(released_sha256=sha256_bytes(released), delta_bytes=delta_bytes(released, candidate))
