"""The memory of this process, as the kernel counts it."""

from __future__ import annotations

import math
import resource
from pathlib import Path

STATM = Path("/proc/self/statm")


def resident_bytes(statm: Path = STATM) -> float:
    """Bytes of this process that are in memory, shared pages included; NaN where nothing tells."""
    try:
        pages = int(statm.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return math.nan
    return float(pages * resource.getpagesize())
