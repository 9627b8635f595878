"""The release manifest: what is in a package, what it needs, and how it proves itself on the device.

Standard library only, because the device reads it. The manifest describes bytes; the release counter, the channel and
the rollout are not here: they are decided at publication and live in signed TUF metadata.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from qcore.canonical import Digest, Json
from qcore.errors import PackageError, QcoreError

MANIFEST_SCHEMA = "qcore.manifest/2"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
LABELS = "labels.json"
MEMBERS = (GOLDEN, LABELS, MODEL)
"""Everything a package may hold besides its manifest, in the order of the archive."""
MAX_MEMBER_BYTES = (1 << 31) - 1
"""An ONNX file is one protobuf message: below 2 GiB."""

_NAME = re.compile(r"(?!.*\.\.)[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of the package: size and SHA-256 of its uncompressed bytes, and its size as stored."""

    path: str
    size_bytes: int
    sha256: Digest
    stored_size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Compatibility:
    """What a device must be: one of `hardware`, onnxruntime at least `onnxruntime`, with one of `providers`."""

    hardware: tuple[str, ...]
    onnxruntime: str
    opset: int
    providers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One graph input or output; a dimension is a size, a symbol, or None where it is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What the self-test demands of the golden samples.

    `n` samples; `max_abs_error` in units of the outputs; `argmax_agreement` is the least share of equal arg-max.
    """

    n: int
    max_abs_error: float
    argmax_agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where the golden samples come from (digest of the split) and what built the package.

    The gate refuses a package whose samples are not of the data that were measured; what else the model was held
    against stands in the signed decision, which names the package.
    """

    data_sha256: Digest
    qcore_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseManifest:
    """The content of `manifest.json`.

    Invariants: names are of `[a-z0-9._-]`; members are among MEMBERS, each once, sorted, and hold model and golden.
    """

    family: str
    version: str
    members: tuple[Member, ...]
    compat: Compatibility
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    golden: Golden
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        """Hold the invariants, whoever builds the value."""
        check_name("family", self.family, PackageError)
        check_name("version", self.version, PackageError)
        paths = [m.path for m in self.members]
        if paths != sorted(set(paths) & set(MEMBERS)) or not {MODEL, GOLDEN} <= set(paths):
            raise PackageError(
                f"manifest: members {paths}; allowed: {list(MEMBERS)} in that order, {MODEL} and {GOLDEN} required"
            )
        for m in self.members:
            if not (0 < m.size_bytes <= MAX_MEMBER_BYTES and 0 < m.stored_size_bytes <= MAX_MEMBER_BYTES):
                raise PackageError(f"manifest: {m.path} of {m.size_bytes} bytes; allowed: 1 to {MAX_MEMBER_BYTES}")
            if not _DIGEST.fullmatch(m.sha256):
                raise PackageError(f"manifest: {m.path} has sha256 {m.sha256!r}; expected 64 lower-case hex digits")
        if not self.compat.hardware or not self.inputs or not self.outputs:
            raise PackageError("manifest: hardware, inputs and outputs must not be empty; build the package again")
        g = self.golden
        if g.n < 1 or not (math.isfinite(g.max_abs_error) and g.max_abs_error >= 0 and 0 <= g.argmax_agreement <= 1):
            raise PackageError(f"manifest: golden limits {g} cannot be held; allowed: n >= 1, finite error, share of 1")

    def member(self, path: str) -> Member:
        """Return the member named `path`, which must be there."""
        return next(m for m in self.members if m.path == path)

    @property
    def model_sha256(self) -> Digest:
        """The digest of the model that devices will run."""
        return self.member(MODEL).sha256

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.manifest/2`)."""
        return {"schema": MANIFEST_SCHEMA, **asdict(self)}


def manifest_from_json(value: Json) -> ReleaseManifest:
    """Return the manifest that `to_json` wrote.

    Raises:
        PackageError: another schema; a field that is missing, unknown or of the wrong type; a broken invariant.
    """
    if not isinstance(value, dict) or value.get("schema") != MANIFEST_SCHEMA:
        raise PackageError(f"manifest: not of schema {MANIFEST_SCHEMA}; this qcore cannot read it, update qcore")
    v = {k: x for k, x in value.items() if k != "schema"}
    v["members"] = _all(Member, v.get("members"))
    v["inputs"] = _all(TensorInfo, v.get("inputs"))
    v["outputs"] = _all(TensorInfo, v.get("outputs"))
    v["compat"] = _one(Compatibility, v.get("compat"))
    v["golden"] = _one(Golden, v.get("golden"))
    v["provenance"] = None if v.get("provenance") is None else _one(Provenance, v["provenance"])
    return _build(ReleaseManifest, v)


def check_name(what: str, name: object, error: type[QcoreError]) -> str:
    """Return `name` if it is safe in paths, URLs and role names: `[a-z0-9._-]`, at most 64, no `..`, no dot at an end.

    Raises:
        QcoreError: (of the class `error`) it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise error(
            f"{what} {name!r} is not allowed; allowed: 1 to 64 of a-z 0-9 . _ -, first and last a letter or digit, "
            "no '..'; choose another name"
        )
    return name


_IS: Mapping[object, Callable[[object], bool]] = {
    str: lambda x: isinstance(x, str) and len(x) <= 256,
    int: lambda x: type(x) is int,
    float: lambda x: type(x) in (int, float),
    tuple[str, ...]: lambda x: isinstance(x, tuple) and all(isinstance(s, str) for s in x),
    tuple[int | str | None, ...]: lambda x: isinstance(x, tuple) and all(s is None or type(s) in (int, str) for s in x),
}
"""What a JSON value must be for a field of each simple type; fields of other types are built before."""


def _build(cls: type[_T], value: Mapping[str, Any]) -> _T:
    types = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]  # only called with the dataclasses above
    if set(value) != set(types):
        odd = sorted(set(value) ^ set(types))
        raise PackageError(f"manifest: {cls.__name__} has missing or unknown fields {odd}; build the package again")
    for name, x in value.items():
        if types[name] in _IS and not _IS[types[name]](x):
            raise PackageError(f"manifest: {cls.__name__}.{name} is {x!r}; expected {types[name]}; build it again")
    return cls(**value)


def _one(cls: type[_T], value: Json) -> _T:
    if not isinstance(value, dict):
        raise PackageError(f"manifest: {cls.__name__} is {type(value).__name__}; expected an object")
    return _build(cls, {k: tuple(x) if isinstance(x, list) else x for k, x in value.items()})


def _all(cls: type[_T], value: Json) -> Sequence[_T]:
    if not isinstance(value, list) or len(value) > 1000:
        raise PackageError(f"manifest: {cls.__name__} list is {type(value).__name__}; expected at most 1000 entries")
    return tuple(_one(cls, v) for v in value)
