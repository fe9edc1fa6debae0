"""status.json of a run, which a slow disk never holds up.

The latest snapshot is written behind what the driver does; those that a slow disk did not come to are
left out. A status that is late is logged once: it is a view, and no reason to end a run.
"""

from __future__ import annotations

import logging

from rlhf_cluster.errors import StalledError
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.status_snapshot import Snapshot
from rlhf_cluster.util.slow_disk import (
    Behind,
    Patience,
)

log = logging.getLogger(__name__)


class StatusFile:
    """Written by one process. Nothing here raises."""

    def __init__(self, run: RunDir, patience: Patience) -> None:
        self._run = run
        self._behind = Behind(str(run.status), patience, grace_s=0.0)
        self._late = False

    def show(self, snapshot: Snapshot) -> None:
        try:
            self._behind.put(lambda: self._run.write_status(snapshot), latest=True)
        except StalledError as error:
            self._tell(error)
        else:
            self._late = False

    def close(self) -> None:
        """Waits for: the latest to be written, at most the deadline."""
        try:
            self._behind.flush()
        except StalledError as error:
            self._tell(error)

    def _tell(self, error: StalledError) -> None:
        if not self._late:
            log.warning("%s; it shows an earlier time", error)
        self._late = True
