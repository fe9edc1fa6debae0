"""Run on a cluster: which Python its Ray runs with, and whether this project can be imported there.

`tell` is a hook that Ray calls in the process that starts a job's command; that process runs with the
Python of the cluster's own Ray, whatever PATH has. `main` is then run with it and prints one line for
`actors.jobs.cluster_python`. Promise: this module itself needs no package and no new Python, so that
what is missing is said, and is not a traceback.
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
    """Leave the path of this process's interpreter to the command that it starts."""
    os.environ[VARIABLE] = sys.executable


def missing(version: tuple[int, ...]) -> str | None:
    """Why a run could not start in this process, whose Python has `version`; None where it could."""
    if version < OLDEST:
        return "it is older than Python " + ".".join(map(str, OLDEST))
    try:
        for module in ("rlhf_cluster.cli", "actors.drivers.rl_driver"):
            importlib.import_module(module)
    # Whatever a foreign environment raises on an import is what the user has to read.
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
