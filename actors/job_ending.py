"""What a job says of itself: one line of what happened, and the end of its log.

Promise: never more than `LOG_LINES` lines of a log are read, however long it is. Ray keeps the end of
the log with a job whose command failed, so that it can be read when the node is gone.
"""

from __future__ import annotations

from typing import Any

from actors.job_calls import CALL_TIMEOUT_S, JobClient, state_of, within
from rlhf_cluster.errors import RunError, StalledError

LOG_LINES = 10
LINE_CHARS = 500


def message_of(job: Any) -> str | None:
    """What the job says of its end: its own error, else what Ray says and the last line of the log."""
    said, log = _parts(job)
    errors = [line for line in log if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return f"{said}: {log[-1].strip()}" if log else said


def last_lines(job: Any, client: JobClient) -> list[str]:
    """The last lines of the log of a job that runs or failed, each cut to `LINE_CHARS`; else none."""
    if state_of(job) not in ("RUNNING", "FAILED"):
        return []
    lines = _parts(job)[1]
    if not lines and job.driver_node_id is not None:
        try:
            lines = log_tail(job, client, LOG_LINES)
        except (RunError, StalledError) as error:  # a status without them is still one
            lines = [str(error).partition("\n")[0]]
    return [line[:LINE_CHARS] for line in lines if line.strip()][-LOG_LINES:]


def log_tail(job: Any, client: JobClient, num_lines: int) -> list[str]:
    """The last `num_lines` lines of a job's log; none before it has started."""
    if job.driver_node_id is None:
        return []
    text = within(
        CALL_TIMEOUT_S,
        "the end of the job's log",
        lambda: client.get_log_tail(job.submission_id, job.driver_node_id, num_lines),
    )
    return text.splitlines()[-num_lines:]


def _parts(job: Any) -> tuple[str | None, list[str]]:
    """Ray's words, and the end of the log where it follows them: "... exit code 1, last available logs
    (truncated to 20,000 chars):" and the lines."""
    lines = [line.rstrip() for line in (job.message or "").splitlines() if line.strip()]
    if not lines:
        return None, []
    said, found, _ = lines[0].strip().partition(", last ")
    return said, lines[1:] if found and lines[0].endswith(":") else []
