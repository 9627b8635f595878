"""Options that several verbs share, spelt and explained once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Option("--model", help="The float ONNX model; it is only read.")]
Baseline = Annotated[Path, typer.Option("--baseline", help="The float model that the candidate was made from.")]
Data = Annotated[Path, typer.Option("--data", help="Data card: a YAML file, or a folder with exactly one.")]
CalibrationData = Annotated[
    Path | None, typer.Option("--data", help="Data card; only needed by recipes that calibrate.")
]
PruningData = Annotated[Path | None, typer.Option("--data", help="Data card; needed to remove channels.")]
Out = Annotated[
    Path, typer.Option("--out", help="Where to write, in folders that are made if missing; replaced all at once.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Recipe = Annotated[
    str, typer.Option("--recipe", help="Shipped recipe (int8, int8-dynamic, int4-weights ...) or a YAML file.")
]
Target = Annotated[
    str, typer.Option("--target", help="Target profile (x86-vnni, x86-avx2, arm-dotprod ...), a YAML file, or host.")
]
CalibrationSplit = Annotated[str, typer.Option("--split", help="Split of the data card to calibrate on.")]


class DeviceKind(StrEnum):
    """Where training runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[DeviceKind, typer.Option("--device", help="Where training runs; auto: on CUDA where there is one.")]
EvaluationSplit = Annotated[str, typer.Option("--split", help="Split of the data card to evaluate on.")]
Policy = Annotated[
    Path | None, typer.Option("--policy", help="Gate policy YAML; without it one point of top-1 at 95 %.")
]
Family = Annotated[str, typer.Option("--family", help="Name of the model on devices, [a-z0-9._-].")]
Version = Annotated[str, typer.Option("--version", help="Version of this release, new for the family.")]
Repository = Annotated[str, typer.Option("--repository", help="The signed repository: a folder or s3://bucket/prefix.")]
Keys = Annotated[Path, typer.Option("--keys", help="Folder of the signing keys.")]
Channel = Annotated[str, typer.Option("--channel", help="Channel that devices follow.")]


def parsed_shard(text: str) -> tuple[int, int]:
    """Return I and N of `--shard I/N`."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise typer.BadParameter(f"shard is {text!r}; allowed: I/N such as 1/4", param_hint="--shard")
    return int(index), int(count)
