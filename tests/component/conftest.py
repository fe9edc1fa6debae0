"""Component tests: a real local Ray cluster, real services, a scripted engine.

One cluster serves the whole test session. A run is a process of its own, as for a user; the test
watches its run directory and does to it what it has to survive.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from actors.cluster.calls import NAMESPACE
from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from tests.support.builders.offline_stages import stage_tree
from tests.support.builders.run_configs import tiny_config, tiny_tree
from tests.support.engines.scripted_engine import write_script
from tests.support.processes.free_ports import free_ports

REPOSITORY = Path(__file__).parents[2]
SCRIPTED = "tests.support.engines.scripted_engine:make_engine"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A test that adds nodes removes them."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 8,
            "object_store_memory": 256 << 20,
            "dashboard_port": free_ports(1)[0],  # Ray's own may be another cluster's
        },
    )
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Cluster) -> str:
    return ray_cluster.address


@dataclass
class RunProcess:
    """A run started by a test, and what can be read of it from outside."""

    path: Path
    process: subprocess.Popen[str]
    output_path: Path

    def wait_for(
        self, condition: Callable[[Snapshot], Any], what: str, timeout_s: float = 120.0
    ) -> Snapshot:
        """The first status for which `condition` holds. Fails when the run ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = RunDir.open(self.path).read_status() if self.ready() else None
            if status is not None and condition(status):
                return status
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended before: {what}\n{self.output()}")
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"not within {timeout_s} s: {what}\n{self.output()}")

    def script(self, **script: Any) -> None:
        """Steer the run's engines from now on (tests/support/engines/scripted_engine.py). Waits for:
        the model."""
        deadline = time.monotonic() + 240
        folder = model_beside(self.path)
        if not folder.exists():
            folder = self.path / "model"
        while not (folder / "tokenizer.json").exists():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, "the run made no model"
            time.sleep(0.02)
        write_script(folder, **script)

    def ready(self) -> bool:
        return (self.path / "run.lock").exists()

    def finish(self, timeout_s: float = 180.0) -> tuple[int, str]:
        """Exit code and everything printed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s\n{self.output()}") from None
        return self.process.returncode, self.output()

    def output(self) -> str:
        return self.output_path.read_text()

    def trained(self) -> list[tuple[str, str, str]]:
        """(group, prompt, response ids) of every rollout in the samples, with repetitions."""
        rows = [row for p in (self.path / "samples").glob("*.parquet") for row in read_samples(p)]
        return sorted((r["group_id"], r["prompt_id"], str(r["response_ids"])) for r in rows)

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the tiny configuration would make for itself, which takes it seconds."""
    config = tiny_config()
    assert config.model.init is not None
    folder = tmp_path_factory.mktemp("model") / "made"
    return make_model(config.model.init, folder, config.run.seed)


@pytest.fixture
def start_run(
    ray_address: str, tmp_path: Path, tiny_model: Path
) -> Iterator[Callable[..., RunProcess]]:
    """Start a run of the tiny configuration on the session's cluster, with its own model folder."""

    def tree(**sections: dict[str, Any]) -> dict[str, Any]:
        found = tiny_tree(**sections)
        if "model" not in sections:
            folder = model_beside(tmp_path / found["run"]["name"])
            if not folder.exists():
                shutil.copytree(tiny_model, folder)
            found["model"] = {"path": str(folder)}
        return found

    yield from starting(
        ray_address, tmp_path, tree, "tests.support.engines.run_with_engine", SCRIPTED
    )


def model_beside(run: Path) -> Path:
    return run.with_name(f"{run.name}-model")


@pytest.fixture
def start_stage(ray_address: str, tmp_path: Path) -> Iterator[Callable[..., RunProcess]]:
    """Start an offline stage on the session's cluster, by the command line."""
    yield from starting(ray_address, tmp_path, stage_tree, "rlhf_cluster.cli", before=("run",))


def starting(
    ray_address: str,
    tmp_path: Path,
    tree: Callable[..., dict[str, Any]],
    module: str,
    *after: str,
    before: tuple[str, ...] = (),
) -> Iterator[Callable[..., RunProcess]]:
    """What starts `module` with a run file of `tree`, given sections; all that it started ends with
    it."""
    started: list[RunProcess] = []

    def start(**sections: dict[str, Any]) -> RunProcess:
        name = f"run-{os.getpid()}-{tmp_path.name[-20:]}-{len(started)}".replace("_", "-")
        name = sections.get("run", {}).get("name", name)
        sections["run"] = {"root": str(tmp_path), **sections.get("run", {}), "name": name}
        sections.setdefault("observe", {"live": False})
        config = tmp_path / f"{name}-{len(started)}.toml"
        config.write_text(tomli_w.dumps(tree(**sections)))
        environment = {
            **os.environ,
            "RAY_ADDRESS": ray_address,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
            "OMP_NUM_THREADS": "1",
        }
        output = tmp_path / f"{name}-{len(started)}.out"
        with output.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *before, str(config), *after],
                cwd=REPOSITORY,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        run = RunProcess(path=tmp_path / name, process=process, output_path=output)
        started.append(run)
        return run

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait(10)


@pytest.fixture
def start_serving(
    tmp_path: Path,
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start a command of `rlhf-cluster`, and wait for the address that it prints first."""
    started = []

    def run(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        output = tmp_path / f"output-{len(started)}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_cluster.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        started.append(process)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\S+", output.read_text())):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        return process, found[0]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(30)
