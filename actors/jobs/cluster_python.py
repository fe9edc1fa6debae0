"""Search for the Python that a job on a cluster has to run with: that of the cluster's own Ray.

`python` on the cluster's PATH may be another one, or missing. So a small job runs
`actors.jobs.python_probe` and prints the answer. It stays in the cluster's list of jobs, because Ray
adds a new end to a job that is deleted.
"""

from __future__ import annotations

import json
from typing import Any

from actors.jobs.dashboard_calls import (
    CALL_TIMEOUT_S,
    JobClient,
    Waiting,
    find,
    has_ended,
    message_of,
    send,
    state_of,
    within,
)
from actors.jobs.python_probe import (
    MARK,
    VARIABLE,
)
from rlhf_cluster.errors import RunError, StalledError

COMMAND = f'"${{{VARIABLE}:-python}}" -m actors.jobs.python_probe'
HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "actors.jobs.python_probe.tell"}
"""Variable into which Ray converts `worker_process_setup_hook` of a runtime environment.

If it were set under that key, Ray would call the hook in the job's workers only, and not in the process
that starts the job's command.
"""
PROBE_TIMEOUT_S = 120.0
PROBE_EVERY_S = 0.2
CURE = (
    "Start Ray on every node with the `ray` of an environment that has this project, such as "
    "`.venv/bin/ray start` after `make install`. The run was not submitted"
)


def cluster_python(client: JobClient, folder: str, address: str, waiting: Waiting) -> str:
    """Return the path of the Python of the cluster's Ray.

    Args:
        folder: the folder that the job will get.
    Raises: `RunError` if this project cannot run with that Python; `StalledError` after
    `PROBE_TIMEOUT_S`.
    Waits for: a small job, which imports this project. Unblocked by: its end.
    """
    probe = send(client, COMMAND, folder, {}, waiting, HOOK)
    deadline = waiting.clock() + PROBE_TIMEOUT_S
    while not has_ended(job := find(client, probe, address)):
        if waiting.clock() > deadline:
            within(CALL_TIMEOUT_S, "stopping the job", lambda: client.stop_job(probe))
            raise StalledError(
                f"{address}: a first small job is {state_of(job)} after {PROBE_TIMEOUT_S:g} s "
                f"({message_of(job)}). Can the head node start a process? `ray status` and "
                "the logs in its session folder say more. The run was not submitted"
            )
        waiting.sleep(PROBE_EVERY_S)
    text = within(CALL_TIMEOUT_S, "the job's log", lambda: client.get_job_logs(probe))
    return _python_of(job, text, address)


def _python_of(job: Any, text: str, address: str) -> str:
    """Return the path that the probe printed in its log. Raises `RunError` like `cluster_python`."""
    lines = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RunError(
            f"{address}: this project cannot run there; a first small job is {state_of(job)}: "
            f"{message_of(job)}. {CURE}"
        )
    told = json.loads(lines[-1])
    if told["missing"] is not None:
        raise RunError(
            f"{address}: the cluster's Ray runs with {told['python']} (Python {told['version']}), "
            f"where this project cannot run: {told['missing']}. {CURE}"
        )
    return told["python"]
