"""What every graph function returns: the new model, what changed, and what was left alone and why."""

from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A node that a function could have handled and did not: its name, its op type, and the reason in words."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Resized:
    """A number that a function made smaller: `what` (`macs`, `size_bytes`, `latency_ms`; `channels` of a node) of what.

    `of` is a node name, or empty for the whole model.
    """

    what: str
    of: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """The result of a graph function.

    `model` is a new model (the argument is never changed). `changed` names the nodes or tensors that differ,
    in graph order; `skipped` those that were refused. `resized` says what became smaller, where that was the aim.
    """

    model: ir.Model
    changed: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = field(default=())
    resized: tuple[Resized, ...] = ()
