"""Probe that runs on a cluster: the Python of its Ray, and whether this project can be imported there.

Ray calls the hook `tell` in the process that starts a job's command. That process runs with the Python
of the cluster's own Ray, whatever PATH says. `main` is then run with that Python, and prints one line
for `actors.jobs.jobs`.

Promise: this module needs no package and no recent Python, so that a missing one is reported, and is
not a traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys

VARIABLE = "RLHF_JOB_PYTHON"
MARK = "rlhf-cluster probe: "
OLDEST = (3, 11)


def tell() -> None:
    """Pass the path of this process's interpreter to the command that it starts."""
    os.environ[VARIABLE] = sys.executable


def missing(version: tuple[int, ...]) -> str | None:
    """Return why a run could not start in this process, whose Python has `version`; else None."""
    if version < OLDEST:
        return "it is older than Python " + ".".join(map(str, OLDEST))
    try:
        for module in ("rlhf_cluster.cli", "actors.drivers.rl_driver"):
            importlib.import_module(module)
    # a foreign environment may raise any error on an import, and the user has to read it
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    told = {
        "python": sys.executable,
        "version": platform.python_version(),
        "missing": missing(sys.version_info[:2]),
    }
    print(MARK + json.dumps(told))


if __name__ == "__main__":
    main()
