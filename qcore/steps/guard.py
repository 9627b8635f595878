"""What every step shares: progress, and the refusal to write over its own inputs."""

from collections.abc import Callable
from pathlib import Path

from qcore.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how many; 0 where nobody can know."""


def silent(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""
    del what, done, total


def refuse_overwrite(out: Path, *inputs: Path | str, data: Path | None = None) -> None:
    """Refuse an output path that is one of the inputs, lies inside a data folder, or is not a regular file.

    Args:
        out: where a step wants to write.
        inputs: files; names of shipped recipes and targets are no files and do no harm.
        data: a data card, with everything that it reads.
    """
    if out.exists() and not out.is_file():
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
