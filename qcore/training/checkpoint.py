"""The state of a training run in one file, written all at once: a run that was killed goes on where it was."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from qcore.canonical import Digest
from qcore.errors import ConfigError
from qcore.files import write_atomic

State = dict[str, Any]


def save_checkpoint(path: Path, key: Digest, state: State) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts) to `path`, atomically.

    Args:
        path: the file.
        key: digest of everything that decides the run.
        state: what it needs to go on.
    """
    buffer = io.BytesIO()
    torch.save({"key": key, "state": state}, buffer)
    write_atomic(path, buffer.getvalue())


def not_a_checkpoint(path: Path, why: Exception) -> ConfigError:
    """Return the refusal of a file that cannot be gone on from."""
    return ConfigError(f"{path} is not a checkpoint of qcore ({type(why).__name__}); delete it and start again")


def load_checkpoint(path: Path, key: Digest) -> State | None:
    """Return the state that `save_checkpoint` wrote for `key`; None where there is none, or one of another run.

    Raises:
        ConfigError: the file is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        mine = found["key"] == key
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, IndexError, pickle.UnpicklingError) as e:
        raise not_a_checkpoint(path, e) from e
    return found["state"] if mine else None
