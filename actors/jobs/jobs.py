"""Runs as jobs of a Ray cluster, controlled through its dashboard address.

Promises:
- every call to the cluster has a deadline, and a cluster that is starting is waited for;
- a run name that a live job has already is refused;
- a job runs with the Python of the cluster's own Ray, and is not sent if that Python cannot run it;
- a job is found by its id or by the name of its run.

Only the dashboard has to be reachable from here. A command that needs the cluster itself, such as
`scale`, is sent there as a separate small job. Another one runs `actors.jobs.python_probe`, since
`python` on the cluster's PATH may not be that of the cluster's Ray. It stays in the list of jobs: Ray
adds a new end to a job that is deleted.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.jobs.dashboard_calls import (
    CALL_TIMEOUT_S,
    GRACE_KEY,
    RUN_KEY,
    STOP_GRACE_S,
    STOP_MARGIN_S,
    JobClient,
    Waiting,
    connect,
    find,
    has_ended,
    jobs_of,
    last_lines,
    log_tail,
    message_of,
    send,
    state_of,
    within,
)
from actors.jobs.job_folder import (
    add_code,
    entrypoint,
    pack,
    read,
)
from actors.jobs.python_probe import MARK, VARIABLE
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import RunError, StalledError

FOLLOW_EVERY_S, MAX_FOLLOW_EVERY_S = 1.0, 30.0
FOLLOW_CHARACTERS_PER_S = 500_000
"""Most characters of a log per second that following a job may fetch from the dashboard."""
SCALE_TIMEOUT_S = 960.0  # more than the run itself may take to answer
PROBE_COMMAND = f'"${{{VARIABLE}:-python}}" -m actors.jobs.python_probe'
PROBE_HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "actors.jobs.python_probe.tell"}
"""Variable into which Ray converts `worker_process_setup_hook` of a runtime environment.

If it were set under that key, Ray would call the hook in the job's workers only, and not in the process
that starts the job's command.
"""
PROBE_TIMEOUT_S = 120.0
PROBE_EVERY_S = 0.2
PYTHON_CURE = (
    "Start Ray on every node with the `ray` of an environment that has this project, such as "
    "`.venv/bin/ray start` after `make install`. The run was not submitted"
)


def submit(
    config_path: Path,
    overrides: list[str],
    address: str,
    run_name: str | None,
    client: JobClient | None = None,
    waiting: Waiting | None = None,
) -> str:
    """Start `config_path`, a run, a stage or a pipeline, as a job and return its id.

    Raises:
        ConfigError: the configuration cannot run there.
        RunError: the run name is taken, the cluster cannot be reached, or its Python cannot run this
            project.
        StalledError: the cluster or its Python does not answer in time.
    Waits for: a cluster that is starting, and its Python.
    """
    work = read(config_path, overrides, run_name)
    client, waiting = client or connect(address), waiting or Waiting()
    for job in jobs_of(client, work.name):
        if not has_ended(job):
            raise RunError(
                f"run {work.name!r} is already {state_of(job).lower()} as job {job.submission_id} at "
                f"{address}. Stop it, or give this run another name with --run-id"
            )
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
        pack(Path(folder), config_path, work, Path.cwd())
        python = cluster_python(client, folder, address, waiting)
        command = entrypoint(python, work.overrides)
        facts, grace_s = {RUN_KEY: work.name}, stop_grace_s(work.configs)
        if grace_s != STOP_GRACE_S:
            facts[GRACE_KEY] = str(grace_s)
        stops = {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)}
        return send(client, command, folder, facts, waiting, stops)


def cluster_python(client: JobClient, folder: str, address: str, waiting: Waiting) -> str:
    """Return the path of the Python of the cluster's Ray.

    Args:
        folder: the folder that the job will get.
    Raises: `RunError` if this project cannot run with that Python; `StalledError` after
    `PROBE_TIMEOUT_S`.
    Waits for: a small job, which imports this project. Unblocked by: its end.
    """
    probe = send(client, PROBE_COMMAND, folder, {}, waiting, PROBE_HOOK)
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
            f"{message_of(job)}. {PYTHON_CURE}"
        )
    told = json.loads(lines[-1])
    if told["missing"] is not None:
        raise RunError(
            f"{address}: the cluster's Ray runs with {told['python']} (Python {told['version']}), "
            f"where this project cannot run: {told['missing']}. {PYTHON_CURE}"
        )
    return told["python"]


def stop_grace_s(configs: Sequence[AnyConfig]) -> int:
    """Return the seconds from the request to stop a job until Ray kills it.

    They are more than the notice of each of the job's runs.
    """
    notices = [config.checkpoint.notice_s for config in configs if hasattr(config, "checkpoint")]
    return max([STOP_GRACE_S, *(math.ceil(notice) + STOP_MARGIN_S for notice in notices)])


def status(run_or_job: str, address: str, client: JobClient | None = None) -> dict[str, Any]:
    """Return the state of a job.

    The keys are job, run, state, message, started_s and ended_s in unix time, and log: the last lines
    of its log if it runs or failed.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    return {
        "job": job.submission_id,
        "run": (job.metadata or {}).get(RUN_KEY),
        "state": state_of(job),
        "message": message_of(job),
        "started_s": job.start_time / 1000 if job.start_time else None,
        "ended_s": job.end_time / 1000 if job.end_time else None,
        "log": last_lines(job, client),
    }


