"""The review on files: reports, decisions and what else is known about the candidates in; page, Markdown, JSON out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.errors import ConfigError, DataError
from qcore.steps.guard import refuse_overwrite

if TYPE_CHECKING:
    from qcore.calibration import CalibrationTable
    from qcore.report import GateDecision
    from qcore.review.facts import Review
    from qcore.review.source import Candidate, NoRanges, Package, Ranges

PAGE, TEXT, FACTS = "review.html", "review.md", "review.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewFiles:
    """Where a review is written to: page, Markdown and JSON."""

    page: Path
    markdown: Path
    facts: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What is known beside evaluations, as files; each is put to the candidate whose digest it names.

    `evidence` are signed decisions, `summaries` what `compress --json` and its like printed, `layers` and `parity` the
    JSON of these verbs, `models` candidates whose ranges are drawn over `tables`, `packages` what `qcore package`
    wrote. `data` is the card that names the classes.
    """

    evidence: Sequence[Path] = ()
    summaries: Sequence[Path] = ()
    layers: Sequence[Path] = ()
    parity: Sequence[Path] = ()
    models: Sequence[Path] = ()
    tables: Sequence[Path] = ()
    packages: Sequence[Path] = ()
    data: Path | None = None

    def paths(self) -> tuple[Path, ...]:
        """Return all files but the card."""
        groups = (self.evidence, self.summaries, self.layers, self.parity, self.models, self.tables, self.packages)
        return tuple(path for group in groups for path in group)


def review_paths(out: Path) -> ReviewFiles:
    """Return where page, Markdown and JSON go in the folder `out`."""
    return ReviewFiles(page=out / PAGE, markdown=out / TEXT, facts=out / FACTS)


def review(
    *,
    reports: Sequence[tuple[str, Path]],
    out: ReviewFiles,
    beside: Beside | None = None,
    title: str = "",
    rest: str = PAGE,
) -> "Review":
    """Return the review of all candidates, written to `out`.

    The decisions' signatures are not checked here, and the review says so: nothing is released by a review. Where the
    ranges of a model cannot be drawn, it says why instead.

    Args:
        reports: the name of each candidate, and its evaluation report.
        out: the three files.
        beside: what else is known.
        title: what the model is called; default: what a layer report calls the float model, else what its package is
            called, else its digest.
        rest: where readers of the Markdown find the page.

    Raises:
        DataError: a file is missing or damaged, or about another model or other samples than the reports.
        GateRefused: a report or a decision is damaged, or a statement contradicts the decision inside it.
    """
    from qcore.files import write_atomic, write_json
    from qcore.review.document import to_json
    from qcore.review.facts import review as review_of
    from qcore.review.markdown import to_markdown
    from qcore.review.page import to_html
    from qcore.review.source import Sources

    given = beside or Beside()
    for path in (out.page, out.markdown, out.facts):
        refuse_overwrite(path, *(p for _, p in reports), *given.paths(), data=given.data)
    candidates = _candidates(reports, given)
    classes = {} if given.data is None else class_names(given.data, candidates[0].report.data.name)
    found = review_of(Sources(candidates=candidates, title=title, classes=classes))
    page, text = to_html(found).encode(), to_markdown(found, rest=rest).encode()
    write_json(out.facts, to_json(found))
    write_atomic(out.markdown, text)
    write_atomic(out.page, page)
    return found


def _candidates(reports: Sequence[tuple[str, Path]], given: Beside) -> "tuple[Candidate, ...]":
    """Return the candidates with what each file says about them."""
    from qcore.review.read import load_layers, load_parity, load_summary
    from qcore.review.source import Candidate, shown_name
    from qcore.steps.decision import load_report

    names = [name for name, _ in reports]
    if not reports or len(set(names)) < len(names):
        raise DataError(
            f"candidates are called {', '.join(map(shown_name, names)) or 'nothing: there is no report'}; "
            "allowed: one or more evaluation reports, each with a name of its own"
        )
    made = [Candidate(name=name, report=load_report(path)) for name, path in reports]
    tables = _tables(given)
    attached: list[tuple[str, Path, Any]] = [
        *(("decision", p, _load_decision(p)) for p in given.evidence),
        *(("summary", p, load_summary(p)) for p in given.summaries),
        *(("layers", p, load_layers(p)) for p in given.layers),
        *(("parity", p, load_parity(p)) for p in given.parity),
        *(_ranges(p, tables) for p in given.models),
        *(("package", p, _load_package(p)) for p in given.packages),
    ]
    for kind, path, item in attached:
        place = _place_of(kind, path, item, made)
        made[place] = replace(made[place], **{kind: item})
    return tuple(made)


