"""Types that packages outside this one add to a run file: algorithms, rewards, stages, losses, sinks.

A `type` of a section is one of three:

    type = "grpo"                        a built-in name, of the table in this package
    type = "shouting"                    a name that an installed package has as entry point
    type = "my_package.shouting:Shout"   a dotted path, found as Python finds `my_package`

The class is imported where it is used and nowhere else, so a broken package costs the runs that name
it. `docs/extending.md` has an example of each.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.sections.section import Problems, Section, import_name, is_built_in, messages_of

T = TypeVar("T")


class Table(dict[str, T]):
    """Built-in types by name. `table[name]` also finds those of other packages.

    Iteration yields the built-in names alone.
    """

    def __init__(
        self, kind: str, group: str, built_in: Mapping[str, T], base: type[Section] = Section
    ) -> None:
        """Make a table of types whose sections are subclasses of `base`.

        `kind` is its name in errors, `group` that of its entry points.
        """
        super().__init__(built_in)
        self.kind, self.group, self.base = kind, group, base

    def __missing__(self, name: str) -> T:
        """Import a type of another package. Raises `ConfigError`."""
        self.check_name(name)
        if ":" in name:
            return import_name(name, f"{self.kind} {name!r}")
        entry = next(e for e in list_installed(self.group) if e.name == name)
        package = distribution_name(entry)
        return import_name(entry.value, f"{self.kind} {name!r} of the package {package}")

    def check_name(self, name: str) -> None:
        """Raise `ConfigError` for a name that no type or more than one type has. Imports nothing."""
        entries = [entry for entry in list_installed(self.group) if entry.name == name]
        owners = [distribution_name(entry) for entry in entries]
        if name in self:
            owners.insert(0, "rlhf-cluster (built in)")
        if len(owners) > 1:
            raise ConfigError(
                f"the {self.kind} {name!r} is in more than one package: {', '.join(owners)}. Remove "
                "one of them, or give the dotted path, type = 'package.module:Class'"
            )
        if not owners and ":" not in name:
            others = ", ".join(sorted({repr(e.name) for e in list_installed(self.group)})) or "none"
            raise ConfigError(
                f"unknown type {name!r}; expected one of {', '.join(map(repr, sorted(self)))}; "
                f"installed by other packages: {others}. A class of yours is named by its path, "
                "type = 'package.module:Class'"
            )

    def section_class(self, name: str) -> type[Section]:
        """Return the section of a type of another package. Raises `ConfigError`."""
        found: Any = self[name]
        section: Any = found if _is_section(found) else getattr(found, "section_class", None)
        if not _is_section(section):
            raise ConfigError(
                f"the {self.kind} {name!r} has no section_class, a subclass of "
                f"rlhf_cluster.sections.section.Section with its keys.{self._hint(name, found)}"
            )
        if not issubclass(section, self.base):
            raise ConfigError(
                f"the {self.kind} {name!r}: its section {section.__name__} is not a subclass of "
                f"{self.base.__module__}.{self.base.__name__}. Make it one"
            )
        if "type" not in section.model_fields:
            raise ConfigError(
                f"the {self.kind} {name!r}: its section {section.__name__} has no key `type: str`. "
                "Add it"
            )
        return section

    def _hint(self, name: str, found: Any) -> str:
        if self.kind == "reward" and callable(found) and not isinstance(found, type):
            return f" A function is {{ type = 'python', function = {name!r} }}"
        return " Set it on the class"


@dataclass(frozen=True, slots=True)
class FromOtherPackages:
    """Annotation of a union of a table's sections, which then takes those of other packages too."""

    table: Table[Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self._choose, handler(source), serialization=core_schema.simple_ser_schema("any")
        )

    def _choose(self, value: Any, built_in: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, Section) and not is_built_in(type(value)):
            return value
        name = value.get("type") if isinstance(value, Mapping) else None
        if not isinstance(name, str):
            return built_in(value)
        self.table.check_name(name)
        if name in self.table:
            return built_in(value)
        section = self.table.section_class(name)
        try:
            return section.model_validate(value)
        except ValidationError as error:
            raise Problems(*messages_of(section, error)) from None


def list_installed(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Return the entry points of a group in all installed packages. Imports none of them."""
    return _find_entry_points(group, tuple(sys.path))


@functools.cache
def _find_entry_points(
    group: str, path: tuple[str, ...]
) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


def distribution_name(entry: importlib.metadata.EntryPoint) -> str:
    """Return name and version of the package that has the entry point."""
    owner = entry.dist
    return "?" if owner is None else f"{owner.metadata['Name']} {owner.version}"


def try_installed(tables: Iterable[Table[Any]]) -> Iterator[tuple[str, str, str]]:
    """Import every type that other packages install.

    Yields (kind and name, packages, what is wrong); the last is "" for a type that a run can use.
    """
    for table in tables:
        for name in sorted({entry.name for entry in list_installed(table.group)}):
            owners = [distribution_name(e) for e in list_installed(table.group) if e.name == name]
            fault = ""
            try:
                table.check_name(name)
                _ = table[name]
            except ConfigError as error:
                fault = str(error)
            yield f"{table.kind} {name}", ", ".join(owners), fault


def _is_section(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Section)
