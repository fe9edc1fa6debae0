"""The keys of all run files as facts: type, default, bounds, description, and the files that have it.

They are read from the models that validate a run file, so nothing here is written twice. A path has
the names of a run file: `scoring.rewards.weight` is a key of each table [[scoring.rewards]], and
`scoring.pools.NAME.workers` one of a table whose name is free.

Promises:
- all keys of all sections are included, those of every built-in type of a tagged section too;
- keys with equal facts are one entry, which lists the types and the kinds of run files that have it.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_cluster.config.dataset_config import GenerateConfig
from rlhf_cluster.config.load import PipelineFile
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.config.stage_config import StageConfig
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.sections.other_names import keys_meant

KINDS: Mapping[str, type[BaseModel]] = {
    "run": RunConfig,
    "stage": StageConfig,
    "data set": GenerateConfig,
    "pipeline": PipelineFile,
}
"""Kinds of run files: a run, an offline stage, a stage that makes a data set, several of them."""

FREE_NAME = "NAME"
"""Part of a path that a run file chooses."""

REQUIRED = "required"

_LONGEST_DEFAULT = 60
_NEAR = 5
_FEW = 3
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "length at least {}",
    "minItems": "length at least {}",
    "minProperties": "tables at least {}",
    "pattern": "matches {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a section, or several with equal facts."""

    section: str
    """Path of the section that has the key; "" for a section of the run file itself."""
    name: str
    type: str
    default: str
    """TOML text, `none` for a key that is not set, `required` for a key that must be given."""
    bounds: str
    description: str
    """Text of one paragraph; "" if the code has none."""
    types: tuple[str, ...] = ()
    """Values of the section's `type` under which the key exists. Empty: the section has no types."""
    within: tuple[str, ...] = ()
    """Settings that the section is part of, such as `algorithm.type = "grpo"`. Empty: any."""
    kinds: tuple[str, ...] = ()
    """Kinds of run files that have the key, of `KINDS`."""

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}".lstrip(".")

    @property
    def summary(self) -> str:
        """First sentence of the description."""
        return first_sentence(self.description)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One place of a model in run files."""

    path: str
    type: str
    """Value of the section's `type`; "" for a section without types."""
    within: str
    kind: str
    model: type[BaseModel]

    @property
    def description(self) -> str:
        """First paragraph of what the section is; "" if the code has none."""
        return one_paragraph((self.model.__dict__.get("__doc__") or "").partition("\n\n")[0])


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Return every place of every section, in the order of the run files."""
    return tuple(
        found
        for kind, model in KINDS.items()
        for found in _walk(Variant(path="", type="", within="", kind=kind, model=model))
    )


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Return all keys, section by section, those with equal facts as one."""
    found: dict[Key, list[Variant]] = {}
    for variant in variants():
        for fact in facts_of(variant.model):
            found.setdefault(replace(fact, section=variant.path), []).append(variant)
    merged = [
        replace(
            fact,
            types=_unique(v.type for v in places),
            within=_unique(v.within for v in places),
            kinds=_unique(v.kind for v in places),
        )
        for fact, places in found.items()
    ]
    sections_in_order = {path: place for place, path in enumerate(sections())}
    names = {path: place for place, path in enumerate(dict.fromkeys(key.path for key in merged))}

    def place(key: Key) -> tuple[int, bool, int]:
        return sections_in_order[key.section], key.name != "type", names[key.path]

    return tuple(sorted(merged, key=place))


@functools.cache
def sections() -> tuple[str, ...]:
    """Return the paths of all sections, each top section followed by those within it."""
    paths = list(dict.fromkeys(variant.path for variant in variants()))
    tops = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    return tuple(sorted(paths, key=lambda path: tops.index(path.partition(".")[0])))


def variants_of(section: str) -> tuple[Variant, ...]:
    """Return the models of a section, each once: its types, or those of several kinds of files."""
    found = {(v.type, v.model): v for v in variants() if v.path == section}
    return tuple(found.values())


def keys_of(section: str) -> tuple[Key, ...]:
    return tuple(key for key in all_keys() if key.section == section)


def types_of(section: str) -> dict[str, str]:
    """Return the types of a section with what each is; empty for a section without types."""
    return {v.type: v.description for v in variants_of(section) if v.type}


def conditions(key: Key) -> str:
    """Return the settings under which a key exists, in words; "" if it always does."""
    known, parts = list(types_of(key.section)), []
    missing = [name for name in known if name not in key.types]
    if key.types and missing:
        few = len(missing) <= _FEW < len(key.types)
        parts.append(f"all but {', '.join(missing)}" if few else ", ".join(key.types))
    anywhere = {v.within for v in variants() if v.path == key.section and v.within}
    if anywhere != {*key.within}:
        parts.append(f"within {', '.join(key.within)}")
    return "; ".join(parts)


