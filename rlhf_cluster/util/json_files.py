"""JSON files that are replaced atomically.

Promises: a reader sees the old file or the new one, never a part. No secret of this process is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cluster.util import redaction
from rlhf_cluster.util.durable_files import write_all


def write_json(path: Path, value: Mapping[str, Any], fsync: bool = False) -> None:
    """Write `value` without the secrets of this process (`redaction`). Raises `OSError`.

    `fsync`: the file survives a power cut.
    """
    text = json.dumps(redaction.redact_process_secrets(value), indent=2, default=str) + "\n"
    write_all(path, text.encode(), fsync)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if there is no such file, or if it is not JSON.

    Raises `OSError` for any other error of the storage, as the file may exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
