"""A channel's pointer: which release its devices take, and what they must not go back to.

The pointer is a target `channels/<channel>/<family>/release.json` whose signed custom data say everything, so devices
read it without a download. It is changed, never removed: its epoch only rises, and a device that saw a higher one
refuses to go back.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tuf.api.metadata import TargetFile, Targets

from qcore.canonical import canonical_json
from qcore.errors import ReleaseError
from qcore.release.roles import custom_of, target_of

POINTER_SCHEMA = 1
ALL_DEVICES = 10_000
"""`permyriad` of a release that every device of the channel takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pointer:
    """What a channel offers of one family.

    `state`: `done` (every device takes it) or `yanked` (nobody takes it any more; who has it keeps it). `counter` is
    that of the release, `salt` chooses devices where `permyriad` is not all of them. `yanked` are releases that this
    channel must not offer again.
    """

    epoch: int
    state: str
    release: str
    counter: int
    salt: str
    floor: int = 0
    permyriad: int = ALL_DEVICES
    schema: int = POINTER_SCHEMA
    yanked: tuple[str, ...] = field(default=())


def pointer_path(channel: str, family: str) -> str:
    """Return the target path of the pointer."""
    return f"channels/{channel}/{family}/release.json"


def read_pointer(role: Targets, path: str) -> Pointer | None:
    """Return the pointer at `path`, None if the channel has never offered this family.

    Raises:
        ReleaseError: it was not made by qcore.
    """
    if path not in role.targets:
        return None
    known = {f.name for f in fields(Pointer)}
    values: dict[str, Any] = {k: v for k, v in custom_of(role.targets[path]).items() if k in known}
    try:
        return Pointer(**{**values, "yanked": tuple(values.get("yanked", ()))})
    except TypeError as e:
        raise ReleaseError(f"{path}: its signed custom data are no pointer ({e}); check who signs this channel") from e


def pointed_at(package: TargetFile, family: str, before: Pointer | None, floor: int) -> Pointer:
    """Return the pointer to `package` that follows `before`."""
    epoch = 1 if before is None else before.epoch + 1
    return Pointer(
        epoch=epoch,
        state="done",
        release=package.path,
        counter=custom_of(package)["counter"],
        salt=f"{family}:{epoch}",
        floor=floor,
        yanked=() if before is None else before.yanked,
    )


def write_pointer(role: Targets, path: str, pointer: Pointer) -> bytes:
    """Put `pointer` into `role` and return the content of its target."""
    value: dict[str, Any] = asdict(pointer) | {"yanked": list(pointer.yanked)}
    if not pointer.yanked:
        del value["yanked"]
    content = canonical_json(value)
    role.targets[path] = target_of(path, content, json.loads(content))
    return content


def served_models(channels: Mapping[str, Targets], models: Targets, family: str) -> set[str]:
    """Return the digests of the models of `family` that `channels` (roles by name) offer now."""
    served = set()
    for name, role in channels.items():
        pointer = read_pointer(role, pointer_path(name.removeprefix("channel-"), family))
        if pointer is not None and pointer.state != "yanked" and pointer.release in models.targets:
            served.add(str(custom_of(models.targets[pointer.release])["model_sha256"]))
    return served
