"""YAML files that people write: parsed, checked against a pydantic model, refused in one line.

The models themselves stand where they are used (recipe in `compression.py`, policy in `gate.py`, profile in
`target.py`, card in `data/card.py`).
"""

import difflib
import json
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qcore.canonical import Digest, Json, sha256_json
from qcore.errors import ConfigError


class Config(BaseModel):
    """Base of what users write: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def sha256(self) -> Digest:
        """The digest of the canonical JSON with all defaults written out."""
        return sha256_json(self.model_dump(mode="json", by_alias=True))


class _StrictLoader(yaml.SafeLoader):
    """YAML without what makes a file mean something else than it shows: repeated keys and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [k.value for k, _ in node.value]
        for key_node, _ in node.value:
            if keys.count(key_node.value) > 1:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"field {key_node.value!r} is there twice", mark)
        return super().construct_mapping(node, deep)


C = TypeVar("C", bound=BaseModel)


def load_config(path: Path, kind: type[C], what: str) -> C:
    """Return the YAML file `path` as a `kind`; `what` is the noun that messages use ("recipe").

    Raises:
        ConfigError: missing file, not YAML, unknown field (with the nearest known one), value out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise ConfigError(f"{what} {path} does not exist; check the path") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{what} {path} cannot be read as text: {e}; pass a YAML file") from e
    return parse_config(text, kind, f"{what} {path}")


def parse_config(text: str, kind: type[C], name: str) -> C:
    """Return the YAML `text` as a `kind`; `name` is what messages call it. Raises as `load_config`."""
    try:
        value = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader that refuses more
    except RecursionError as e:
        raise ConfigError(f"{name} is nested too deeply; correct the file") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name} is not YAML{where}: {getattr(e, 'problem', e)}; correct the file") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{name} holds {type(value).__name__}; allowed: a mapping of fields")
    return check_config(value, kind, name)


def check_config(value: Json, kind: type[C], name: str) -> C:
    """Return the mapping `value` as a `kind`. Raises as `load_config`."""
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise ConfigError(f"{name}: {_first_problem(e, kind)}") from e


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return one problem in words: a misspelt field first, since it explains the others."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        field, known = str(problem["loc"][-1]), sorted(_known_fields(kind))
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(kind.model_fields))}"
        return f"unknown field {where!r}; {hint}{more}"
    observed = json.dumps(problem["input"], default=str)
    observed = observed if len(observed) <= 60 else observed[:57] + "..."
    if problem["type"] == "missing":
        return f"field {where!r} is missing; add it{more}"
    return f"field {where!r} is {observed}: {problem['msg'].removeprefix('Value error, ')}{more}"


def _known_fields(kind: type[BaseModel]) -> set[str]:
    """Return every field name that the JSON Schema of `kind` mentions, at any depth."""
    schema = kind.model_json_schema(by_alias=True)
    return {f for part in [schema, *schema.get("$defs", {}).values()] for f in part.get("properties", {})}
