"""What is written beside a file that a step hands on: digest, size, form; and is it the file that was meant."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json, sha256_bytes
from qcore.errors import ModelError
from qcore.files import sha256_file

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport


def file_facts(path: Path, form: str) -> dict[str, str | int]:
    """Return the metadata of an output: `format`, `sha256` and `size_bytes` of the file `path`."""
    return {"format": form, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}


def part_name(task: str, shard: int, shards: int) -> str:
    """Return what a task is called that works on one of several shards, so that each has a run of its own."""
    return task if shards == 1 else f"{task} {shard} of {shards}"


def recipe_name(recipe: str, text: str) -> str:
    """Return what the run of a recipe is called, so that the recipes of a loop do not share one.

    Args:
        recipe: name of a shipped recipe or a file.
        text: a recipe as YAML that is taken instead, if it is not empty; it is called by its digest.
    """
    return f"own {sha256_bytes(text.encode())[:8]}" if text.strip() else Path(recipe).stem


def card_facts(data: Path) -> dict[str, str | int]:
    """Return the name of a data card, and the seed of its splits."""
    from qcore.data.card import load_card

    card, _, _ = load_card(data)
    return {"data": card.name, "split_seed": card.seed}


def scheme_facts(recipe: str, target: str) -> dict[str, str | int]:
    """Return what a recipe makes for a target, as parameters: dtypes, bits and ranges where it quantizes by a table.

    Args:
        recipe: name of a shipped recipe or a file.
        target: name of a shipped profile or a file.
    """
    from qcore.recipe import load_recipe
    from qcore.target import load_target

    loaded, profile = load_recipe(recipe), load_target(target)
    step = loaded.quantize_step
    facts: dict[str, str | int] = {"recipe": recipe, "target": target}
    if step is not None:
        weights, activations = profile.weight_scheme(0, bits=step.weight_bits), profile.activation_scheme()
        per_channel = weights.axis is not None and step.per_channel is not False
        facts |= {
            "weights": f"{weights.dtype}, {'per channel' if per_channel else 'per tensor'}",
            "weight_bits": weights.width,
            "activations": f"{activations.dtype}, {'symmetric' if activations.symmetric else 'asymmetric'}",
            "activation_bits": activations.width,
            "ranges": step.ranges,
        }
    trained = loaded.training_steps
    return {**facts, "training_seed": trained[-1].seed} if trained else facts


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