def _place_of(kind: str, path: Path, item: Any, made: "Sequence[Candidate]") -> int:
    """Return the position of the candidate that `item` from `path` is about and that has no such `kind` yet."""
    about = [k for k, c in enumerate(made) if c.report.model.sha256 == item.model_sha256]
    if not about:
        raise DataError(
            f"{path} is about model {item.model_sha256[:12]}, the reports are about "
            f"{', '.join(c.report.model.sha256[:12] for c in made)}; pass the report of that model, too, or leave "
            "this file out"
        )
    free = [k for k in about if getattr(made[k], kind) is None]
    if not free:
        raise DataError(f"{path} is the second {kind} about model {item.model_sha256[:12]}; pass one")
    return free[0]


def _load_decision(path: Path) -> "GateDecision":
    from qcore.release.evidence import consistent_decision
    from qcore.steps.guard import read_evidence

    return consistent_decision(read_evidence(path))


def _load_package(path: Path) -> "Package":
    from qcore.files import sha256_file
    from qcore.release.manifest import MODEL
    from qcore.release.package import read_manifest
    from qcore.review.source import Package

    manifest = read_manifest(path)
    return Package(
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        model_sha256=next(m.sha256 for m in manifest.members if m.path == MODEL),
        release=f"{manifest.family} {manifest.version}",
    )


def _tables(given: Beside) -> "list[CalibrationTable]":
    from qcore.calibration import load_table

    if bool(given.tables) != bool(given.models):
        there, lacking = ("tables", "the candidates' files") if given.tables else ("models", "calibration tables")
        raise ConfigError(f"{there} are given without {lacking}; allowed: both or none; histograms need both")
    return [load_table(path) for path in given.tables]


def _ranges(path: Path, tables: "Sequence[CalibrationTable]") -> tuple[str, Path, Any]:
    from qcore.review.source import Ranges

    found = _load_ranges(path, tables)
    return ("ranges" if isinstance(found, Ranges) else "no_ranges", path, found)


def _load_ranges(path: Path, tables: "Sequence[CalibrationTable]") -> "Ranges | NoRanges":
    """Return how the ranges in the model file `path` fit the first of `tables` that they were chosen from, or why not.

    Tables of other samples than those that the file says it was calibrated with are left out.
    """
    from qcore.canonical import sha256_bytes
    from qcore.graph.history import read_history
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.graph.qdq import activation_ranges
    from qcore.review.histograms import ranges_of
    from qcore.review.source import NoRanges

    raw = read_model_bytes(path)
    sha256, model = sha256_bytes(raw), parse_model(raw, str(path))
    chosen = activation_ranges(model)
    stated = {m.data["calibration"] for m in read_history(model) if "calibration" in m.data}
    fitting = [t for t in tables if not stated or t.data_sha256 in stated]
    for table in fitting:
        if (fitted := ranges_of(sha256, chosen, table)) is not None:
            return fitted
    if not chosen:
        why = "no histograms, because the model quantizes no activations."
    elif fitting:
        why = (
            f"no histograms, because no table knows one of its {len(chosen)} quantized activations; pass the "
            "calibration table of the float model that it was made from."
        )
    else:
        why = (
            f"no histograms, because the model says it was calibrated with samples {_short(sorted(stated))}, the "
            f"tables are of {_short(t.data_sha256 for t in tables)}; pass the table that it was made with."
        )
    return NoRanges(model_sha256=sha256, why=why)


def _short(digests: Iterable[str]) -> str:
    return ", ".join(d[:12] for d in digests)


def class_names(card: Path, data: str) -> dict[int, str]:
    """Return the names of the classes by number, from a data card; none where it names none.

    Args:
        card: the data card, or a folder with exactly one.
        data: what the reports call their data.

    Raises:
        DataError: it is the card of other data.
    """
    from qcore.data.card import load_card
    from qcore.data.images import class_names as names_in

    loaded, folder, file = load_card(card)
    if loaded.name != data:
        raise DataError(
            f"data card {file} is of {loaded.name}, the reports are of {data[:60]}; pass the card that they were "
            "made with"
        )
    return dict(enumerate(names_in(loaded, folder)))
