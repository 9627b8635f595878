"""YAML files that people write: parsed, checked against a pydantic model, refused in one line.

A refusal says in words what the JSON Schema of the field allows: all alternatives, not the one that failed first.
The models themselves stand where they are used (recipe in `recipe.py`, policy in `policy.py`, profile in
`target.py`, card in `data/card.py`).
"""

import difflib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

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
    """Return the mapping `value` as a `kind`; true and false are no numbers. Raises as `load_config`."""
    try:
        checked = kind.model_validate(value)
    except ValidationError as e:
        raise ConfigError(f"{name}: {_first_problem(e, kind)}") from e
    schema = _schema(kind)
    for where, at, observed in _stray_booleans(schema, schema, value, ()):
        raise ConfigError(f"{name}: {_refused('.'.join(where), observed, list(_alternatives(schema, at)))}")
    return checked


Schema = dict[str, Any]
_NULLS = ("none", "None", "Null", "NULL", "nil", "~")


@cache
def _schema(kind: type[BaseModel]) -> Schema:
    return kind.model_json_schema(by_alias=True)


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return one problem in words: a misspelt field first, since it explains the others."""
    problems, schema = error.errors(include_url=False), _schema(kind)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    places = [_place(schema, p["loc"], p["type"] == "extra_forbidden") for p in problems]
    where, wanted = places[problems.index(problem)]
    others = len({p for p, _ in places if not f"{where}.".startswith(f"{p}.")})  # a list without its items is no news
    more = f" (and {others} more)" if others else ""
    match problem["type"]:
        case "extra_forbidden":
            field, known = str(problem["loc"][-1]), sorted(_known_fields(schema))
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(kind.model_fields))}"
            return f"unknown field {where!r}; {hint}{more}"
        case "missing":
            return f"field {where!r} is missing; add it{more}"
        case "union_tag_not_found":
            return f"field {f'{where}.{_tag(problem)}'!r} is missing; add it{more}"
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in problem["ctx"]["expected_tags"].split(",")]
            return _refused(f"{where}.{_tag(problem)}", problem["ctx"]["tag"], tags) + more
        case "value_error":
            said = problem["msg"].removeprefix("Value error, ")
            of = f"field {where!r} is {_shown(problem['input'])}: " if where else ""
            return f"{of}{said}{more}"
        case _:
            return _refused(where, problem["input"], list(_alternatives(schema, wanted))) + more


def _tag(problem: ErrorDetails) -> str:
    """Return the field that says which of several mappings is meant."""
    return str(problem["ctx"]["discriminator"]).strip("'")


def _refused(where: str, observed: object, allowed: list[str]) -> str:
    words = " or ".join([", ".join(allowed[:-1]), allowed[-1]] if len(allowed) > 1 else allowed)
    return f"field {where!r} is {_shown(observed)}; allowed: {words}; {_next_step(observed, allowed)}"


def _shown(observed: object) -> str:
    text = json.dumps(observed, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(schema: Schema, loc: tuple[int | str, ...], unknown: bool = False) -> tuple[str, Schema]:
    """Return the field that `loc` names, without the alternatives of a union that were tried, and its schema.

    The last part of an `unknown` field is its name, never an alternative.
    """
    path: list[str] = []
    at = schema
    for k, part in enumerate(loc):
        below = _child(schema, at, part)
        if part == "[key]":
            return ".".join([*path[:-1], "[name]"]), {"type": "string"}
        if below is not None:
            at = below
        elif not isinstance(part, int) and (k + 1 < len(loc) or ("anyOf" in at and not unknown)):
            continue  # it names an alternative, not a field
        path.append(str(part))
    return ".".join(path), at


def _resolved(schema: Schema, part: Schema) -> Iterator[Schema]:
    """Yield `part` without references, as the alternatives that it has."""
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    if not (branches := part.get("anyOf")):
        yield part
    for branch in branches or ():
        yield from _resolved(schema, branch)


def _child(schema: Schema, at: Schema, part: int | str) -> Schema | None:
    for option in _resolved(schema, at):
        mapping = option.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            return {"$ref": mapping[part]}
        if isinstance(part, int):
            found = option.get("prefixItems", [])[part : part + 1] or [option.get("items")]
            found = found[0]
        else:
            found = option.get("properties", {}).get(part) or option.get("additionalProperties")
        if isinstance(found, dict):
            return found
    return None


def _alternatives(schema: Schema, at: Schema) -> Iterator[str]:
    """Yield in words what `at` allows."""
    for option in _resolved(schema, at):
        mapping = option.get("discriminator", {}).get("mapping")
        if mapping:
            yield f"a mapping whose {option['discriminator']['propertyName']} is {', '.join(mapping)}"
            continue
        words = option.get("enum", [option["const"]] if "const" in option else None)
        if words is not None:
            yield from (w if isinstance(w, str) else json.dumps(w) for w in words)
            continue
        match option.get("type"):
            case "number" | "integer":
                yield _number(option)
            case "array":
                items = [" or ".join(_alternatives(schema, i)) for i in option.get("prefixItems", [])]
                items = items or [" or ".join(_alternatives(schema, option.get("items", {})))]
                each = "" if "prefixItems" in option else "each "
                yield f"a list ({each}{', '.join(items)}{'; not empty' if option.get('minItems') == 1 else ''})"
            case "string":
                yield f"text like {option['pattern']}" if "pattern" in option else "text"
            case "boolean":
                yield from ("true", "false")
            case "object":
                yield "a mapping"
            case other:
                yield str(other or "anything")


def _number(option: Schema) -> str:
    """Return the bounds of a number in words."""
    kind = "a whole number" if option["type"] == "integer" else "a number"
    if "minimum" in option and "maximum" in option:
        return f"{kind} from {option['minimum']:g} to {option['maximum']:g}"
    bounds = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{words} {option[key]:g}" for key, words in bounds.items() if key in option]
    return " ".join([kind, " and ".join(said)]).strip()


def _next_step(observed: object, allowed: list[str]) -> str:
    """Return what to do about a wrong value."""
    if isinstance(observed, str) and "null" in allowed and observed in _NULLS:
        return "YAML writes none as null"
    if isinstance(observed, float) and not math.isfinite(observed):
        return "write a finite number"
    near = difflib.get_close_matches(observed, allowed, n=1) if isinstance(observed, str) else ()
    return f"did you mean {near[0]}?" if near else "correct it"


def _stray_booleans(
    schema: Schema, at: Schema, value: object, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Schema, bool]]:
    """Yield where `value` holds true or false and another type is asked for: Python takes them for 1 and 0."""
    if isinstance(value, bool):
        if not {"true", "false"} & set(_alternatives(schema, at)):
            yield path, at, value
    elif isinstance(value, dict):
        for tag in [o["discriminator"]["propertyName"] for o in _resolved(schema, at) if "discriminator" in o]:
            at, path = _child(schema, at, value[tag]) or at, (*path, str(value[tag]))
        for key, part in value.items():
            if (below := _child(schema, at, str(key))) is not None:
                yield from _stray_booleans(schema, below, part, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for k, part in enumerate(value):
            if (below := _child(schema, at, k)) is not None:
                yield from _stray_booleans(schema, below, part, (*path, str(k)))


def _known_fields(schema: Schema) -> set[str]:
    """Return every field name that `schema` mentions, at any depth."""
    return {f for part in [schema, *schema.get("$defs", {}).values()] for f in part.get("properties", {})}
