"""Metrics of the user's own, found by `module:function`.

The function is called once per batch and model, as `function(outputs, truth)`: the model's outputs by name, batch
first, and class numbers (n,), targets (n, outputs), or None. It returns a finite number for each of the n samples;
their mean is the metric, and the two models are compared sample by sample.
"""

import importlib
from collections.abc import Mapping
from keyword import iskeyword
from typing import get_args

from qcore.errors import DataError
from qcore.evaluation import UserMetric
from qcore.report import Direction

TAKEN = frozenset(
    ("top1", "top5", "ece", "agreement", "output_sqnr_db", "mae", "rmse", "r2", "auc", "score", "absolute_error", "n")
)
"""Names that reports use themselves."""


def user_metrics(entries: Mapping[str, Direction]) -> tuple[UserMetric, ...]:
    """Return the metrics that `module:function` entries name, called like their functions.

    Raises:
        DataError: an entry has another form, cannot be imported, is no function, or its name is taken.
    """
    found = [_loaded(entry, direction) for entry, direction in entries.items()]
    names = [m.name for m in found]
    for name in names:
        reserved = name in TAKEN or name.startswith(("baseline_", "champion_")) or name.endswith("_champion")
        if reserved or names.count(name) > 1:
            raise DataError(f"metric {name!r} has a name that is taken; allowed: other names; rename the function")
    return tuple(found)


def parsed_metric(text: str) -> tuple[str, Direction]:
    """Return entry and direction of `module:function=higher` or `=lower`.

    Raises:
        DataError: it has another form.
    """
    entry, _, direction = text.partition("=")
    for known in get_args(Direction):
        if direction == known:
            return entry, known
    raise DataError(f"metric {text!r} has no direction; allowed: module:function=higher or =lower; add it")


def _loaded(entry: str, direction: Direction) -> UserMetric:
    module, _, name = entry.partition(":")
    parts = [*module.split("."), name]
    if not all(part.isidentifier() and not iskeyword(part) for part in parts):
        raise DataError(f"metric {entry!r} is no entry; allowed: module:function such as mine.scores:overlap")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as e:
        raise DataError(f"metric {entry!r} cannot be imported ({e}); install the module or set PYTHONPATH") from e
    if not callable(function):
        raise DataError(f"metric {entry!r}: {module} has no function {name!r}; correct the entry")
    return UserMetric(name=name, direction=direction, score=function)
