"""JSON files that are written as a whole.

Promises: a reader sees the old file or the new one, never a part; no secret of this process is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cluster import redaction
from rlhf_cluster.weights.files import sync_folder


def write_json(path: Path, value: Mapping[str, Any], fsync: bool = False) -> None:
    """`fsync`: what is written survives a power cut. Raises `OSError`."""
    text = json.dumps(redaction.of_process(value), indent=2, default=str) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
    if fsync:
        sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
