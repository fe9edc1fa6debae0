"""Runs as jobs of a Ray cluster, through its dashboard address.

Promises: every call to the cluster has a deadline; a run name that a live job already has is
refused; a job is found by its id or by the name of its run. Only the dashboard has to be reachable
from here: what needs the cluster itself, such as `scale`, is sent there as a small job of its own.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.job_folder import add_code, entrypoint, pack, read
from rlhf_cluster.errors import RunError, StalledError
from rlhf_cluster.exposure import refuse_open

CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
SUBMIT_TIMEOUT_S = 120.0
NO_AGENT = "No available agent"
AGENT_TIMEOUT_S = 60.0
AGENT_RETRY_S = 1.0
STOP_GRACE_S = 60
FOLLOW_EVERY_S = 1.0
SCALE_TIMEOUT_S = 960.0  # more than the run itself may take to answer
RUN_KEY = "rlhf_run"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobClient(Protocol):
    """What is used of Ray's JobSubmissionClient."""

    def submit_job(
        self, *, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str: ...

    def list_jobs(self) -> Sequence[Any]: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def stop_job(self, job_id: str) -> bool: ...


def submit(
    config_path: Path,
    overrides: list[str],
    address: str,
    run_name: str | None,
    client: JobClient | None = None,
) -> str:
    """Start `config_path`, a run, a stage or a pipeline, as a job and return its id.

    Raises `ConfigError` for a configuration that cannot run there, `RunError` for a run name that
    is taken or a cluster that cannot be reached.
    """
    work = read(config_path, overrides, run_name)
    client = client or connect(address)
    for job in _jobs(client, work.name):
        if not _ended(job):
            raise RunError(
                f"run {work.name!r} is already {_state(job).lower()} as job {job.submission_id} at "
                f"{address}. Stop it, or give this run another name with --run-id"
            )
    with tempfile.TemporaryDirectory(prefix="rlhf-submit-") as folder:
        pack(Path(folder), config_path, work, Path.cwd())
        return _send(client, entrypoint(work.overrides), folder, {RUN_KEY: work.name})


def status(run_or_job: str, address: str, client: JobClient | None = None) -> dict[str, Any]:
    """Where a job stands: job, run, state, message, started_s and ended_s in unix time."""
    job = _find(client or connect(address), run_or_job, address)
    return {
        "job": job.submission_id,
        "run": (job.metadata or {}).get(RUN_KEY),
        "state": _state(job),
        "message": _message(job),
        "started_s": job.start_time / 1000 if job.start_time else None,
        "ended_s": job.end_time / 1000 if job.end_time else None,
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
    job = _find(client, run_or_job, address)
    if actor is not None:
        raise RunError(
            f"logs of {actor!r}: the job at {address} shows its driver's log only. Read "
            f"{(job.metadata or {}).get(RUN_KEY, '<run>')}/logs/{actor}.log below the run's root, "
            "with: rlhf-cluster logs RUN_DIRECTORY --actor " + actor
        )
    text = _within(CALL_TIMEOUT_S, "the job's log", lambda: client.get_job_logs(job.submission_id))
    lines = text.splitlines()
    yield from lines if tail is None else lines[max(0, len(lines) - tail) :]


def follow(
    run_or_job: str,
    address: str,
    client: JobClient | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Lines of the job's driver as they come, until the job ends.

    Waits for: new lines or the job's end. Unblocked by: either, or by a call that runs past its
    deadline.
    """
    client = client or connect(address)
    job = _find(client, run_or_job, address)
    seen = 0
    while True:
        ended = _ended(_find(client, job.submission_id, address))
        text = _within(
            CALL_TIMEOUT_S, "the job's log", lambda: client.get_job_logs(job.submission_id)
        )
        new = text[seen:]
        whole = new if ended else new[: new.rfind("\n") + 1]
        yield from whole.splitlines()
        seen += len(whole)
        if ended:
            return
        sleep(FOLLOW_EVERY_S)


def stop(
    run_or_job: str,
    address: str,
    client: JobClient | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """End a job and see it ended. Raises `RunError` when it has ended already.

    Waits for: the job to end. Unblocked by: its end, or Ray killing it after `STOP_GRACE_S`.
    """
    client = client or connect(address)
    job = _find(client, run_or_job, address)
    if _ended(job):
        raise RunError(f"job {job.submission_id} has already ended: {_state(job)}")
    _within(CALL_TIMEOUT_S, "stopping the job", lambda: client.stop_job(job.submission_id))
    for _ in range(2 * STOP_GRACE_S):
        if _ended(_find(client, job.submission_id, address)):
            return
        sleep(1.0)
    raise StalledError(
        f"job {job.submission_id} still runs {2 * STOP_GRACE_S} s after it was asked to stop"
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
    job = _find(client, run_or_job, address)
    name = (job.metadata or {}).get(RUN_KEY)
    if _ended(job) or name is None:
        what = f"has ended: {_state(job)}" if _ended(job) else "is no run of rlhf-cluster"
        raise RunError(f"job {job.submission_id} {what}. Only a live run can be scaled")
    words = ["python", "-m", "rlhf_cluster.cli", "scale", name]
    words += [f"{pool}={size}" for pool, size in sizes.items()]
    with tempfile.TemporaryDirectory(prefix="rlhf-scale-") as folder:
        add_code(Path(folder))
        asked = _send(client, shlex.join([*words, "--address", "auto"]), folder, {})
    deadline = time.monotonic() + SCALE_TIMEOUT_S
    while not _ended(ended := _find(client, asked, address)):
        if time.monotonic() > deadline:
            raise StalledError(f"job {asked}: no answer to scale within {SCALE_TIMEOUT_S:g} s")
        sleep(FOLLOW_EVERY_S)
    if _state(ended) != "SUCCEEDED":
        raise RunError(f"{name}: not scaled: {_message(ended)}")
    rows = [line.split(maxsplit=1) for line in logs(asked, address, client=client)]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in sizes}


def connect(address: str) -> JobClient:
    """A client of the cluster whose dashboard is at `address`. Raises `RunError` if unreachable,
    `ConfigError` for another machine's that asks for no token."""
    if not address.startswith(("http://", "https://")):
        raise RunError(
            f"{address}: expected the address of the Ray dashboard, such as http://HOST:8265"
        )
    refuse_open("--address", address)
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=CONNECT_TIMEOUT_S)
    except urllib.error.HTTPError:
        pass  # it answers; the client below explains a refusal
    except (OSError, ValueError) as error:
        raise RunError(
            f"{address}: no Ray dashboard answers within {CONNECT_TIMEOUT_S:g} s ({error}). Is the "
            "cluster up, started with a dashboard, and its port reachable from here?"
        ) from error
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    return _within(
        CALL_TIMEOUT_S, "connecting to the cluster", lambda: JobSubmissionClient(address)
    )


def _jobs(client: JobClient, run_or_job: str) -> list[Any]:
    """Jobs with this id or run name, the newest first, live ones before ended ones."""
    jobs = _within(CALL_TIMEOUT_S, "the list of jobs", client.list_jobs)
    found = [
        job
        for job in jobs
        if job.submission_id
        and run_or_job in (job.submission_id, (job.metadata or {}).get(RUN_KEY))
    ]
    return sorted(found, key=lambda job: (_ended(job), -(job.start_time or 0)))


def _find(client: JobClient, run_or_job: str, address: str) -> Any:
    found = _jobs(client, run_or_job)
    if not found:
        raise RunError(f"{run_or_job}: no job with this id or run name at {address}")
    return found[0]


def _send(client: JobClient, command: str, folder: str, metadata: dict[str, str]) -> str:
    """Start `command` in a copy of `folder` on the cluster. Returns the job's id."""
    environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}

    def send() -> str:
        return client.submit_job(
            entrypoint=command,
            runtime_env={"working_dir": folder, "env_vars": environment},
            metadata=metadata,
        )

    return _within(
        SUBMIT_TIMEOUT_S,
        "submitting the job",
        lambda: once_agents_are_up(send, AGENT_TIMEOUT_S, time.monotonic, time.sleep),
    )


def once_agents_are_up(
    send: Callable[[], str],
    timeout_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> str:
    """`send()`, again while the cluster is so young that no node's agent takes jobs.

    Waits for: an agent. Unblocked by: its start, any other error, or the cluster's refusal after
    `timeout_s`.
    """
    ends = clock() + timeout_s
    while True:
        try:
            return send()
        except RuntimeError as error:
            if NO_AGENT not in str(error) or clock() >= ends:
                raise
        sleep(AGENT_RETRY_S)


def _message(job: Any) -> str | None:
    """What the job says of its end: its own error, else the first line of Ray's words."""
    lines = [line.strip() for line in (job.message or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors[-1:] or lines[:1] or [None])[0]


def _state(job: Any) -> str:
    return str(job.status)


def _ended(job: Any) -> bool:
    return _state(job) in ENDED


def _within(deadline_s: float, what: str, call: Callable[[], Any]) -> Any:
    """`call()` with a deadline; Ray's client has none of its own.

    Waits for: the call. Unblocked by: its end, or `StalledError` at the deadline; a call that hangs
    stays behind on a daemon thread.
    """
    outcome: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(call())
        # Everything the client raises is handed to the caller's thread.
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if failure:
        raise RunError(f"{what}: the cluster answered: {failure[0]}") from failure[0]
    if not outcome:
        raise StalledError(f"{what}: no answer from the cluster within {deadline_s:g} s")
    return outcome[0]
