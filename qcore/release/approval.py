"""What the offline keys approved for a family: policies, evaluation data, and how old evidence may be.

The gate judges by the policy and on the samples that it is given. That these are the right ones is said here, in the
delegation of `models-<family>`, which the offline keys sign: a weakened policy or an easier evaluation set changes a
digest, and the co-signer refuses it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast, get_args

from qcore.canonical import Digest, Json
from qcore.errors import GateRefused
from qcore.report import GateDecision
from qcore.waiver import SKEW, parse_time

APPROVED = "x-qcore-approved"
"""Field of a `models-*` delegation."""
MAX_AGE = timedelta(days=30)
"""How old evidence may be where nobody said otherwise."""
Against = Literal["any", "served"]
"""What an evaluation must compare with besides the baseline: whatever its policy says, or a model that is served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Approval:
    """Digests of policies (with what they must compare against) and of evaluation data, and the age of evidence.

    `max_age` None: nobody said; MAX_AGE counts.
    """

    policies: Mapping[Digest, Against]
    data: tuple[Digest, ...]
    max_age: timedelta | None = None

    def __post_init__(self) -> None:
        """Refuse what approves nothing that can be meant."""
        odd = [d for d in (*self.policies, *self.data) if not (isinstance(d, str) and len(d) == 64)]
        if (
            odd
            or any(v not in get_args(Against) for v in self.policies.values())
            or (self.max_age or MAX_AGE) <= timedelta(0)
        ):
            raise GateRefused(f"approval {self!r} cannot be used; allowed: digests, any or served, an age above 0")

    def to_json(self) -> Json:
        """Return the form that is signed."""
        said = {} if self.max_age is None else {"max_age_s": int(self.max_age.total_seconds())}
        return {"policies": dict(sorted(self.policies.items())), "data": sorted(self.data), **said}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A wish: that `approval` counts for `family`, beside what is approved already; with `only`, in its place."""

    family: str
    approval: Approval
    only: bool = False


NOTHING = Approval(policies={}, data=())


def approval_from_json(value: object) -> Approval:
    """Return the approval that `to_json` wrote; of a delegation without one, NOTHING.

    Raises:
        GateRefused: it is something else.
    """
    if value is None:
        return NOTHING
    try:
        v = cast("dict[str, Any]", value)
        age = timedelta(seconds=v["max_age_s"]) if "max_age_s" in v else None
        return Approval(policies=dict(v["policies"]), data=tuple(v["data"]), max_age=age)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise GateRefused(f"approval: the signed field {APPROVED} is malformed ({e!r}); approve again") from e


def widened(old: Approval, new: Approval) -> Approval:
    """Return what approves both; where they say different things of one policy, and of the age, `new` counts."""
    data = tuple(sorted({*old.data, *new.data}))
    return Approval(policies={**old.policies, **new.policies}, data=data, max_age=new.max_age or old.max_age)


def refuse_unapproved(decision: GateDecision, approval: Approval, served: Collection[Digest], now: datetime) -> None:
    """Refuse a decision by another policy or on other data than approved, or one that is too old.

    Args:
        decision: whose signature was verified.
        approval: of its family.
        served: digests of the models of this family that channels serve now.
        now: aware.

    Raises:
        GateRefused: with the first reason.
    """
    where = "have the offline keys approve it (`qcore repo approve`), or evaluate with what is approved"
    for what, found, allowed in (
        ("policy", decision.policy_sha256, tuple(approval.policies)),
        ("evaluation data", decision.data_sha256, approval.data),
    ):
        if found not in allowed:
            known = ", ".join(d[:12] for d in allowed) or "none"
            raise GateRefused(f"{what} {found[:12]} is not approved for this family; approved: {known}; {where}")
    if approval.policies[decision.policy_sha256] == "served" and served and decision.champion_sha256 not in served:
        champion = (decision.champion_sha256 or "none")[:12]
        raise GateRefused(
            f"this policy compares with what is served ({', '.join(d[:12] for d in sorted(served))}); the champion of "
            f"the evaluation is {champion}; evaluate with --champion of the served release"
        )
    if decision.decided is None:
        raise GateRefused("the evidence does not say when it was decided; run `qcore gate` again")
    age = now - parse_time(decision.decided)
    oldest = approval.max_age or MAX_AGE
    if not -SKEW <= age <= oldest:
        raise GateRefused(
            f"the evidence is of {decision.decided}; allowed: at most {oldest} old, and not of the future; "
            "evaluate and run `qcore gate` again"
        )
