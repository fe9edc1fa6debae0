"""Calls to the dashboard of a Ray cluster, and the outcome of a job from the end of its log.

`actors.jobs.jobs` uses these calls. Each of them has a deadline; Ray's client of the jobs of a
cluster has none.

- A cluster that is down, or an address without a dashboard, is an error at once.
- A cluster that is still starting is waited for; the error at the deadline names what is missing.
- At most `LOG_LINES` lines of a log are read, however long it is. Ray stores the end of the log
  with a job whose command failed, so it can be read after its node has died.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import requests
from ray.job_submission import JobSubmissionClient

from rlhf_cluster.errors import RunError, StalledError
from rlhf_cluster.util.addresses import check_address

CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
SUBMIT_TIMEOUT_S = 120.0
AGENT_TIMEOUT_S = 60.0  # Ray itself ends a head node that is not up after 30 s
AGENT_RETRY_S = 1.0

STOP_GRACE_S = 60
"""Least seconds from the request to stop a job until Ray kills it."""
STOP_MARGIN_S = 15

RUN_KEY, GRACE_KEY = "rlhf_run", "rlhf_stop_grace_s"

STARTING = ("No available agent", "Failed to get head node agent", "Cannot connect to host")
"""Errors of the dashboard while the agent of the head node, which starts jobs, is not up."""

TAIL_BYTES, TAIL_TIMEOUT_S = 16 << 20, 20.0
LOG_LINES, LINE_CHARS = 10, 500

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobClient(JobSubmissionClient):
    """Ray's client of the jobs of a cluster, which can also read the end of a log."""

    def get_log_tail(self, job_id: str, node_id: str, num_lines: int) -> str:
        """Return the last `num_lines` log lines of a job whose driver ran on `node_id`.

        Of these, at most the last `TAIL_BYTES` are kept. The node searches its file for the lines, and
        sends only these.
        """
        query = urlencode({"submission_id": job_id, "node_id": node_id, "lines": num_lines})
        with requests.get(
            f"{self._address}/api/v0/logs/file?{query}",
            headers=self._headers,
            cookies=self._cookies,
            verify=self._verify,
            stream=True,
            timeout=TAIL_TIMEOUT_S,
        ) as answer:
            if answer.status_code != requests.codes.ok:
                self._raise_error(answer)
            tail = b""
            for chunk in answer.iter_content(1 << 20):
                tail = (tail + chunk)[-TAIL_BYTES:]
        return tail.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Clock and sleep of a wait, and `say`, which gets a message for the user when it begins."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = lambda _: None


def connect(address: str) -> JobClient:
    """Connect to the cluster whose dashboard is at `address`.

    Raises: `RunError` if it cannot be reached; `ConfigError` for a dashboard of another machine that
    asks for no token.
    """
    if not address.startswith(("http://", "https://")):
        raise RunError(
            f"{address}: expected the address of the Ray dashboard, such as http://HOST:8265"
        )
    check_address("--address", address)
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=CONNECT_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.NOT_FOUND:
            raise _no_dashboard(address, f"HTTP {error.code} {error.reason}") from error
        # the dashboard answers; the client below explains any other refusal
    except http.client.HTTPException as error:
        raise _no_dashboard(address, f"no HTTP: {type(error).__name__}") from error
    except (OSError, ValueError) as error:
        raise RunError(
            f"{address}: no Ray dashboard answers within {CONNECT_TIMEOUT_S:g} s ({error}). Is the "
            "cluster up, started with a dashboard, and its port reachable from here?"
        ) from error

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    return within(CALL_TIMEOUT_S, "connecting to the cluster", lambda: JobClient(address))


def _no_dashboard(address: str, answer: str) -> RunError:
    return RunError(
        f"{address}: what answers there is no Ray dashboard ({answer}). Give the dashboard's port, "
        "8265 unless `ray start --dashboard-port` says another; 6379 is the cluster's own"
    )


def jobs_of(client: JobClient, run_or_job: str) -> list[Any]:
    """Return the jobs with this id or run name: live ones before ended ones, each newest first."""
    jobs = within(CALL_TIMEOUT_S, "the list of jobs", client.list_jobs)
    found = [
        job
        for job in jobs
        if job.submission_id
        and run_or_job in (job.submission_id, (job.metadata or {}).get(RUN_KEY))
    ]
    return sorted(found, key=lambda job: (has_ended(job), -(job.start_time or 0)))


def find(client: JobClient, run_or_job: str, address: str) -> Any:
    found = jobs_of(client, run_or_job)
    if not found:
        raise RunError(f"{run_or_job}: no job with this id or run name at {address}")
    return found[0]


