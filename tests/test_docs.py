"""What the documents show must work."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from qcore.cli.main import app
from qcore.config import check_config
from qcore.methods.finetune import Augment, QatStep
from qcore.methods.round_weights import RoundWeightsStep
from qcore.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = re.findall(r"```yaml (\S+)\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_every_example_file_is_a_valid_one(kind, text):
    assert check_config(yaml.safe_load(text), SCHEMAS[kind], kind).name


def test_every_kind_of_file_has_an_example():
    assert {kind for kind, _ in EXAMPLES} == set(SCHEMAS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_are_shown_exist(document):
    root = typer.main.get_command(app)
    for words in re.findall(r"(?:^|`)qcore((?: [a-z][a-z-]*)+)", document.read_text(), re.MULTILINE):
        command = root
        for word in words.split():
            commands = getattr(command, "commands", None)
            if commands is None:
                break
            assert word in commands, f"{document.name} shows `qcore{words}`"
            command = commands[word]


def test_the_readme_example_composes_a_pipeline(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)  # KFP reads the source of what it compiles
    scope = {"__name__": "example"}
    exec(compile(code, str(tmp_path / "example.py"), "exec"), scope)  # noqa: S102 - our own README
    from kfp import compiler

    compiler.Compiler().compile(scope["smaller"], str(tmp_path / "smaller.yaml"))
    assert "quantize" in (tmp_path / "smaller.yaml").read_text()


@pytest.mark.parametrize("step", [RoundWeightsStep, QatStep, Augment])
def test_every_option_of_a_step_is_explained(step):
    text = (ROOT / "docs" / "files.md").read_text()
    shown = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\* .*?(?=^\* |^$)", text, re.MULTILINE | re.DOTALL))))
    assert set(step.model_fields) - {"method"} <= shown
