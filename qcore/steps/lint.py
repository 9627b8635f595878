"""Lint on files: a model and a profile in, findings out; nothing is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json

if TYPE_CHECKING:
    from qcore.lint import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """Which file was held against which profile, and every breach."""

    model: Path
    sha256: Digest
    target: str
    findings: "tuple[Finding, ...]"

    def to_json(self) -> Json:
        """Return the JSON form of `--json`."""
        return {
            "model": {"path": str(self.model), "sha256": self.sha256},
            "target": self.target,
            "satisfied": not self.findings,
            "findings": [f.to_json() for f in self.findings],
        }


def lint(*, model: Path, target: str) -> LintReport:
    """Return what in the file `model` is not as the profile `target` (a name or a YAML file) wants it.

    Raises:
        ModelError: the file is not a model.
        ConfigError: there is no such profile.
    """
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.lint import lint as findings_in
    from qcore.target import load_target

    profile = load_target(target)
    raw = read_model_bytes(model)
    findings = findings_in(parse_model(raw, str(model)), profile)
    return LintReport(model=model, sha256=sha256_bytes(raw), target=profile.name, findings=findings)
