"""The gate policy: what a release must satisfy, as people write it in YAML. `gate.py` judges by it."""

from pydantic import Field, model_validator

from qcore.budgets import Budgets
from qcore.config import Config
from qcore.parity_report import CONDITION_NAMES, ConditionName
from qcore.waiver_policy import OF_METRICS, WaiverPolicy, unknown_check


class MetricLimit(Config):
    """Limits of one metric, as fractions of 1.

    `min` is for its own value, `max_drop` against the float baseline, `max_drop_champion` against the released model.
    """

    min: float | None = Field(default=None, gt=0, le=1)
    max_drop: float | None = Field(default=None, gt=0, lt=1)
    max_drop_champion: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _something(self) -> "MetricLimit":
        if self.min is None and self.max_drop is None and self.max_drop_champion is None:
            raise ValueError("a metric limit holds min, max_drop, max_drop_champion, or several")
        return self


class ErrorLimit(Config):
    """Limits of the mean absolute error, in the unit of the targets.

    `max` is for its own value, `max_increase` against the baseline, `max_increase_champion` against the released model.
    """

    max: float | None = Field(default=None, gt=0)
    max_increase: float | None = Field(default=None, gt=0)
    max_increase_champion: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _something(self) -> "ErrorLimit":
        if self.max is None and self.max_increase is None and self.max_increase_champion is None:
            raise ValueError("an error limit holds max, max_increase, max_increase_champion, or several")
        return self


class ValueLimit(Config):
    """How much worse the mean of a metric of the user may be, in its own unit.

    `max_loss` is against the baseline, `max_loss_champion` against the released model.
    """

    max_loss: float | None = Field(default=None, gt=0)
    max_loss_champion: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _something(self) -> "ValueLimit":
        if self.max_loss is None and self.max_loss_champion is None:
            raise ValueError("a value limit holds max_loss, max_loss_champion, or both")
        return self


class GroupLimit(Config):
    """How much top-1 each slice or class may lose, as a fraction of 1, shown for all of them together (Holm).

    `max_drop` is against the baseline, `max_drop_champion` against the released model. Groups of fewer than
    `min_support` samples are listed as not judged; with `require` that fails the check.
    """

    max_drop: float | None = Field(default=None, gt=0, lt=1)
    max_drop_champion: float | None = Field(default=None, gt=0, lt=1)
    min_support: int = Field(default=50, gt=0)
    require: bool = False

    @model_validator(mode="after")
    def _something(self) -> "GroupLimit":
        if self.max_drop is None and self.max_drop_champion is None:
            raise ValueError("a limit of groups holds max_drop, max_drop_champion, or both")
        return self


class ParityLimit(Config):
    """How far outputs may be from those evaluated under the worst condition that `qcore parity` ran.

    `agreement` is the least share of equal predictions, `sqnr_db` the least SQNR of the worst output; neither has a
    confidence bound, since the samples of `qcore parity` are few and conditions differ by arithmetic, not by chance.
    `conditions` must be there and are judged; others are not. All that qcore knows when absent.
    """

    agreement: float | None = Field(default=None, gt=0, le=1)
    sqnr_db: float | None = Field(default=None, ge=-300, le=300)
    conditions: tuple[ConditionName, ...] = Field(default=CONDITION_NAMES, min_length=1)

    @model_validator(mode="after")
    def _something(self) -> "ParityLimit":
        if self.agreement is None and self.sqnr_db is None:
            raise ValueError("a parity limit holds agreement, sqnr_db, or both")
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError("conditions names one twice")
        return self


METRICS = ("top1", "top5", "agreement", "output_sqnr_db", "mae", "auc", "slices", "classes")
"""Fields of a policy that limit what the report measured, beside the metrics of users."""
AGAINST_CHAMPION = {
    "max_drop_champion": "champion_drop",
    "max_increase_champion": "champion_increase",
    "max_loss_champion": "champion_change",
}
"""Limits against the champion, and how the checks that ask them end."""


