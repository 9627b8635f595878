"""The release manifest: what is in a package, what it needs, and how it proves itself on the device.

Standard library only, because the device reads it. The manifest describes bytes; the release counter, the channel and
the rollout are not here: they are decided at publication and live in signed TUF metadata.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from qcore.canonical import Digest, Json, canonical_json
from qcore.errors import PackageError, QcoreError

MANIFEST_SCHEMA = "qcore.manifest/3"
CARD = "card.md"
GOLDEN = "golden.npz"
LABELS = "labels.json"
MODEL = "model.onnx"
SBOM = "sbom.cdx.json"
MEMBERS = (CARD, GOLDEN, LABELS, MODEL, SBOM)
"""Everything a package may hold besides its manifest, in the order of the archive; only LABELS may be missing."""
MAX_MEMBER_BYTES = (1 << 31) - 1
"""An ONNX file is one protobuf message: below 2 GiB."""
FLASH_BLOCK = 4096

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
class RuntimeRange:
    """Versions of onnxruntime: at least `minimum`, older than `below`; the golden answers come from `tested`."""

    minimum: str
    tested: str
    below: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compatibility:
    """What a device must be and offer; the same object stands in the signed metadata, so it is known before a download.

    Args:
        hardware: the device's class is one of these.
        cpu_features: of each group the CPU has one; names as in /proc/cpuinfo (`avx2`, `asimddp`).
        onnxruntime: versions that may run the model.
        opset: version of the standard operators that the model uses.
        providers: execution providers, best first; a device takes the first that its runtime has.
        memory_bytes: peak resident memory of a process that runs the model; None: nobody measured it.
        control_flow: the model holds If, Loop, Scan or the like, whose time nobody can tell from the file.
    """

    hardware: tuple[str, ...]
    cpu_features: tuple[tuple[str, ...], ...]
    onnxruntime: RuntimeRange
    opset: int
    providers: tuple[str, ...]
    memory_bytes: int | None
    control_flow: bool

    def to_json(self) -> Json:
        """Return the JSON form, in lists, as it stands in manifest and signed metadata."""
        return json.loads(canonical_json(asdict(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One graph input or output; a dimension is a size, a symbol, or None where it is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What an execution provider must reproduce: integer kernels of different makers round differently.

    `max_abs_error` is in units of the outputs; `argmax_agreement` is the least share of samples with equal arg-max.
    """

    provider: str
    max_abs_error: float
    argmax_agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What the self-test demands of the `n` golden samples: one tolerance per provider of `Compatibility`, in order."""

    n: int
    tolerances: tuple[Tolerance, ...]


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

    Invariants: names are of `[a-z0-9._-]`; members are MEMBERS, each once and in order; LABELS may be missing.
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
        paths = tuple(m.path for m in self.members)
        if paths not in (MEMBERS, tuple(m for m in MEMBERS if m != LABELS)):
            raise PackageError(
                f"manifest: members {list(paths)}; allowed: {list(MEMBERS)} in that order, {LABELS} or not"
            )
        for m in self.members:
            if not (0 < m.size_bytes <= MAX_MEMBER_BYTES and 0 < m.stored_size_bytes <= MAX_MEMBER_BYTES):
                raise PackageError(f"manifest: {m.path} of {m.size_bytes} bytes; allowed: 1 to {MAX_MEMBER_BYTES}")
            if not _DIGEST.fullmatch(m.sha256):
                raise PackageError(f"manifest: {m.path} has sha256 {m.sha256!r}; expected 64 lower-case hex digits")
        if not self.inputs or not self.outputs:
            raise PackageError("manifest: inputs and outputs must not be empty; build the package again")
        _check_compatibility(self.compat)
        _check_golden(self.golden, self.compat.providers)

    def member(self, path: str) -> Member:
        """Return the member named `path`, which must be there."""
        return next(m for m in self.members if m.path == path)

    @property
    def model_sha256(self) -> Digest:
        """The digest of the model that devices will run."""
        return self.member(MODEL).sha256

    @property
    def flash_bytes(self) -> int:
        """What the unpacked package takes on a disk with blocks of 4 KiB, manifest and record of the slot included."""
        return sum(-(-m.size_bytes // FLASH_BLOCK) * FLASH_BLOCK for m in self.members) + 4 * FLASH_BLOCK

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.manifest/3`)."""
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
    v["compat"] = compatibility_from_json(v.get("compat"))
    v["golden"] = _golden(v.get("golden"))
    v["provenance"] = None if v.get("provenance") is None else _one(Provenance, v["provenance"])
    return _build(ReleaseManifest, v)


