"""Secrets: finding their values, and removing them from what is written.

The secrets are:
- the value of an environment variable whose name looks like that of a secret;
- the value of an environment variable that a setting NAME_env names;
- the value of a setting whose own name looks like that of a secret;
- the values that the process has passed to `hide`.

Promises: `redact` leaves no secret, and no credentials of a URL, in any part of a value.
Everything that a process writes for users to read (logs, JSON files of a run directory) goes
through it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_cluster.util.provenance import (
    HIDDEN,
    SECRET,
    remove_credentials,
)

MIN_CHARACTERS = 6
"""Least length of a secret. Replacing a shorter value would blank out ordinary words."""
_SECRET_VARIABLE = re.compile(r"(token|secret|passw|credential|key|authorization)", re.I)
_NO_SECRET = re.compile(r"(tokenizers?_|_(mode|path|file|dir|folder)$)", re.I)
_NAMES_A_VARIABLE = "_env"

_hidden: list[str] = []  # secrets of this process, the longest first


def hide(secrets: Iterable[str]) -> None:
    """Make `redact_process_secrets` replace these values from here on, in this process."""
    found = {*_hidden, *(s for s in secrets if len(s) >= MIN_CHARACTERS)}
    _hidden[:] = _longest_first(found)


def redact_process_secrets(value: Any) -> Any:
    """Return `value` without the secrets that this process has passed to `hide`."""
    return redact(value, _hidden)


def find_secrets(config: Mapping[str, Any], variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the secrets in a configuration and the environment, the longest first."""
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


def redact(value: Any, secrets: Sequence[str]) -> Any:
    """Return `value` without `secrets` and without credentials of URLs, at any depth.

    Mappings and sequences are copied: sequences become lists, keys become strings.
    """
    if isinstance(value, Mapping):
        return {str(redact(str(k), secrets)): redact(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return remove_credentials(value)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of every value that is not a container; `key` is the innermost key above it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    elif value is not None:
        yield key, str(value)


def _longest_first(values: Iterable[str]) -> list[str]:
    """Sort so that a secret is replaced before a shorter one that is part of it."""
    return sorted(values, key=lambda value: (-len(value), value))