def resolve(query: str) -> str:
    """Return the path that `query` means. Numbers in lists and free names may be as in a run file.

    Raises `ConfigError` with the nearest paths for one that no run file has.
    """
    known = dict.fromkeys([*filter(None, sections()), *(key.path for key in all_keys())])
    asked = re.sub(r"\.\d+(?=\.|$)", "", query.strip().strip("[]"))
    for path in known:
        pattern = re.escape(path).replace(FREE_NAME, r"[^.]+")
        if re.fullmatch(pattern, asked):
            return path
    last = asked.rpartition(".")[2]
    same_name = [path for path in known if path.rpartition(".")[2] == last]
    by_name = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = [
        *difflib.get_close_matches(asked, known, n=_NEAR),
        *(by_name[name] for name in difflib.get_close_matches(last, by_name, n=_NEAR)),
    ]
    meant = keys_meant(last)  # of another framework: nothing that only looks alike is better
    close = meant or _unique([*same_name, *near])[:_NEAR]
    hint = (
        f"did you mean {', '.join(close)}?" if close else "`rlhf-cluster config` lists the sections"
    )
    raise ConfigError(f"{query}: no run file has this key; {hint}")


def one_paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z`\d])", text, maxsplit=1)[0]


def _walk(variant: Variant) -> Iterator[Variant]:
    """Yield a place and all places below it."""
    yield variant
    outer = f'{variant.path}.type = "{variant.type}"' if variant.type else variant.within
    for name, field in variant.model.model_fields.items():
        for inner, is_named in _models(field.annotation):
            path = f"{variant.path}.{name}".lstrip(".") + (f".{FREE_NAME}" if is_named else "")
            yield from _walk(
                Variant(
                    path=path, type=_type_of(inner), within=outer, kind=variant.kind, model=inner
                )
            )


def _models(annotation: Any, is_named: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield each model of an annotation, and whether it is of a table of free names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_named
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        arguments = arguments[:1]
    if origin in (typing.Union, types.UnionType, typing.Annotated, list, tuple, dict):
        for argument in arguments:
            yield from _models(argument, is_named or origin is dict)


def _type_of(model: type[BaseModel]) -> str:
    field = model.model_fields.get("type")
    return field.default if field is not None and isinstance(field.default, str) else ""


@functools.cache
def facts_of(model: type[BaseModel]) -> tuple[Key, ...]:
    """Return the keys of a model, without their place."""
    schemas = model.model_json_schema()["properties"] if model.model_fields else {}
    return tuple(
        _KIND
        if name == "type" and _type_of(model)
        else Key(
            section="",
            name=name,
            type=_type_text(schemas[name]),
            default=_default_text(field),
            bounds=_bounds_text(schemas[name]),
            description=_description(model, name),
        )
        for name, field in model.model_fields.items()
    )


_KIND = Key(
    section="",
    name="type",
    type="string",
    default=REQUIRED,
    bounds="",
    description="Kind of the section, which decides what other keys it has.",
)


def _description(model: type[BaseModel], name: str) -> str:
    """Return the text of a key: its own, that of a base class, or that of its section."""
    for base in model.__mro__:
        field = base.model_fields.get(name) if issubclass(base, BaseModel) else None
        if field is not None and field.description:
            return one_paragraph(field.description)
    inner = list(_models(model.model_fields[name].annotation))
    return one_paragraph(inner[0][0].__dict__.get("__doc__")) if len(inner) == 1 else ""


def _type_text(schema: Mapping[str, Any]) -> str:
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return " or ".join(_unique(map(_type_text, options)))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if "$ref" in schema or "oneOf" in schema or "allOf" in schema:
        return "section"
    kind = schema.get("type")
    if kind == "array":
        fixed = schema.get("prefixItems", ())
        inner = _type_text(fixed[0] if fixed else schema.get("items", {}))
        head, of, rest = inner.partition(" ")
        is_choice = inner.startswith('"')
        count = f"{len(fixed)} " if fixed else ""
        return f"list of {count}" + (inner if is_choice else f"{head}s{of}{rest}")
    if kind == "object":
        inner = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
        is_sections = any(isinstance(each, dict) and "$ref" in each for each in inner)
        return "sections by name" if is_sections else "table"
    return str(kind or "any value")


def _bounds_text(schema: Mapping[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", ())]
    texts = [
        text.format(_number(part[name]))
        for part in parts
        for name, text in _BOUNDS.items()
        if name in part
    ]
    return ", ".join(texts)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value < 1e6 else str(value)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    text = _toml(value)
    return text if len(text) <= _LONGEST_DEFAULT else f"a text of {len(value)} characters"


def _toml(value: Any) -> str:
    """Return a default as TOML text. A section without a type has its own defaults."""
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return (
            f'{{ type = "{_type_of(type(value))}" }}' if _type_of(type(value)) else "its defaults"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, texts)))
