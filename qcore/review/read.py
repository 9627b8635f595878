"""Files of other verbs read for a review: summaries, layer reports, parity reports and searches, in JSON.

Only what is shown is read; what is there but damaged is refused.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qcore.canonical import Digest, Json
from qcore.errors import DataError, GateRefused
from qcore.parity_report import ParityReport, parity_from_json
from qcore.review.source import Layer, Layers, Step, Summary, Trial

T = TypeVar("T")

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def load_summary(path: Path) -> Summary:
    """Return the summary that `qcore compress --json` (or quantize, finetune, prune ..., mixed) printed.

    Raises:
        DataError: the file is missing, damaged or something else.
    """
    return _loaded(path, "summary of a compression", "qcore compress --json", _summary)


def load_layers(path: Path) -> Layers:
    """Return the layer report in the JSON file that `qcore layers` wrote.

    Raises:
        DataError: the file is missing, damaged or something else.
    """
    return _loaded(path, "layer report", "qcore layers", _layers)


def load_parity(path: Path) -> ParityReport:
    """Return the parity report that `qcore parity` wrote.

    Raises:
        DataError: the file is missing, damaged or something else.
    """
    return _loaded(path, "parity report", "qcore parity", _parity)


def _loaded(path: Path, what: str, verb: str, read: Callable[[Json], T]) -> T:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise DataError(f"{what} {path} does not exist; run `{verb}`") from e
    except OSError as e:
        raise DataError(f"{what} {path} cannot be read: {e.strerror}; pass the file that `{verb}` wrote") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON, expected the {what}; pass the file that `{verb}` wrote") from e
    try:
        return read(value)
    except _DAMAGE as e:
        reason = " ".join(str(e).split())[:120]
        raise DataError(f"{path} is not a {what}, or is damaged ({reason}); pass the file that `{verb}` wrote") from e


def _schema(value: Json, schema: str) -> None:
    if not isinstance(value, dict) or value.get("schema") != schema:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"schema {str(found)[:60]}, expected {schema}")


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} where text is expected")
    return value


def _number(value: Json) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{str(value)[:40]!r} where a finite number is expected")
    return float(value)


def _whole(value: Json) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} where a whole number is expected")
    return value


def _digest(value: Json) -> Digest:
    text = _text(value)
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{text[:70]!r} where a SHA-256 is expected")
    return text


def _optional(value: Json, read: Callable[[Json], T]) -> T | None:
    return None if value is None else read(value)


def _summary(value: Json) -> Summary:
    """Return the summary; that of a search for precisions holds it under `written`."""
    if value.get("schema") == "qcore.precision/1":
        if value["written"] is None:
            raise ValueError("the search wrote no model")
        made = _summary(value["written"])
        why = f"{_text(value['why'])} Error: {_text(value['measure'])}."
        return replace(made, trials=tuple(_precision_trials(value)), searched=why)
    made = Summary(
        model_sha256=_digest(value["model"]["sha256"]),
        recipe=_text(value["recipe"]),
        recipe_sha256=_digest(value["recipe_sha256"]),
        target=_text(value["target"]),
        steps=tuple(_step(s) for s in value["steps"]),
        breaches=tuple(_breach(b) for b in value["breaches"]),
        packed_bytes=_optional(value.get("packed_bytes"), _whole),
    )
    if "ladder" not in value:
        return made
    return replace(made, trials=tuple(_rungs(value)), searched=_text(value["stopped"]))


def _step(value: Json) -> Step:
    epochs = value["epochs"]
    return Step(
        method=_text(value["method"]),
        kept=bool(value["kept"]),
        reason=_optional(value["reason"], _text),
        changed=len(value["changed"]),
        skipped=tuple((_text(k["node"]), _text(k["op_type"]), _text(k["reason"])) for k in value["skipped"]),
        epochs=max(0, len(epochs) - 1),
        samples=_whole(value["samples"]),
        seconds=_number(value["seconds"]),
    )


def _breach(value: dict[str, Any]) -> str:
    """Return one finding of `qcore lint` as text."""
    return ": ".join(str(v) for v in value.values() if v not in (None, "", []))


def _precision_trials(value: Json) -> list[Trial]:
    chosen, base = _whole(value["chosen"]), _text(value["base"])
    trials = []
    for k, attempt in enumerate(value["attempts"]):
        counted: dict[str, int] = {}
        for precision in attempt["precision"].values():
            counted[_text(precision)] = counted.get(precision, 0) + 1
        label = ", ".join(f"{n} in {p}" for p, n in sorted(counted.items())) or f"all in {base}"
        trials.append(_trial(label, "holds" if attempt["holds"] else "does not hold", attempt, k == chosen))
    return trials


def _rungs(value: Json) -> list[Trial]:
    chosen = _whole(value["chosen"])
    return [_trial(_text(a["recipe"]), _text(a["outcome"]), a, k == chosen) for k, a in enumerate(value["ladder"])]


def _trial(label: str, outcome: str, value: Json, chosen: bool) -> Trial:
    return Trial(
        label=label,
        outcome=outcome,
        error=_optional(value["error"], _number),
        size_bytes=_whole(value["size_bytes"]),
        latency_ms=_optional(value["latency_ms"], _number),
        chosen=chosen,
    )


def _layers(value: Json) -> Layers:
    _schema(value, "qcore.layers/1")
    return Layers(
        model_sha256=_digest(value["model"]["sha256"]),
        model=_text(value["model"]["name"]),
        baseline_sha256=_digest(value["baseline"]["sha256"]),
        baseline=_text(value["baseline"]["name"]),
        samples=_whole(value["data"]["n"]),
        layers=tuple(
            Layer(
                node=_text(e["node"]),
                op_type=_text(e["op_type"]),
                verdict=_text(e["verdict"]),
                why=_text(e["why"]),
                accumulated_db=_number(e["accumulated"]["sqnr_db"]),
                local_db=_optional(e["local"], lambda local: _number(local["sqnr_db"])),
            )
            for e in value["layers"]
        ),
        advice=_text(value["advice"]),
    )


def _parity(value: Json) -> ParityReport:
    try:
        return parity_from_json(value)
    except GateRefused as e:
        raise ValueError(str(e)) from e
