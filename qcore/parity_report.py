"""The parity report: how far one model file is under other conditions from what was evaluated, as it is stored.

How it is measured is in `parity.py`; the gate only reads it, and so does not load a runtime.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from qcore.canonical import Digest, Json, canonical_json, sha256_json
from qcore.errors import GateRefused
from qcore.numerics.error import SQNR_LIMIT

PARITY_SCHEMA = "qcore.parity/2"
AGREEMENT = 0.95
SQNR_DB = 20.0
"""Below this share of equal predictions, or with noise of more than 1 % of the outputs' power, a condition is far.
Roundings that fall on the other side alone left 0.96 and 24 dB or more (64 images, docs/benchmarks.md)."""
AGAIN = "run `qcore parity` again"

Verdict = Literal["equal", "near", "far"]
ConditionName = Literal[
    "optimizations-off",
    "optimizations-basic",
    "optimizations-all",
    "one-thread",
    "four-threads",
    "exact-integers",
    "saturating-pairs",
]


def verdict_of(agreement: float | None, sqnr_db: float) -> Verdict:
    """Return how far outputs are that agree on this share of predictions and have this SQNR."""
    if sqnr_db >= SQNR_LIMIT:
        return "equal"
    return "far" if sqnr_db < SQNR_DB or (agreement is not None and agreement < AGREEMENT) else "near"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionResult:
    """How far a model is under one condition from what was evaluated.

    `agreement` is None where outputs name no class, `top1` without classes; `sqnr_db` is that of the worst output.
    """

    name: str
    verdict: Verdict
    agreement: float | None
    top1: float | None
    sqnr_db: float
    meaning: str
    advice: str

    def __post_init__(self) -> None:
        """Refuse what no measurement gives, also in a file."""
        _check_texts(self.name, self.meaning, self.advice)
        _check_share(self.agreement, f"agreement of {self.name}")
        _check_share(self.top1, f"top1 of {self.name}")
        if type(self.sqnr_db) not in (int, float) or not abs(self.sqnr_db) <= SQNR_LIMIT:
            raise _wrong(f"sqnr_db of {self.name}", self.sqnr_db, f"a number from -{SQNR_LIMIT} to {SQNR_LIMIT}")
        if self.verdict != (expected := verdict_of(self.agreement, self.sqnr_db)):
            raise _wrong(f"verdict of {self.name}", self.verdict, f"{expected}, as its numbers say")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityOf:
    """What was measured: the model file, its target profile if it names one, the samples, and what ran it.

    `data_sha256` is the digest of the `n` samples that ran, `split_sha256` that of the whole split they are from, which
    an evaluation report holds too.
    """

    model: str
    model_sha256: Digest
    target: str | None
    data: str
    split: str
    data_sha256: Digest
    split_sha256: Digest
    n: int
    runtime: Mapping[str, str]
    qcore_version: str

    def __post_init__(self) -> None:
        """Refuse what no measurement gives, also in a file."""
        target = () if self.target is None else (self.target,)
        _check_texts(self.model, self.data, self.split, self.qcore_version, *target)
        if not isinstance(self.runtime, Mapping):
            raise _wrong("runtime", self.runtime, "an object of texts")
        _check_texts(*self.runtime, *self.runtime.values())
        for what in ("model_sha256", "data_sha256", "split_sha256"):
            value = getattr(self, what)
            if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
                raise _wrong(what, value, "a SHA-256 of 64 lower-case hex digits")
        if type(self.n) is not int or self.n < 1:
            raise _wrong("n", self.n, "a whole number of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """All conditions in the order in which they ran; `top1` is the accuracy as evaluated, None without classes."""

    measured: ParityOf
    top1: float | None
    conditions: tuple[ConditionResult, ...]

    def __post_init__(self) -> None:
        """Refuse a report on nothing, or on one condition twice."""
        _check_share(self.top1, "top1 as evaluated")
        names = [c.name for c in self.conditions]
        if not names or len(set(names)) != len(names):
            raise _wrong("conditions", names, "at least one, each once")
        if len({c.agreement is None for c in self.conditions}) > 1:
            raise _wrong("agreement", None, "a share in all conditions or in none")
        for c in self.conditions:
            if (c.top1 is None) != (self.top1 is None):
                raise _wrong(f"top1 of {c.name}", c.top1, "a share exactly where there is one as evaluated")

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
        """Return the JSON form (`qcore.parity/2`)."""
        m, worst = self.measured, self.worst
        return {
            "schema": PARITY_SCHEMA,
            "model": {"name": m.model, "sha256": m.model_sha256},
            "data": {
                "name": m.data,
                "split": m.split,
                "split_sha256": m.split_sha256,
                "sha256": m.data_sha256,
                "n": m.n,
            },
            "target": m.target,
            "runtime": dict(m.runtime),
            "qcore_version": m.qcore_version,
            "as_evaluated": {"top1": self.top1},
            "conditions": [asdict(c) for c in self.conditions],
            "worst": None if worst is None else worst.name,
            "limits": {"agreement": AGREEMENT, "sqnr_db": SQNR_DB},
            "advice": self.advice(),
        }

    @property
    def sha256(self) -> Digest:
        """The digest of the canonical JSON form."""
        return sha256_json(self.to_json())


def parity_from_json(value: Json) -> ParityReport:
    """Return the report that `to_json` wrote; one that differs in anything from what its numbers give is refused.

    Raises:
        GateRefused: a field is missing, unknown, of another type, contradicts another one, or the schema is wrong.
    """
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != PARITY_SCHEMA:
        raise GateRefused(f"expected a parity report of schema {PARITY_SCHEMA}, found {found}; {AGAIN}")
    try:
        report = _read(value)
        same = canonical_json(report.to_json()) == canonical_json(value)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise GateRefused(f"parity report: a field is missing or of another type ({e!r}); {AGAIN}") from e
    if not same:
        raise GateRefused(f"parity report: it holds more, or something else, than its numbers give; {AGAIN}")
    return report


def _read(value: dict[str, Any]) -> ParityReport:
    model, data = value["model"], value["data"]
    measured = ParityOf(
        model=model["name"],
        model_sha256=model["sha256"],
        target=value["target"],
        data=data["name"],
        split=data["split"],
        data_sha256=data["sha256"],
        split_sha256=data["split_sha256"],
        n=data["n"],
        runtime=value["runtime"],
        qcore_version=value["qcore_version"],
    )
    conditions = tuple(ConditionResult(**c) for c in value["conditions"])
    return ParityReport(measured=measured, top1=value["as_evaluated"]["top1"], conditions=conditions)


def _check_texts(*values: object) -> None:
    for value in values:
        if not isinstance(value, str):
            raise _wrong("a name or text", value, "text")


def _check_share(value: object, what: str) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and 0 <= value <= 1):
        raise _wrong(what, value, "a share from 0 to 1, or null")


def _wrong(what: str, found: object, allowed: str) -> GateRefused:
    return GateRefused(f"parity report: {what} is {str(found)[:60]!r}; allowed: {allowed}; {AGAIN}")


CONDITION_NAMES: tuple[ConditionName, ...] = get_args(ConditionName)
