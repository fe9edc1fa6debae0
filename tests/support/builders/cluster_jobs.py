"""Jobs of a cluster that does not exist: a client and a clock written by hand."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.jobs.dashboard_calls import (
    RUN_KEY,
    Waiting,
)
from actors.jobs.python_probe import MARK

ADDRESS = "http://127.0.0.1:8265"
PROBE = "job-probe"
PYTHON = "/opt/the env/bin/python"


def make_job(job_id: str, run: str | None, status: str, start_s: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=job_id,
        metadata={RUN_KEY: run} if run else None,
        status=status,
        message=f"message of {job_id}",
        start_time=start_s * 1000,
        end_time=None,
        driver_node_id="node-1",
        entrypoint="/opt/env/bin/python -m rlhf_cluster.cli run run.toml",
    )


def told(python: str = PYTHON, missing: str | None = None) -> str:
    """The log of a job that looked for the cluster's Python."""
    found = {"python": python, "version": "3.11.7", "missing": missing}
    return f"Runtime env is setting up.\n{MARK}{json.dumps(found)}\n"


@dataclass
class FakeClient:
    """Jobs that stand still, but for `script`: what each further list of jobs changes. A job that looks
    for the cluster's Python has ended as `probe_state` when it is first looked at."""

    jobs: list[SimpleNamespace] = field(default_factory=list)
    script: list[Callable[[FakeClient], object]] = field(default_factory=list)
    text: str = ""
    submitted: list[tuple[str, set[str], dict[str, str], Any]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    probes: list[tuple[str, set[str], dict[str, str]]] = field(default_factory=list)
    probe_state: str = "SUCCEEDED"
    probe_text: str = field(default_factory=told)
    tails: list[tuple[str, str, int]] = field(default_factory=list)

    def submit_job(
        self, *, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        folder = Path(runtime_env["working_dir"])
        files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        if "python_probe" in entrypoint:
            self.probes.append((entrypoint, set(files), runtime_env["env_vars"]))
            self.jobs.append(make_job(PROBE, None, self.probe_state))
            return PROBE
        config = tomllib.loads(files["run.toml"].read_text()) if "run.toml" in files else None
        self.submitted.append((entrypoint, set(files), metadata, config))
        return "job-new"

    def list_jobs(self) -> list[SimpleNamespace]:
        if self.script:
            self.script.pop(0)(self)
        return self.jobs

    def get_job_logs(self, job_id: str) -> str:
        return self.probe_text if job_id == PROBE else self.text

    def get_log_tail(self, job_id: str, node_id: str, num_lines: int) -> str:
        self.tails.append((job_id, node_id, num_lines))
        return "".join(self.text.splitlines(keepends=True)[-num_lines:])

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


class FakeTime:
    """A clock that only `sleep` moves, and what was said meanwhile."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.said: list[str] = []
        self.waiting = Waiting(clock=lambda: self.now_s, sleep=self.sleep, say=self.said.append)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
