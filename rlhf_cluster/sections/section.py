"""Sections, loading, and errors of a run configuration.

A configuration is a TOML file of pydantic sections: frozen, unknown keys refused, no infinities.
Overrides come as `section.key=value` with the value in TOML syntax (a bare word is a string).
All problems are raised as one `ConfigError` that lists file, key, value and fix. A section of another
package is imported by its path, "package.module:Name", also where a process unpickles it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import platform
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_cluster.errors import ConfigError, several
from rlhf_cluster.sections.other_names import keys_meant

_FEW = 3
"""Largest number of keys of one name that a hint lists."""


def import_name(path: str, what: str) -> Any:
    """Import "module:name", also from the working directory.

    Raises `ConfigError` that begins with `what`, and names this node and the error of the import.
    """
    module_name, _, name = path.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # a console script does not look in the working directory
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    # Code of another package may raise anything; a script ends the process.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{what} cannot be imported from {path!r} on node {platform.node()}: "
            f"{type(error).__name__}: {error}. Correct the path, or bring the package to every node: "
            "install it in the Python there, or put it in the folder that the run is started from"
        ) from error
    return found


def is_built_in(found: type) -> bool:
    """Return whether a class is of this project, so that every node has it."""
    return found.__module__.partition(".")[0] in ("rlhf_cluster", "actors")


def restore_section(path: str, state: Any) -> Any:
    """Rebuild a pickled section of another package. Raises `ConfigError` where it is not installed."""
    cls = import_name(path, "a section of the run")
    section = cls.__new__(cls)
    section.__setstate__(state)
    return section


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, no infinities."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=False,
        defer_build=True,
        use_attribute_docstrings=True,
    )

    def problems(self) -> Iterator[str]:
        """Yield what keys of this section contradict, for `check_all`, which fills in "{key}"."""
        return iter(())

    def __reduce_ex__(self, protocol: typing.SupportsIndex) -> Any:
        """Pickle a section of another package so that a node without it says what is missing."""
        cls = type(self)
        if is_built_in(cls) or cls.__module__ == "__main__" or "<" in cls.__qualname__:
            return super().__reduce_ex__(protocol)
        return restore_section, (f"{cls.__module__}:{cls.__qualname__}", self.__getstate__())


S = TypeVar("S", bound=Section)

C = TypeVar("C")


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, apply `overrides` in order and validate. Raises `ConfigError`."""
    return validate(cls, read_tree(path, overrides), source=str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the TOML file at `path` and apply `overrides` in order. Raises `ConfigError`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}). Give the path of a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8"
        ) from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(tree, override)
    return tree


class Problems(ValueError):
    """Problems that independent checks of one run file found; `args` are their messages."""


def check_all(config: C, checks: Iterable[Callable[[C], Iterable[str]]] = ()) -> None:
    """Raise all problems of the sections in `config`, and all that `checks` yield, as one `Problems`.

    "{section.key}" in a message becomes "section.key = value". A check that stumbles over what an
    earlier check refused adds nothing.
    """
    texts: list[str] = []
    found = [(key, section, type(section).problems) for key, section in _sections_in(config, "")]
    for key, holder, check in (*found, *(("", config, check) for check in checks)):
        try:
            texts.extend(_fill_in(text, holder, key) for text in check(holder))
        except (AttributeError, KeyError, TypeError, ZeroDivisionError):
            if not texts:
                raise
    if texts:
        raise Problems(*dict.fromkeys(texts))


def _sections_in(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield each section in `value` with its key, which ends in a dot."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Section):
        yield key, value
        inner = value
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for name, item in inner:
        yield from _sections_in(item, f"{key}{name}.")


_KEY = re.compile(r"\{([a-z_0-9]+(?:\.[a-z_0-9]+)*)\}")


def _fill_in(text: str, holder: Any, key: str) -> str:
    """Replace "{name}" in `text` by the key and the value of that setting of `holder`."""

    def setting(match: re.Match[str]) -> str:
        try:
            value = attrgetter(match[1])(holder)
        except AttributeError:  # braces of a user's text
            return match[0]
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        return f"{key}{match[1]} = {shown.lower() if isinstance(value, bool) else shown}"

    return _KEY.sub(setting, text)


def validate(cls: type[S], tree: dict[str, Any], source: str) -> S:
    """Build `cls` from `tree`. Raises one `ConfigError` with all problems, starting with `source`."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise several(messages_of(cls, error), source) from None


def messages_of(cls: type[Section], error: ValidationError) -> list[str]:
    """Return one message per problem that the validation of a `cls` found."""
    return [text for problem in error.errors(include_url=False) for text in _explain(cls, problem)]


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part for part in key.strip().split(".")):
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        node[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[leaf] = text.strip()


def _explain(cls: type[Section], problem: Any) -> Sequence[str]:
    """Return the messages of one problem that pydantic found; several where checks found several."""
    found = problem.get("ctx", {}).get("error")
    if not isinstance(found, Problems):
        return [_explain_one(cls, problem)]
    where = ".".join(map(str, problem["loc"]))
    return [f"{where}: {text}" for text in found.args] if where else found.args


def _explain_one(cls: type[Section], problem: Any) -> str:
    """Return one line that describes a problem of pydantic: key, what is wrong, hint."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "configuration"
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_meant(cls, location)}"
    if kind == "missing":
        return f"{key}: required, and not given"
    if kind == "model_type":
        return f"{key}: expected a section, [{key}] with its own keys; found {problem['input']!r}"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        return f"{key}: unknown type {context['tag']!r}; expected one of {context['expected_tags']}"
    if kind == "value_error":
        return message if not location else f"{key}: {message}"
    return f"{key}: {message}; found {problem['input']!r}"


def _meant(cls: type[BaseModel], location: Sequence[str]) -> str:
    """Return a hint at the key that an unknown one means, or the keys that are known at its place.

    Another framework's name of a setting comes first, then a name that resembles one of the same
    section, then the same name in other sections.
    """
    *section, name = location
    known = _known_keys(cls, section)
    elsewhere = [key for key in keys_meant(name) if _has(cls, key.split("."))]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    if same := [path for path in _paths(cls) if path.rpartition(".")[2] == name][:_FEW]:
        return f"did you mean {' or '.join(same)}?"
    return f"known here: {', '.join(known)}"


def _has(cls: type[BaseModel], path: Sequence[str]) -> bool:
    """Return whether some type of the section at `path` has its last part as a key."""
    return all(name in _known_keys(cls, path[:place]) for place, name in enumerate(path))


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the paths of all keys below `model`, each once."""
    found: dict[str, None] = {}
    for name, field in model.model_fields.items():
        found[f"{prefix}{name}"] = None
        for inner in _models_in(field.annotation):
            found |= dict.fromkeys(_paths(inner, f"{prefix}{name}."))
    yield from found


def _known_keys(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Return the keys that are allowed at `location`, over all types of a tagged union."""
    models: list[type[BaseModel]] = [cls]
    for part in location:
        models = (
            [
                found
                for model in models
                if part in model.model_fields
                for found in _models_in(model.model_fields[part].annotation)
            ]
            or [m for m in models if _discriminator(m) == part]
            or models
        )
    return sorted({name for model in models for name in model.model_fields})


def _discriminator(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field is not None and isinstance(field.default, str) else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, list, tuple, dict):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)
