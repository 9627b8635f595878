"""Is a report about these files? What a gate is given beside the report is compared with it, digest by digest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.errors import GateRefused

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport
    from qcore.report import EvaluationReport


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredFiles:
    """Files that a report has to be about; None where nobody asks. `split` is the report's own when None."""

    model: Path | None = None
    baseline: Path | None = None
    champion: Path | None = None
    data: Path | None = None
    split: str | None = None


def refuse_other_files(report: "EvaluationReport", files: MeasuredFiles) -> None:
    """Refuse a report that is not about `files`: stale, or mixed up.

    Raises:
        GateRefused: with the first file that is another one.
        DataError, ModelError: a file cannot be read.
    """
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import read_model_bytes
    from qcore.steps.judgement import read_released

    if files.model is not None:
        _compare(f"model {files.model}", sha256_bytes(read_model_bytes(files.model)), report.model.sha256)
    if files.baseline is not None:
        _compare(f"baseline {files.baseline}", sha256_bytes(read_model_bytes(files.baseline)), report.baseline.sha256)
    if files.champion is not None:
        measured = "none" if report.champion is None else report.champion.sha256
        _compare(f"champion {files.champion}", sha256_bytes(read_released(files.champion)), measured)
    _refuse_other_data(report, files)


def _refuse_other_data(report: "EvaluationReport", files: MeasuredFiles) -> None:
    from qcore.data.dataset import open_dataset

    split = files.split or report.data.split
    if split != report.data.split:
        raise GateRefused(
            f"split {split!r} is asked for and the report is about split {report.data.split!r}; allowed: the same; run "
            "`qcore evaluate` on it"
        )
    if files.data is not None:
        _compare(f"data {files.data} ({split})", open_dataset(files.data, split).sha256, report.data.sha256)


def _compare(what: str, found: str, measured: str) -> None:
    if found != measured:
        raise GateRefused(
            f"{what} has digest {found[:12]}, the report is about {measured[:12]}; allowed: the same; run "
            "`qcore evaluate` on these files, or pass those that were evaluated"
        )


def load_parity(path: Path) -> "ParityReport":
    """Return the parity report in the JSON file `path`.

    Raises:
        GateRefused: the file is missing or is not one.
    """
    from qcore.parity_report import parity_from_json

    try:
        return parity_from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as e:
        raise GateRefused(f"parity report {path} does not exist; run `qcore parity`") from e
    except (OSError, ValueError, RecursionError) as e:
        raise GateRefused(f"{path} is not a parity report ({e}); run `qcore parity`") from e
