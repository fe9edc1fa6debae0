"""Secrets in text: which values they are, and text without them.

A secret is what stands in an environment variable whose name says so, in one that a setting NAME_env
names, or under a setting whose own name says so; and whatever a process has told by `hide`.

Promises: `redacted` leaves none of them in any part of a value, nor the credentials of a URL. What a
process writes for people to read (logs, the JSON files of a run directory) goes through it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_cluster.util.provenance import (
    HIDDEN,
    SECRET,
    without_credentials,
)

MIN_CHARACTERS = 6
"""A shorter value would blank out ordinary words."""
_SECRET_VARIABLE = re.compile(r"(token|secret|passw|credential|key|authorization)", re.I)
_NO_SECRET = re.compile(r"(tokenizers?_|_(mode|path|file|dir|folder)$)", re.I)
_NAMES_A_VARIABLE = "_env"

_hidden: list[str] = []  # of this process, the longest first


def hide(secrets: Iterable[str]) -> None:
    """From now on `of_process` leaves these values out, in this process."""
    found = {*_hidden, *(s for s in secrets if len(s) >= MIN_CHARACTERS)}
    _hidden[:] = _longest_first(found)


def of_process(value: Any) -> Any:
    """`redacted` of all that this process has been told to hide."""
    return redacted(value, _hidden)


def secrets_of(config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> list[str]:
    """The values that must not be read anywhere, the longest first."""
    found = {
        value
        for name, value in variables.items()
        if _SECRET_VARIABLE.search(name) and not _NO_SECRET.search(name)
    }
    for key, value in _leaves(config, ""):
        if SECRET.search(key):
            found.add(value)
        elif key.endswith(_NAMES_A_VARIABLE) and value in variables:
            found.add(variables[value].strip())
    return _longest_first(value for value in found if len(value) >= MIN_CHARACTERS)


def redacted(value: Any, secrets: Sequence[str]) -> Any:
    """`value`, of mappings and sequences of any depth, without `secrets` and without credentials of
    URLs. Sequences become lists, keys strings."""
    if isinstance(value, Mapping):
        return {str(redacted(str(k), secrets)): redacted(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return without_credentials(value)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """The values that are no container, as text, each with the key that it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    elif value is not None:
        yield key, str(value)


def _longest_first(values: Iterable[str]) -> list[str]:
    return sorted(values, key=lambda value: (-len(value), value))
