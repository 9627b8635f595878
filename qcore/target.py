"""Target profiles: what a device's integer kernels want from a quantized file."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from qcore.config import Config, load_config
from qcore.errors import ConfigError
from qcore.machine import cpu_flags
from qcore.numerics.affine import QScheme, container_bits

Precision = Literal["int16", "float16", "float"]
"""What a layer can run in instead of int8: 16-bit activations, half precision, or as it was."""

PROFILES = Path(__file__).with_name("targets")
TARGET_KEY = "qcore.target"  # metadata of a model file: the profile that it was quantized for


class TargetProfile(Config):
    """One kind of device.

    `weights` is the dtype of dense weights, `depthwise_weights` that of depthwise convolutions where it differs;
    both are symmetric (uint8 has zero point 128 and the same levels). `weight_bits` below 8 keeps the storage and
    uses fewer levels; `reduce_range` leaves out one bit of weights where sums of two products saturate in 16 bits;
    `weights: int4` stores two weights in a byte. `bias` says whether biases become int32 with scale = activation scale
    x weight scale, or stay float.

    `quantize` lists the op types that work on integers with scales of their own, `same_scale` those that move values
    and keep the scale of their input, `one_scale` those of `quantize` that want one scale for all inputs and the
    output; all others stay float, which `integer_only` forbids. `float_output` keeps the logits of a last Gemm or
    MatMul as float. `integer_io` makes the graph's own inputs and outputs integers. `mixed` lists what
    single layers may run in where int8 costs too much accuracy. `opset` is the version that the file must have; None
    keeps the model's.
    """

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    description: str
    activations: Literal["uint8", "int8", "uint16", "int16"]
    activations_symmetric: bool = False
    weights: Literal["int8", "uint8", "int4"] = "int8"
    depthwise_weights: Literal["int8", "uint8"] | None = None
    weights_per_channel: bool = True
    weight_bits: int = Field(default=8, ge=2, le=8)
    reduce_range: bool = False
    power_of_two_scales: bool = False
    bias: Literal["int32", "float"] = "int32"
    float_output: bool = True
    integer_io: bool = False
    integer_only: bool = False
    opset: int | None = Field(default=None, ge=13, le=25)
    quantize: tuple[str, ...]
    same_scale: tuple[str, ...] = ()
    one_scale: tuple[str, ...] = ()
    mixed: tuple[Precision, ...] = ()

    @property
    def wide_activations(self) -> Literal["uint16", "int16"]:
        """The dtype of 16-bit activations: signed where the 8-bit ones are."""
        return "int16" if self.activations.startswith("int") else "uint16"

    def activation_scheme(self) -> QScheme:
        """Return how activations are quantized: per tensor, all levels of the dtype."""
        return QScheme(
            dtype=self.activations, symmetric=self.activations_symmetric, power_of_two=self.power_of_two_scales
        )

    def wide_scheme(self) -> QScheme:
        """Return how activations of 16 bits are quantized."""
        return replace(self.activation_scheme(), dtype=self.wide_activations)

    def weight_scheme(self, axis: int, *, depthwise: bool = False, bits: int | None = None) -> QScheme:
        """Return how weights are quantized: symmetric, per channel along `axis` where the device can.

        `bits` takes the place of the profile's, as far as dtype and `reduce_range` allow.
        """
        dtype = self.depthwise_weights or self.weights if depthwise else self.weights
        limit = container_bits(dtype) - self.reduce_range
        return QScheme(
            dtype=dtype,
            bits=min(bits or self.weight_bits, limit),
            symmetric=True,
            axis=axis if self.weights_per_channel else None,
            power_of_two=self.power_of_two_scales,
        )


def load_target(name: str) -> TargetProfile:
    """Return the shipped profile `name`, the profile in the YAML file `name`, or for `host` that of this machine.

    Raises:
        ConfigError: there is no such profile or file, or the file is wrong.
    """
    if name == "host":
        name = host_target(platform.machine(), cpu_flags())
    return load_config(shipped_or_file(name, PROFILES, "target"), TargetProfile, "target profile")


def is_host(target: TargetProfile) -> bool:
    """Say whether `target` is the profile of this machine, so that latencies measured here are the device's."""
    try:
        return load_target("host").name == target.name
    except ConfigError:  # no shipped profile is for this architecture
        return False


def host_target(machine: str, flags: frozenset[str]) -> str:
    """Return the name of the profile for a CPU: `machine` as in `platform.machine()`, `flags` as in /proc/cpuinfo.

    Raises:
        ConfigError: no shipped profile is for this architecture.
    """
    if machine in ("x86_64", "AMD64"):
        return "x86-vnni" if flags & {"avx512_vnni", "avx_vnni"} else "x86-avx2"
    if machine in ("aarch64", "arm64"):
        return "arm-dotprod"
    raise ConfigError(f"there is no profile for the host's architecture {machine}; pass --target NAME or a YAML file")


def shipped_or_file(name: str, folder: Path, what: str) -> Path:
    """Return the path of the shipped YAML `name` in `folder`, or `name` itself if it is a path to a file.

    Raises:
        ConfigError: `name` is neither.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"{what} {name!r} does not exist; allowed: {known}, or the path of a YAML file")
    return shipped
