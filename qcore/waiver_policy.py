"""The part of a gate policy that says who may override it."""

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from qcore.config import Config
from qcore.errors import GateRefused
from qcore.waiver import MAX_DAYS, Override, Owner

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class OwnerRule(Config):
    """A person or office that may waive: name, and public ed25519 key as 64 hex digits (`qcore gate owner-key`)."""

    name: Name
    key: str = Field(pattern="^[0-9a-f]{64}$")


class WaiverPolicy(Config):
    """Who may waive which checks, by their names in the gate's table, and for how many days at most."""

    owners: tuple[OwnerRule, ...] = Field(min_length=1)
    checks: tuple[Name, ...] = Field(min_length=1)
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