def compatibility_from_json(value: Json) -> Compatibility:
    """Return what `Compatibility.to_json` wrote, from a manifest or from signed metadata.

    Raises:
        PackageError: a field is missing, unknown, of the wrong type, or empty where it must not be.
    """
    if not isinstance(value, dict):
        raise PackageError(f"manifest: Compatibility is {type(value).__name__}; expected an object")
    groups = value.get("cpu_features")
    if not isinstance(groups, list) or not all(isinstance(g, list) and g for g in groups):
        raise PackageError(f"manifest: cpu_features is {groups!r}; expected a list of lists of names; build it again")
    runtime = _one(RuntimeRange, value.get("onnxruntime"))
    compat = _one(Compatibility, {**value, "cpu_features": [tuple(g) for g in groups], "onnxruntime": runtime})
    _check_compatibility(compat)
    return compat


def parsed_version(text: str) -> tuple[int, int, int]:
    """Return the first three numbers of a version; what follows them (`rc1`, `+cu12`) is not compared.

    Raises:
        PackageError: it does not begin with a number.
    """
    found = re.match(r"(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?", text, re.ASCII)
    if found is None:
        raise PackageError(f"version {text!r} does not begin with a number; expected one such as 1.24.1")
    major, minor, patch = (int(g or 0) for g in found.groups())
    return major, minor, patch


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


def _check_compatibility(c: Compatibility) -> None:
    if not c.hardware or not c.providers or len(set(c.providers)) != len(c.providers):
        raise PackageError(
            f"manifest: hardware {c.hardware}, providers {c.providers}; allowed: at least one, each provider once"
        )
    r = c.onnxruntime
    if not parsed_version(r.minimum) <= parsed_version(r.tested) < parsed_version(r.below):
        raise PackageError(f"manifest: onnxruntime {r.minimum} to {r.below}, tested {r.tested}; expected in that order")
    if c.opset < 1 or (c.memory_bytes is not None and c.memory_bytes < 1):
        raise PackageError(f"manifest: opset {c.opset}, memory_bytes {c.memory_bytes}; allowed: above 0")


def _check_golden(g: Golden, providers: Sequence[str]) -> None:
    if tuple(t.provider for t in g.tolerances) != tuple(providers):
        raise PackageError(
            f"manifest: golden limits for {[t.provider for t in g.tolerances]}; expected one for each of "
            f"{list(providers)}"
        )
    for t in g.tolerances:
        finite = math.isfinite(t.max_abs_error) and t.max_abs_error >= 0
        if g.n < 1 or not finite or not 0 <= t.argmax_agreement <= 1:
            raise PackageError(
                f"manifest: golden limits n={g.n}, {t} cannot be held; allowed: n >= 1, finite error, share of 1"
            )


_IS: Mapping[object, Callable[[object], bool]] = {
    str: lambda x: isinstance(x, str) and len(x) <= 256,
    int: lambda x: type(x) is int,
    bool: lambda x: type(x) is bool,
    float: lambda x: type(x) in (int, float),
    int | None: lambda x: x is None or type(x) is int,
    tuple[str, ...]: lambda x: isinstance(x, tuple) and all(isinstance(s, str) for s in x),
    tuple[tuple[str, ...], ...]: lambda x: isinstance(x, tuple) and all(isinstance(s, str) for g in x for s in g),
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


def _golden(value: Json) -> Golden:
    if not isinstance(value, dict):
        raise PackageError(f"manifest: Golden is {type(value).__name__}; expected an object")
    return _build(Golden, {**value, "tolerances": _all(Tolerance, value.get("tolerances"))})


def _all(cls: type[_T], value: Json) -> Sequence[_T]:
    if not isinstance(value, list) or len(value) > 1000:
        raise PackageError(f"manifest: {cls.__name__} list is {type(value).__name__}; expected at most 1000 entries")
    return tuple(_one(cls, v) for v in value)
