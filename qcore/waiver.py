"""Waivers: who may let a release pass although a check did not, and what such a permission says.

Plain values that hold their own rules, standard library only. A waiver is about one decision: it names the digests of
everything the decision was derived from, and the checks with the numbers that were observed; so it cannot be used for
another model, another measurement, or another limit. How it is signed and applied is in `release/waivers.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from qcore.canonical import Digest, Json
from qcore.errors import GateRefused

MAX_DAYS = 90
"""No policy may allow a longer waiver: what holds for longer is a change of the policy."""
SKEW = timedelta(minutes=5)
"""How far the clock of the one who waives may be ahead."""
MAX_TEXT = 500
WAIVABLE = ("fail", "inconclusive")
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

_AGAIN = "waive again with `qcore gate waive`"
_HEX = frozenset("0123456789abcdef")
_SMALL_ORDER = frozenset(
    {
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        *(f"{first}{'ff' * 30}7f" for first in ("ec", "ed", "ee")),
    }
)
"""Points of small order on edwards25519 but for the sign bit: public keys of signatures that need no secret.
Source: Chalkias, Garillot and Nikolaenko 2020, "Taming the many EdDSAs"."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who answers for a waiver: a name, and the public ed25519 key, 32 bytes as 64 lower-case hex digits."""

    name: str
    key: str

    def __post_init__(self) -> None:
        """Refuse a name that no line can show, and what is no key."""
        _check_text("name of an owner", self.name)
        _check_hex("key of an owner", self.key)
        if f"{self.key[:62]}{int(self.key[62:], 16) & 0x7F:02x}" in _SMALL_ORDER:
            raise GateRefused(
                f"waiver: key of {self.name} is {self.key[:12]}..., whose signatures anybody can make; allowed: a key "
                "that `qcore gate owner-key` made"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """Who may override a policy: each of `owners` may waive `checks`, for at most `max_days`. Empty: nobody.

    Invariant: names and keys are there once; owners, checks and days are all there or all absent.
    """

    owners: tuple[Owner, ...] = ()
    checks: tuple[str, ...] = ()
    max_days: int = 0

    def __post_init__(self) -> None:
        """Hold the invariant."""
        for what, values in (
            ("names", [o.name for o in self.owners]),
            ("keys", [o.key for o in self.owners]),
            ("checks", list(self.checks)),
        ):
            if len(set(values)) != len(values):
                raise GateRefused(f"waivers: {what} {values} are not all different; name each once in the policy")
        for check in self.checks:
            _check_text("name of a check", check)
        if type(self.max_days) is not int or not 0 <= self.max_days <= MAX_DAYS:
            raise GateRefused(f"waivers: max_days is {self.max_days!r}; allowed: 1 to {MAX_DAYS}; change the policy")
        if len({bool(self.owners), bool(self.checks), bool(self.max_days)}) > 1:
            raise GateRefused("waivers: owners, checks and max_days belong together; change the policy")

    def sentence(self) -> str:
        """Return who may override, for people."""
        if not self.owners:
            return "Nobody may override: the policy allows no waivers."
        names, checks = _listed([o.name for o in self.owners], "or"), _listed(self.checks, "and")
        return f"{names} may waive {checks} by a signed waiver, each for at most {self.max_days} days; nothing else."


NOBODY = Override()


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """The digests that a decision rests on and a waiver is about.

    `parity` is None where no parity report was given, `package` for a local decision.
    """

    model: Digest
    baseline: Digest
    data: Digest
    policy: Digest
    report: Digest
    parity: Digest | None
    package: Digest | None

    def __post_init__(self) -> None:
        """Refuse what is no digest."""
        for name in self.__slots__:
            value = getattr(self, name)
            if name not in ("parity", "package") or value is not None:
                _check_hex(f"digest of the {name}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class WaivedCheck:
    """A check that is waived, with what it said: the numbers are those of `qcore.report.Check`."""

    name: str
    outcome: str
    observed: float
    bound: float
    limit: float

    def __post_init__(self) -> None:
        """Refuse what no check that can be waived says."""
        _check_text("name of a check", self.name)
        if self.outcome not in WAIVABLE:
            raise GateRefused(f"waiver: {self.name} is {self.outcome!r}; allowed: {', '.join(WAIVABLE)}; leave it out")
        numbers = (self.observed, self.bound, self.limit)
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise GateRefused(f"waiver: {self.name} holds {numbers}; allowed: finite numbers; {_AGAIN}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """The permission of `owner` to release in spite of `checks`, between two times (ISO 8601, UTC, whole seconds).

    Invariant: at least one check, each once; a reason of one line; `expires` is after `issued`.
    """

    owner: Owner
    reason: str
    issued: str
    expires: str
    binding: Binding
    checks: tuple[WaivedCheck, ...]

    def __post_init__(self) -> None:
        """Hold the invariant."""
        _check_text("reason", self.reason)
        if self.lifetime <= timedelta(0):
            raise GateRefused(f"waiver: expires {self.expires}, issued {self.issued}; allowed: later; {_AGAIN}")
        names = [c.name for c in self.checks]
        if not names or len(set(names)) != len(names):
            raise GateRefused(f"waiver: waives {names}; allowed: at least one check, each once; {_AGAIN}")

    @property
    def lifetime(self) -> timedelta:
        """How long it holds."""
        return parse_time(self.expires) - parse_time(self.issued)

    def sentence(self) -> str:
        """Return who waived what, until when and why, for people."""
        names = _listed([c.name for c in self.checks], "and")
        return f"{self.owner.name} waived {names} until {self.expires}: {self.reason}"

    def to_json(self) -> Json:
        """Return the JSON form, which is signed."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedWaiver:
    """A waiver and its owner's signature (ed25519 over the DSSE encoding, 64 bytes as lower-case hex digits)."""

    waiver: Waiver
    signature: str

    def __post_init__(self) -> None:
        """Refuse what is no signature."""
        _check_hex("signature of a waiver", self.signature, 128)


def refuse_not_permitted(waiver: Waiver, override: Override) -> None:
    """Refuse a waiver that goes beyond what the policy lets its owner do.

    Raises:
        GateRefused: a foreign owner, a check that is not among those, or too long a life.
    """
    if not override.owners:
        raise GateRefused(f"waiver of {waiver.owner.name}: {override.sentence()} Mend the model, or change the policy")
    if waiver.owner not in override.owners:
        raise GateRefused(
            f"waiver of {waiver.owner.name} (key {waiver.owner.key[:8]}) is foreign: {override.sentence()} "
            "Ask one of them"
        )
    if beyond := [c.name for c in waiver.checks if c.name not in override.checks]:
        raise GateRefused(f"waiver of {waiver.owner.name} waives too much ({', '.join(beyond)}): {override.sentence()}")
    if waiver.lifetime > timedelta(days=override.max_days):
        raise GateRefused(
            f"waiver of {waiver.owner.name} holds for {waiver.lifetime.days} days; the policy allows "
            f"{override.max_days}; {_AGAIN}"
        )


def refuse_other_subject(waiver: Waiver, binding: Binding) -> None:
    """Refuse a waiver that is about something else than `binding`.

    Raises:
        GateRefused: a digest differs; it names the first one.
    """
    for name in binding.__slots__:
        ours, theirs = getattr(binding, name), getattr(waiver.binding, name)
        if ours != theirs:
            shown = [str(x)[:12] if x else "none" for x in (theirs, ours)]
            raise GateRefused(
                f"waiver of {waiver.owner.name} is about {name} {shown[0]}, this decision about {shown[1]}; "
                "waive the evidence of exactly this decision"
            )


def refuse_out_of_time(waiver: Waiver, now: datetime) -> None:
    """Refuse a waiver that does not hold at `now` (aware).

    Raises:
        GateRefused: it expired, or its time has not come.
    """
    if now >= parse_time(waiver.expires):
        raise GateRefused(f"waiver of {waiver.owner.name} expired at {waiver.expires}; mend the model, or {_AGAIN}")
    if parse_time(waiver.issued) > now + SKEW:
        raise GateRefused(
            f"waiver of {waiver.owner.name} was issued at {waiver.issued}, in the future; correct the clock, {_AGAIN}"
        )


def parse_time(text: object) -> datetime:
    """Return the time that `text` says, in UTC.

    Raises:
        GateRefused: not in the one form, such as 2026-11-03T12:00:00Z.
    """
    try:
        found = datetime.strptime(str(text), TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError as e:
        raise GateRefused(f"waiver: time {str(text)[:40]!r}; allowed: as 2026-11-03T12:00:00Z; {_AGAIN}") from e
    if text != format_time(found):
        raise GateRefused(f"waiver: time {str(text)[:40]!r}; allowed: as {format_time(found)}; {_AGAIN}")
    return found


def format_time(when: datetime) -> str:
    """Return the aware time `when` in UTC, whole seconds."""
    return when.astimezone(UTC).strftime(TIME_FORMAT)


def waiver_from_json(value: Json) -> Waiver:
    """Return the waiver that `to_json` wrote.

    Raises:
        GateRefused: a field is missing, unknown or of another type, or the waiver breaks its own rules.
    """
    v = _fields(Waiver, value)
    return Waiver(
        owner=Owner(**_fields(Owner, v["owner"])),
        reason=v["reason"],
        issued=v["issued"],
        expires=v["expires"],
        binding=Binding(**_fields(Binding, v["binding"])),
        checks=tuple(WaivedCheck(**_fields(WaivedCheck, c)) for c in _items(v["checks"], "checks")),
    )


def signed_waiver_from_json(value: Json) -> SignedWaiver:
    """Return the waiver with its signature as a decision holds it; raises as `waiver_from_json`."""
    v = _fields(SignedWaiver, value)
    return SignedWaiver(waiver=waiver_from_json(v["waiver"]), signature=v["signature"])


def override_from_json(value: Json) -> Override:
    """Return who may override as a decision holds it; raises as `waiver_from_json`."""
    v = _fields(Override, value)
    return Override(
        owners=tuple(Owner(**_fields(Owner, o)) for o in _items(v["owners"], "owners")),
        checks=tuple(_items(v["checks"], "checks")),
        max_days=v["max_days"],
    )


def _fields(kind: type[_T], value: Json) -> Mapping[str, Any]:
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # only called with the dataclasses above
    if not isinstance(value, dict):
        raise GateRefused(f"{kind.__name__.lower()}: is {type(value).__name__}; expected an object; {_AGAIN}")
    if odd := sorted(names ^ set(value)):
        state = "missing" if odd[0] in names else "unknown"
        raise GateRefused(f"{kind.__name__.lower()}: field {odd[0]!r} is {state}; {_AGAIN}")
    return value


def _items(value: Json, what: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise GateRefused(f"waiver: {what} is {type(value).__name__}; expected a list; {_AGAIN}")
    return value


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        raise GateRefused(
            f"waiver: {what} is {str(value)[:60]!r}; allowed: one line of 1 to {MAX_TEXT} printable characters"
        )


def _check_hex(what: str, value: object, length: int = 64) -> None:
    if not (isinstance(value, str) and len(value) == length and set(value) <= _HEX):
        raise GateRefused(f"waiver: {what} is {str(value)[:70]!r}; allowed: {length} lower-case hex digits")


def _listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
