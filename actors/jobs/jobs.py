"""Runs as jobs of a Ray cluster, through its dashboard address.

Promises: every call to the cluster has a deadline, and one that is starting is waited for; a run name
that a live job already has is refused; a job runs with the Python of the cluster's own Ray, and is not
sent where that cannot run it; a job is found by its id or by the name of its run. Only the dashboard
has to be reachable from here: what needs the cluster itself, such as `scale`, is sent there as a small
job of its own.
"""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.jobs.cluster_python import cluster_python
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
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import RunError, StalledError

FOLLOW_EVERY_S, MAX_FOLLOW_EVERY_S = 1.0, 30.0
FOLLOW_CHARACTERS_PER_S = 500_000
"""What following a job may cost its dashboard."""
SCALE_TIMEOUT_S = 960.0  # more than the run itself may take to answer


def submit(
    config_path: Path,
    overrides: list[str],
    address: str,
    run_name: str | None,
    client: JobClient | None = None,
    waiting: Waiting | None = None,
) -> str:
    """Start `config_path`, a run, a stage or a pipeline, as a job and return its id.

    Waits for: a cluster that is starting, and its Python. Unblocked by: these, or `StalledError`.
    Raises `ConfigError` for a configuration that cannot run there, `RunError` for a run name that
    is taken, a cluster that cannot be reached, or one whose Python cannot run this project.
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


def stop_grace_s(configs: Sequence[AnyConfig]) -> int:
    """How long a job that is asked to stop has until Ray kills it: over the notice of each of its
    runs."""
    notices = [config.checkpoint.notice_s for config in configs if hasattr(config, "checkpoint")]
    return max([STOP_GRACE_S, *(math.ceil(notice) + STOP_MARGIN_S for notice in notices)])


def status(run_or_job: str, address: str, client: JobClient | None = None) -> dict[str, Any]:
    """Where a job stands: job, run, state, message, started_s and ended_s in unix time, and the last
    lines of its log while it runs and where it failed."""
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
    """Lines of the job's driver, the last `tail` of them.

    Logs of single actors lie in the run directory: `actor` raises `RunError` that says so.
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
    """Lines of the job's driver as they come, until the job ends.

    Each look fetches the whole log, for want of a call that gives what is new. So the pauses between
    them grow with it, and while it stays as it is.

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
    """End a job and see it ended. Raises `RunError` when it has ended already.

    Waits for: the job to end. Unblocked by: its end, or Ray killing it after what `submit` gave it.
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

    A job of its own asks the run, on the cluster. Waits for: that job to end. Unblocked by: its
    end, or `StalledError` after `SCALE_TIMEOUT_S`. Raises `RunError` when the run is not live.
    """
    client = client or connect(address)
    job = find(client, run_or_job, address)
    name = (job.metadata or {}).get(RUN_KEY)
    if has_ended(job) or name is None:
        what = f"has ended: {state_of(job)}" if has_ended(job) else "is no run of rlhf-cluster"
        raise RunError(f"job {job.submission_id} {what}. Only a live run can be scaled")
    python = shlex.split(job.entrypoint)[0]  # it was found when the run was submitted
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
