"""One JSON object on standard output, for commands with --json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import typer


class Refused(Exception):
    """End of a command with exit code 1 that has already printed its JSON object."""


def print_json(facts: Mapping[str, Any]) -> None:
    """Print `facts` as one line. Numbers that are not finite become null, secrets are hidden."""
    from rlhf_cluster.util.provenance import redact_process_secrets

    typer.echo(
        json.dumps(
            _finite(redact_process_secrets(facts)), ensure_ascii=False, allow_nan=False, default=str
        )
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
