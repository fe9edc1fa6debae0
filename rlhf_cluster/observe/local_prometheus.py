"""Local Prometheus that scrapes this machine's Ray nodes, with our rules: for `rlhf-cluster monitor`.

Promises:
- Prometheus listens on loopback alone, is ready when the block begins, and ends with it. If it does
  not become ready, the error has what it printed;
- its data stays in the `monitor` folder of the run directory, and the next start continues it;
- nothing is installed or downloaded.

A run records the metrics addresses of its nodes at its start (`control.json`). A Ray cluster with a
dashboard keeps a file of all its nodes (`DISCOVERY`). If that file has a node of the run, Prometheus
reads it and so finds nodes that join later. Otherwise it scrapes the recorded or given addresses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_cluster.errors import RunError, StalledError

RULES = tuple(Path(__file__).with_name(f"{kind}.rules.yml") for kind in ("recording", "alerts"))
"""Rules of deploy/prometheus; links in a checkout, files in an installed package."""

DISCOVERY = Path("/tmp/ray/prom_metrics_service_discovery.json")
HOST = "127.0.0.1"
PORT = 9090
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
INSTALL = (
    "apt-get install prometheus (Debian, Ubuntu), brew install prometheus, or a release of "
    "https://prometheus.io/download; then this command again, with --prometheus PATH if it is not on "
    "the PATH. docker compose -f deploy/compose.yml up -d starts it with Grafana"
)
GRAFANA = (
    "Grafana with the dashboards: docker compose -f deploy/compose.yml up -d, then "
    "http://localhost:3000; without Docker, install it (https://grafana.com/grafana/download), give it "
    "this Prometheus as data source with the uid 'prometheus', and import deploy/grafana/dashboards"
)


def find_prometheus(given: Path | None) -> Path:
    """Return `given`, or the Prometheus on the PATH. Raises `RunError` that says how to get it."""
    if given is not None:
        if not os.access(given, os.X_OK) or given.is_dir():
            raise RunError(f"--prometheus {given}: no program that can be started")
        return given.absolute()
    found = shutil.which("prometheus")
    if found is None:
        raise RunError(f"no Prometheus is installed. {INSTALL}")
    return Path(found)


def targets_of(run_dir: Path) -> list[str]:
    """Return HOST:PORT of the nodes' metrics when the run began. Raises `RunError`."""
    path = run_dir / "control.json"
    try:
        found = json.loads(path.read_text())["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: it does not say where the run's metrics are ({type(error).__name__}: {error}). "
            "Give --target HOST:PORT, the metrics port of a node (ray start --metrics-export-port)"
        ) from error
    return [str(target) for target in found]


def find_discovery(targets: Sequence[str], discovery: Path = DISCOVERY) -> Path | None:
    """Return Ray's own list of nodes if a node of `targets` is in it, else None."""
    try:
        listed = json.loads(discovery.read_text())
        known = {target for entry in listed for target in entry["targets"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return discovery if known & set(targets) else None


def write_configuration(folder: Path, targets: Sequence[str], discovery: Path | None) -> Path:
    """Write the configuration and its rules to `folder`; return the configuration's path.

    Prometheus scrapes what `discovery` lists or, without it, `targets`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rules in RULES:
        (folder / rules.name).write_text(rules.read_text())
    found = (
        {"static_configs": [{"targets": list(targets)}]}
        if discovery is None
        else {"file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "10s"}]}
    )
    content = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [rules.name for rules in RULES],
        "scrape_configs": [{"job_name": "ray", **found}],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(content, indent=2) + "\n")  # JSON is YAML
    return path


def command(program: Path, configuration: Path, port: int) -> list[str]:
    return [
        str(program),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={configuration.parent / 'data'}",
        "--storage.tsdb.retention.time=30d",
        f"--web.listen-address={HOST}:{port}",
    ]


@contextmanager
def monitoring(
    program: Path,
    configuration: Path,
    port: int = PORT,
    ready_timeout_s: float = READY_TIMEOUT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run Prometheus while the block runs; yield its address and its process.

    Waits for: it to be ready. Unblocked by: that, its end (`RunError` with what it printed), or
    `StalledError` after `ready_timeout_s`.
    """
    address, printed = f"http://{HOST}:{port}", configuration.parent / "prometheus.log"
    with printed.open("wb") as log:
        process = subprocess.Popen(
            command(program, configuration, port),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we end it
        )
    try:
        deadline = time.monotonic() + ready_timeout_s
        while not _is_ready(address):
            if (code := process.poll()) is not None:
                raise RunError(
                    f"{program} ended with code {code} before it was ready; {printed} ends with: "
                    f"{_last_lines(printed)}. If the port is taken, give --port another one"
                )
            if time.monotonic() >= deadline:
                raise StalledError(
                    f"{program} was not ready at {address} after {ready_timeout_s:g} s; {printed} "
                    f"ends with: {_last_lines(printed)}"
                )
            sleep(0.1)
        if process.poll() is not None:  # another Prometheus has the port, and answered
            raise RunError(
                f"{address} is taken by another Prometheus. Give --port another one, or look there"
            )
        yield address, process
    finally:
        _end(process)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/-/ready", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _last_lines(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-3:]
    return " / ".join(line.strip() for line in lines) or "nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End Prometheus, which writes what it holds. Kill it when it does not end."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)
