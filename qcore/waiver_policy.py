"""The part of a gate policy that says who may override it."""

import difflib
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from qcore.config import Config
from qcore.errors import GateRefused
from qcore.report import BUDGETS, NOT_WAIVABLE
from qcore.waiver import MAX_DAYS, Override, Owner

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
OF_METRICS = ("_champion_change", "_change")
"""How the checks of a user's metric end, after its name."""
CHECK_NAMES = (
    *(f"{m}_{ending}" for m in ("top1", "top5", "auc") for ending in ("drop", "champion_drop", "min")),
    *(f"{m}_{ending}" for m in ("slices", "classes") for ending in ("drop", "champion_drop")),
    *("agreement_min", "agreement_champion_drop", "output_sqnr_db"),
    *("mae_increase", "mae_champion_increase", "mae_max", "parity_agreement", "parity_sqnr_db"),
    *BUDGETS,
)
"""Checks that may be waived, beside those of users' metrics."""


def _waivable(name: str) -> str:
    """Return the name of a check that somebody may waive."""
    if name in NOT_WAIVABLE:
        raise ValueError(
            f"what was not measured, or not lately, cannot be waived ({', '.join(NOT_WAIVABLE)}); leave it out"
        )
    if name in CHECK_NAMES or name.endswith(OF_METRICS):
        return name
    raise unknown_check(name, CHECK_NAMES)


def unknown_check(name: str, known: tuple[str, ...]) -> ValueError:
    """Return the error about the name of a check that no check has."""
    near = difflib.get_close_matches(name, (*known, *NOT_WAIVABLE), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}, or METRIC_change of a metric"
    return ValueError(f"no check is called so; {hint}")


CheckName = Annotated[Name, AfterValidator(_waivable)]


class OwnerRule(Config):
    """A person or office that may waive: name, and public ed25519 key as 64 hex digits (`qcore gate owner-key`)."""

    name: Name
    key: str = Field(pattern="^[0-9a-f]{64}$")


class WaiverPolicy(Config):
    """Who may waive which checks, by their names in the gate's table, and for how many days at most."""

    owners: tuple[OwnerRule, ...] = Field(min_length=1)
    checks: tuple[CheckName, ...] = Field(min_length=1)
    max_days: int = Field(default=14, ge=1, le=MAX_DAYS)

    @property
    def override(self) -> Override:
        """The same as a plain value, which decisions carry."""
        owners = tuple(Owner(name=o.name, key=o.key) for o in self.owners)
        return Override(owners=owners, checks=self.checks, max_days=self.max_days)

    @model_validator(mode="after")
    def _holds_together(self) -> "WaiverPolicy":
        try:
            _ = self.override
        except GateRefused as e:
            raise ValueError(str(e)) from e
        return self
