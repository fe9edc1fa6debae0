"""A cluster that jobs are sent to: a head of its own with a dashboard, started as a user would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes.free_ports import free_ports

BIN = Path(sys.executable).parent
START_S = 90.0


def wait_until(found: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


@contextmanager
def started_head(variables: Mapping[str, str]) -> Iterator[str]:
    """The address of its dashboard, as soon as that answers. `ray` is called by its full path, in this
    process's environment with `variables`; it ends with the context."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie below it
    port, client, agent, gcs = free_ports(4)
    words = f"""{BIN}/ray start --head --block --disable-usage-stats --port {gcs}
        --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port {port}
        --ray-client-server-port {client} --dashboard-agent-listen-port {agent}
        --min-worker-port 0 --max-worker-port 0 --num-cpus 8 --object-store-memory 268435456
        --temp-dir {folder}/ray"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **variables}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(words.split(), env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert head.poll() is None, (folder / "head.log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/api/version", timeout=2):
                return True
        except OSError:
            return False

    try:
        wait_until(answers, "the dashboard answers", START_S)
        yield url
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
