"""What a package's model card and parts list tell: facts of the file, of how it was made, and of what packaged it."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from qcore.canonical import Digest, sha256_bytes
from qcore.graph.history import Making, read_history
from qcore.graph.io import parse_model
from qcore.release.manifest import Compatibility, Golden, TensorInfo

TOOLS = ("kfp-qcore", "numpy", "onnx", "onnx-ir", "onnxruntime", "zstandard")
"""Distributions whose code decides bytes of a package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A program that made the package, and its version."""

    name: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageFacts:
    """Everything that card and parts list say.

    Args:
        family: name of the model on devices.
        version: of the release.
        model_sha256: digest of the model file.
        model_bytes: its size.
        history: the runs that made it, oldest first; empty for a file that qcore did not make.
        data_sha256: digest of the samples that it is evaluated on, of which the golden samples are the first.
        task: what its outputs are.
        compat: what a device must be.
        golden: limits of the self-test.
        inputs: of the graph.
        outputs: of the graph.
        tools: what packaged it.
    """

    family: str
    version: str
    model_sha256: Digest
    model_bytes: int
    history: tuple[Making, ...]
    data_sha256: Digest
    task: str
    compat: Compatibility
    golden: Golden
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tools: tuple[Tool, ...]

    @property
    def baseline_sha256(self) -> Digest | None:
        """The float model that the first run began with; None where the file does not say."""
        return self.history[0].made_from if self.history else None


def model_facts(model: bytes) -> tuple[Digest, tuple[Making, ...]]:
    """Return the digest of a model file, and the runs that made it.

    Raises:
        ModelError: it is not a model, or its history is not what qcore writes.
    """
    return sha256_bytes(model), read_history(parse_model(model, "model"))


def installed_tools(names: Iterable[str] = TOOLS) -> tuple[Tool, ...]:
    """Return the versions of Python and of the distributions `names` as they are installed here, sorted by name."""
    found = [Tool(name=n, version=metadata.version(n)) for n in names]
    return tuple(sorted([*found, Tool(name="python", version=platform.python_version())], key=lambda t: t.name))
