"""How a model file was made: one entry per compression run, kept in the file's own metadata.

A package's model card and parts list tell it from here, so a file that was pruned, quantized and renamed elsewhere
still says from which float model it came. The entries are claims of whoever wrote the file; what a release rests on is
the signed evidence about its bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import onnx_ir as ir

from qcore.canonical import Digest, canonical_json
from qcore.errors import ModelError
from qcore.graph.io import serialize_model

HISTORY_KEY = "qcore.history"
ENTRY_BYTES = 512
"""What one run adds to a file, at most where names are short: budgets of size leave it free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """One compression run.

    Args:
        made_from: digest of the file that it began with.
        recipe: its name.
        recipe_sha256: digest of its content.
        steps: methods that are in the result, in order.
        target: name of the profile; None where no step looked at one.
        data: digests of the samples that were read, by use: `calibration`, `train`, `validation`.
        qcore_version: of what ran it.
    """

    made_from: Digest
    recipe: str
    recipe_sha256: Digest
    steps: tuple[str, ...]
    target: str | None
    data: Mapping[str, Digest]
    qcore_version: str


def serialize_made(model: ir.Model, making: Making) -> bytes:
    """Return the bytes of `model` with `making` behind what its history holds already; the argument is not changed.

    Raises:
        ModelError: the file would be 2 GiB or more.
    """
    before = model.metadata_props.get(HISTORY_KEY)
    entries = [*read_history(model), making]
    model.metadata_props[HISTORY_KEY] = canonical_json([asdict(e) for e in entries]).decode()
    try:
        return serialize_model(model)
    finally:
        if before is None:
            del model.metadata_props[HISTORY_KEY]
        else:
            model.metadata_props[HISTORY_KEY] = before


def read_history(model: ir.Model) -> tuple[Making, ...]:
    """Return the runs that made `model`, oldest first; none for a file that qcore did not make.

    Raises:
        ModelError: the metadata hold something else.
    """
    text = model.metadata_props.get(HISTORY_KEY)
    if text is None:
        return ()
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError(f"a {type(entries).__name__}")
        return tuple(_making(v) for v in entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ModelError(
            f"metadata {HISTORY_KEY} is not what qcore writes ({e}); remove it from the model, or compress it again"
        ) from e


def _making(value: Mapping[str, object]) -> Making:
    known = {f.name for f in fields(Making)}
    if set(value) != known:
        raise ValueError(f"fields {sorted(set(value) ^ known)}")
    texts = [value[n] for n in ("made_from", "recipe", "recipe_sha256", "qcore_version")]
    data, steps, target = value["data"], value["steps"], value["target"]
    if not isinstance(data, dict) or not isinstance(steps, list) or not isinstance(target, str | None):
        raise TypeError("data, steps or target")
    if not all(
        isinstance(t, str) and len(t) <= 256 and t.isprintable() for t in (*texts, *data, *data.values(), *steps)
    ):
        raise TypeError("a value is not one line of text")
    return Making(**{**value, "steps": tuple(steps)})  # type: ignore[arg-type]  # checked above