def state_of(job: Any) -> str:
    return str(job.status)


def has_ended(job: Any) -> bool:
    return state_of(job) in ENDED


def send(
    client: JobClient,
    command: str,
    folder: str,
    metadata: dict[str, str],
    waiting: Waiting,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Start `command` in a copy of `folder` on the cluster. Returns the job's id.

    Raises: `StalledError` after `AGENT_TIMEOUT_S`; `RunError` for any other refusal.
    Waits for: a cluster that is starting. Unblocked by: its start.
    """
    environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}

    def attempt() -> str:
        return within(
            SUBMIT_TIMEOUT_S,
            "submitting the job",
            lambda: client.submit_job(
                entrypoint=command,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": environment | dict(variables or {}),
                },
                metadata=metadata,
            ),
        )

    return once_agents_are_up(attempt, AGENT_TIMEOUT_S, waiting)


def once_agents_are_up(attempt: Callable[[], str], timeout_s: float, waiting: Waiting) -> str:
    """Call `attempt` repeatedly until the head node of a new cluster accepts jobs.

    Raises: `StalledError` at the first refusal after `timeout_s`; any other error of `attempt`.
    Waits for: the agent of the head node. Unblocked by: its start, or another error.
    """
    ends = waiting.clock() + timeout_s
    told = False
    while True:
        try:
            return attempt()
        except RunError as error:
            if not any(text in str(error) for text in STARTING):
                raise
            if waiting.clock() >= ends:
                raise _no_agent(timeout_s) from error
        if not told:
            waiting.say(f"the cluster takes no jobs yet; waiting for it, {timeout_s:g} s at most")
            told = True
        waiting.sleep(AGENT_RETRY_S)


def _no_agent(timeout_s: float) -> StalledError:
    return StalledError(
        f"submitting the job: the cluster takes no jobs after {timeout_s:g} s: the agent of Ray on its "
        "head node does not answer. If the cluster is still starting, submit again. Otherwise the "
        "agent could not start, mostly because its port is taken (52365 unless `ray start "
        "--dashboard-agent-listen-port` says another, such as where two clusters share a machine): "
        "logs/dashboard_agent.log in the head node's session folder says why"
    )


def within(deadline_s: float, what: str, call: Callable[[], Any]) -> Any:
    """Call `call` with a deadline, which Ray's client does not have, and return its result.

    A call that hangs stays behind on a daemon thread.

    Raises: `StalledError` at the deadline; `RunError` if the call fails.
    Waits for: the call.
    """
    outcome: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(call())
        # any error of the client is passed to the caller's thread
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if failure:
        said = "no answer" if isinstance(failure[0], OSError) else "the cluster answered"
        raise RunError(f"{what}: {said}: {failure[0]}") from failure[0]
    if not outcome:
        raise StalledError(f"{what}: no answer from the cluster within {deadline_s:g} s")
    return outcome[0]


def message_of(job: Any) -> str | None:
    """Return why a job ended: its own error, else Ray's message and the last line of the log."""
    said, log = _parts(job)
    errors = [line for line in log if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return f"{said}: {log[-1].strip()}" if log else said


def last_lines(job: Any, client: JobClient) -> list[str]:
    """Return the last log lines of a job that runs or failed, each cut to `LINE_CHARS`; else []."""
    if state_of(job) not in ("RUNNING", "FAILED"):
        return []
    lines = _parts(job)[1]
    if not lines and job.driver_node_id is not None:
        try:
            lines = log_tail(job, client, LOG_LINES)
        except (RunError, StalledError) as error:  # the status is still useful without these lines
            lines = [str(error).partition("\n")[0]]
    return [line[:LINE_CHARS] for line in lines if line.strip()][-LOG_LINES:]


def log_tail(job: Any, client: JobClient, num_lines: int) -> list[str]:
    """Return the last `num_lines` lines of a job's log; [] before it has started."""
    if job.driver_node_id is None:
        return []
    text = within(
        CALL_TIMEOUT_S,
        "the end of the job's log",
        lambda: client.get_log_tail(job.submission_id, job.driver_node_id, num_lines),
    )
    return text.splitlines()[-num_lines:]


def _parts(job: Any) -> tuple[str | None, list[str]]:
    """Split a job's message into Ray's message, and the end of the log if it is included.

    Ray announces the log with "... exit code 1, last available logs (truncated to 20,000 chars):".
    """
    lines = [line.rstrip() for line in (job.message or "").splitlines() if line.strip()]
    if not lines:
        return None, []
    said, found, _ = lines[0].strip().partition(", last ")
    return said, lines[1:] if found and lines[0].endswith(":") else []
