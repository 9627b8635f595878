"""What is written beside a file that a step hands on: digest, size, form; and is it the file that was meant."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json
from qcore.errors import ModelError
from qcore.files import sha256_file

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport


def file_facts(path: Path, form: str) -> dict[str, str | int]:
    """Return the metadata of an output: `format`, `sha256` and `size_bytes` of the file `path`."""
    return {"format": form, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}


def expect_model(path: Path, sha256: Digest) -> None:
    """Refuse a model file that is not the one that was named.

    Args:
        path: the file that arrived.
        sha256: the digest that was asked for; empty when none was.

    Raises:
        ModelError: the digests differ.
    """
    found = sha256_file(path)
    if sha256 not in ("", found):
        raise ModelError(
            f"{path}: sha256 is {found}, expected {sha256}; pass the digest of this file or the other file"
        )


def expect_champion(path: str, sha256: Digest) -> Path | None:
    """Return the file of a released model that was named, None if none was; raises as `expect_model`."""
    if not path:
        return None
    if not Path(path).is_file():
        raise ModelError(f"champion {path} does not exist; check the path, or leave it empty for a first release")
    expect_model(Path(path), sha256)
    return Path(path)


@contextlib.contextmanager
def text_file(text: str, name: str) -> Iterator[Path | None]:
    """Yield a file called `name` that holds `text`, for as long as the block runs; None for an empty text."""
    if not text.strip():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qcore-") as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        yield path


def worst_parity(report: "ParityReport") -> dict[str, float]:
    """Return the numbers of the worst condition: the least SQNR and, where outputs name classes, least agreement."""
    shares = [c.agreement for c in report.conditions if c.agreement is not None]
    noise = {"parity_sqnr_db": min(c.sqnr_db for c in report.conditions)}
    return {**noise, "parity_agreement": min(shares)} if shares else noise


def training_facts(summary: Json) -> dict[str, float]:
    """Return the numbers of the last step that trained, from the JSON form of a compression's summary."""
    step = next((s for s in reversed(summary["steps"]) if s["epochs"]), None)
    if step is None:
        return {}
    first, best = step["epochs"][0], step["epochs"][step["best"]]
    facts = {"validation_loss_before": first["validation"], "validation_loss_after": best["validation"]}
    if best["accuracy"] is not None:
        facts |= {"validation_accuracy_before": first["accuracy"], "validation_accuracy_after": best["accuracy"]}
    return {**facts, "training_samples": step["samples"], "training_seconds": step["seconds"]}