class GatePolicy(Config):
    """What a release must satisfy.

    `confidence` is one-sided and holds for every check by itself; `slices` and `classes` are one check each, over all
    their groups. `top1`, `top5`, `slices` and `classes` need labels, `mae` a regression, `auc` (area under the ROC
    curve) anomalies; `metrics` names metrics of the user. `agreement` (share of samples on which candidate and baseline
    name the same class) has no drop against the baseline, only a minimum and a drop against the champion's.
    `output_sqnr_db` is the least ratio of the outputs' power to the power of their error, in dB, over all samples and
    in every output; it has no confidence bound.

    Limits against the champion fail where the report has none, unless `first_release` says that nothing was released
    before; where a champion was measured they are judged all the same. `parity` fails without a parity report.
    `max_age_days` is the age at which what was measured is too old to decide on. `waivers` says who may override which
    checks; without it nobody may.
    """

    name: str = "default"
    confidence: float = Field(default=0.95, ge=0.8, lt=1)
    top1: MetricLimit | None = None
    top5: MetricLimit | None = None
    agreement: MetricLimit | None = None
    output_sqnr_db: float | None = Field(default=None, ge=-300, le=300)
    mae: ErrorLimit | None = None
    auc: MetricLimit | None = None
    metrics: dict[str, ValueLimit] = Field(default_factory=dict)
    slices: GroupLimit | None = None
    classes: GroupLimit | None = None
    budgets: Budgets = Budgets()
    first_release: bool = False
    parity: ParityLimit | None = None
    max_age_days: float | None = Field(default=None, gt=0)
    waivers: WaiverPolicy | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> "GatePolicy":
        if not self.metrics and all(getattr(self, name) is None for name in METRICS):
            raise ValueError(
                f"a policy limits at least one of {', '.join(METRICS)}, metrics; asking nothing would pass everything"
            )
        if self.agreement is not None and self.agreement.max_drop is not None:
            raise ValueError("agreement has no max_drop; set min, or max_drop_champion")
        if self.first_release and not _asks_without_champion(self):
            raise ValueError(
                "a first release is held against nothing but a champion that is not there; limit something against "
                "the baseline too, or a minimum"
            )
        return self

    @model_validator(mode="after")
    def _waives_metrics_that_it_names(self) -> "GatePolicy":
        known = tuple(f"{name}{ending}" for name in self.metrics for ending in OF_METRICS)
        for check in () if self.waivers is None else self.waivers.checks:
            if check.endswith(OF_METRICS) and check not in known:
                raise ValueError(f"waivers.checks has {check!r}: {unknown_check(check, known)}")
        return self


def champion_checks(policy: GatePolicy) -> tuple[str, ...]:
    """Return the names of the checks that hold the candidate against the champion."""
    limits = {name: getattr(policy, name) for name in METRICS} | dict(policy.metrics)
    return tuple(
        f"{name}_{ending}"
        for name, limit in limits.items()
        for field, ending in AGAINST_CHAMPION.items()
        if getattr(limit, field, None) is not None
    )


def _asks_without_champion(policy: GatePolicy) -> bool:
    """Say whether a limit on what was measured is left where nothing is held against a champion."""
    limits = [getattr(policy, name) for name in METRICS] + list(policy.metrics.values())
    of_its_own = ("min", "max", "max_drop", "max_increase", "max_loss")
    return any(
        isinstance(limit, float) or any(getattr(limit, field, None) is not None for field in of_its_own)
        for limit in limits
    )


def for_choosing(policy: GatePolicy) -> GatePolicy | None:
    """Return what of `policy` can be asked of a candidate that is one of several; None if nothing is left.

    Champion, download, parity and age belong to a release: they are asked by `qcore gate`, when there is one candidate.
    """
    if not _asks_without_champion(policy):
        return None
    budgets = policy.budgets.model_copy(update={"download_bytes": None})
    return policy.model_copy(update={"first_release": True, "parity": None, "max_age_days": None, "budgets": budgets})