def logs(
    run_or_job: str,
    address: str,
    tail: int | None = None,
    actor: str | None = None,
    client: JobClient | None = None,
) -> Iterator[str]:
    """Yield the log lines of the job's driver, only the last `tail` if it is given.

    Logs of single actors are in the run directory: with `actor` it raises a `RunError` that says so.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    if actor is not None:
        raise RunError(
            f"logs of {actor!r}: the job at {address} shows its driver's log only. Read "
            f"{(job.metadata or {}).get(RUN_KEY, '<run>')}/logs/{actor}.log below the run's root, "
            "with: rlhf-cluster logs RUN_DIRECTORY --actor " + actor
        )
    if tail is not None:
        yield from log_tail(job, client, tail)
        return
    text = within(CALL_TIMEOUT_S, "the job's log", lambda: client.get_job_logs(job.submission_id))
    yield from text.splitlines()


def follow(
    run_or_job: str,
    address: str,
    client: JobClient | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield the log lines of the job's driver as they are written, until the job ends.

    Each poll fetches the complete log, because the dashboard has no call for new lines. So the pauses
    between polls grow with the log, and while it does not change.

    Waits for: new lines or the job's end. Unblocked by: either, or by a call that runs past its
    deadline.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    seen, pause_s = 0, FOLLOW_EVERY_S
    while True:
        ended = has_ended(find(client, job.submission_id, address))
        text = within(
            CALL_TIMEOUT_S, "the job's log", lambda: client.get_job_logs(job.submission_id)
        )
        new = text[seen:]
        whole = new if ended else new[: new.rfind("\n") + 1]
        yield from whole.splitlines()
        seen += len(whole)
        if ended:
            return
        pause_s = FOLLOW_EVERY_S if new else min(2 * pause_s, MAX_FOLLOW_EVERY_S)
        sleep(min(MAX_FOLLOW_EVERY_S, max(pause_s, len(text) / FOLLOW_CHARACTERS_PER_S)))


def stop(
    run_or_job: str,
    address: str,
    client: JobClient | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Stop a job, and return when it has ended.

    Raises: `RunError` if it has ended already; `StalledError` if it still runs after twice its grace.
    Waits for: the job's end. Unblocked by: its end, or Ray, which kills it after the grace that
    `submit` set.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    if has_ended(job):
        raise RunError(f"job {job.submission_id} has already ended: {state_of(job)}")
    within(CALL_TIMEOUT_S, "stopping the job", lambda: client.stop_job(job.submission_id))
    grace_s = int((job.metadata or {}).get(GRACE_KEY, STOP_GRACE_S))
    for _ in range(2 * grace_s):
        if has_ended(find(client, job.submission_id, address)):
            return
        sleep(1.0)
    raise StalledError(
        f"job {job.submission_id} still runs {2 * grace_s} s after it was asked to stop"
    )


def scale(
    run_or_job: str,
    sizes: Mapping[str, int],
    address: str,
    client: JobClient | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """Change the pools of a run that is a live job. Returns what was done, by pool.

    A separate job on the cluster sends the request to the run.

    Raises: `RunError` if the run is not live; `StalledError` after `SCALE_TIMEOUT_S`.
    Waits for: that job to end.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    name = (job.metadata or {}).get(RUN_KEY)
    if has_ended(job) or name is None:
        what = f"has ended: {state_of(job)}" if has_ended(job) else "is no run of rlhf-cluster"
        raise RunError(f"job {job.submission_id} {what}. Only a live run can be scaled")
    python = shlex.split(job.entrypoint)[
        0
    ]  # the cluster's Python, found when the run was submitted
    words = [python, "-m", "rlhf_cluster.cli", "scale", name]
    words += [f"{pool}={size}" for pool, size in sizes.items()]
    with tempfile.TemporaryDirectory(prefix="rlhf-scale-") as folder:
        add_code(Path(folder))
        command = shlex.join([*words, "--address", "auto"])
        asked = send(client, command, folder, {}, Waiting(sleep=sleep))
    deadline = time.monotonic() + SCALE_TIMEOUT_S
    while not has_ended(ended := find(client, asked, address)):
        if time.monotonic() > deadline:
            raise StalledError(f"job {asked}: no answer to scale within {SCALE_TIMEOUT_S:g} s")
        sleep(FOLLOW_EVERY_S)
    if state_of(ended) != "SUCCEEDED":
        raise RunError(f"{name}: not scaled: {message_of(ended)}")
    rows = [line.split(maxsplit=1) for line in logs(asked, address, client=client)]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in sizes}
