"""A sink of metrics in a package of yours: one CSV line per value."""

import csv
from collections.abc import Mapping

from rlhf_cluster.observe.sinks import RunInfo


class CsvSink:
    def __init__(self, about: RunInfo) -> None:
        """Open the sink of a run. A resumed run opens it again, so it appends."""
        about.folder.mkdir(parents=True, exist_ok=True)
        self._file = (about.folder / "metrics.csv").open("a", newline="")
        self._rows = csv.writer(self._file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write finite values by name. A step may come twice."""
        self._rows.writerows([step, name, value] for name, value in values.items())

    def close(self) -> None:
        self._file.close()
