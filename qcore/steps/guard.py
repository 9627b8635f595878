"""What every step shares: progress, and the refusal to write over its own inputs."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import ConfigError, GateRefused

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.methods.finetune import Epoch
    from qcore.trials import TrialFacts

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how many; 0 where nobody can know."""


OnEpoch = Callable[["Epoch"], None]
"""Called with every epoch of training, the state before it included."""


OnTrial = Callable[["TrialFacts"], None]
"""Called with every trial of a search when it has ended, those of an earlier call that was killed included."""


def silent(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""
    del what, done, total


def unseen(epoch: "Epoch") -> None:
    """Report an epoch to nobody."""
    del epoch


def untold(facts: "TrialFacts") -> None:
    """Report a trial to nobody."""
    del facts


def is_first() -> bool:
    """Say whether this is the process that writes, of those that `torchrun` started; alone it is."""
    return os.environ.get("RANK", "0") == "0"


def refuse_overwrite(out: Path, *inputs: Path | str, data: Path | None = None) -> None:
    """Refuse an output path that is one of the inputs, lies inside a data folder, or is not a regular file.

    Args:
        out: where a step wants to write.
        inputs: files; names of shipped recipes and targets are no files and do no harm.
        data: a data card, with everything that it reads.
    """
    try:
        present = out.exists()
    except OSError as e:  # a name that is too long, or a folder that may not be entered
        raise ConfigError(f"output {out.name[:60]} cannot be written: {e.strerror}; pass another path") from e
    if present and not out.is_file():
        raise ConfigError(f"output {out} is not a regular file; pass the path of a file")
    files, folders = [Path(p) for p in inputs], []
    if data is not None:
        from qcore.data.dataset import data_sources

        sources = data_sources(data)
        files += [p for p in sources if not p.is_dir()]
        folders = [p.resolve() for p in sources if p.is_dir()]
    for path in files:
        if out.exists() and path.exists() and out.samefile(path):
            raise ConfigError(f"output {out} is also an input; inputs are never changed; pass another path")
    for folder in folders:
        if out.resolve().is_relative_to(folder):
            raise ConfigError(
                f"output {out} lies in the data folder {folder}; inputs are never changed; pass another path"
            )


def read_evidence(path: Path, what: str = "evidence", verb: str = "qcore gate") -> bytes:
    """Return the bytes of a signed file; `what` and `verb` say what it is and what writes it.

    Raises:
        GateRefused: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise GateRefused(f"{what} {path} cannot be read: {e.strerror}; run `{verb}` first") from e


def open_calibration(data: Path, split: str) -> "Dataset":
    """Return the split that a model is calibrated on; one that holds a single class is said, since ranges need all.

    Raises:
        QcoreError: as `qcore.data.dataset.open_dataset`.
    """
    from qcore.data.dataset import one_class, open_dataset

    dataset = open_dataset(data, split)
    if (only := one_class(dataset)) is not None:
        logger.warning(
            "split %r of %s holds class %d only: ranges of other classes are not seen; cut it from all classes",
            split,
            dataset.card.name,
            only,
        )
    return dataset
