"""A part of a model that runs by itself; here and not in `pieces.py`, so that whoever runs it needs no onnx."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A model of some of the nodes: its bytes, what it reads, and what it gives.

    The first piece reads all inputs of the whole.
    """

    model: bytes
    reads: tuple[str, ...]
    gives: tuple[str, ...]
