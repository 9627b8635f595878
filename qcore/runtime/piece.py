"""A part of a model that runs by itself; here and not in `pieces.py`, so that whoever runs it needs no onnx."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A model of some of the nodes: its bytes or their file, what it reads, and what it gives.

    The first piece reads all inputs of the whole.
    """

    model: bytes | Path
    reads: tuple[str, ...]
    gives: tuple[str, ...]
