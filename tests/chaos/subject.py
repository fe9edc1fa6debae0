"""A run that is to survive: one command, repeated on the same directory each time its process ends.

The engine is scripted: slow while it is attacked, so that there are moments to hit, and fast once it is
left in peace. A real engine is as fast as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from tests.chaos.checker import Asked
from tests.chaos.processes import Process, marked, of_pid
from tests.support.builders.run_configs import tiny_tree
from tests.support.engines.scripted_engine import write_script

REPOSITORY = Path(__file__).parents[2]
ENGINES = {
    "scripted": "tests.support.engines.scripted_engine:make_engine",
    "vllm": "actors.vllm.vllm_engine:make_engine",
}
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"learner": {"lora": {"rank": 4, "alpha": 8.0}}},
    "moving reference": {
        "algorithm": {"kl_coef": 0.01},
        "scoring": {
            "reference": True,
            "reference_update": {"type": "ema", "every": 2, "decay": 0.9},
        },
    },
    "copies": {},  # checkpoint.copy_to, a folder beside the run's
}
"""Parts of the product that a run has besides, as keys by section."""
GENERATE_DELAY_S = 0.5
POLL_S = 0.02
GONE_WITHIN_S = 60.0


class Stuck(Exception):
    """The run did not do within a deadline what it has to."""


@dataclass(slots=True, kw_only=True)
class Subject:
    """`start` begins it; `restarts` counts how often the command was repeated, each after `ends`."""

    folder: Path  # of this run alone: a word that marks its processes
    address: str
    steps: int
    engine: str = "scripted"
    ranks: int = 1
    parallel: int = 1  # parts of an engine, each a process of its own when there are several
    groups_per_step: int = 4
    group_size: int = 4
    max_staleness: int = 1
    name: str = "chaos"
    features: tuple[str, ...] = ()  # of FEATURES
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of single keys, by section
    ends: list[str] = field(default_factory=list)
    seen: set[Process] = field(default_factory=set)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def mirror(self) -> Path:
        """Where the machine's copies of the versions are while the run goes."""
        return self.folder.with_name(f"{self.folder.name}-mirror")

    @property
    def copies(self) -> Path | None:
        """Folder of the second copies of the run's checkpoints; None without the feature."""
        outside = self.folder.with_name(f"{self.folder.name}-copies")
        return outside if "copies" in self.features else None

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def asked(self) -> Asked:
        replay = self.changes.get("buffer", {}).get("replay") or {"fraction": 0, "max_uses": 1}
        return Asked(
            steps=self.steps,
            groups_per_step=self.groups_per_step,
            group_size=self.group_size,
            max_staleness=self.max_staleness,
            replayed=round(replay["fraction"] * self.groups_per_step),
            max_uses=replay["max_uses"],
        )

    @property
    def driver(self) -> Process | None:
        return None if self._process is None else of_pid(self._process.pid)

    def start(self) -> None:
        config = self.folder / "run.toml"
        config.write_text(tomli_w.dumps(self._tree()), encoding="utf-8")
        environment = {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{self.folder}",
            "OMP_NUM_THREADS": "1",
        }
        command = ["-m", "tests.support.engines.run_with_engine", str(config), ENGINES[self.engine]]
        with self.output.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def _tree(self) -> dict[str, Any]:
        generation: dict[str, Any] = {
            "workers": 2 if self.engine == "scripted" else 1,
            "tensor_parallel_size": self.parallel,
        }
        sections: dict[str, dict[str, Any]] = {
            "run": {
                "name": self.name,
                "root": str(self.folder),
                "steps": self.steps,
                "groups_per_step": self.groups_per_step,
            },
            "algorithm": {"type": "grpo", "group_size": self.group_size},
            "generation": generation,
            "learner": {"ranks": self.ranks, "step_timeout_s": 60.0},
            "staleness": {"max_staleness": self.max_staleness},
            "checkpoint": {"every": 2},
            "cluster": {"heartbeat_s": 1.0, "max_restarts": 50},
            "observe": {"live": False, "samples_per_step": 100_000},
            "weights": {"mirror": str(self.mirror)},
        }
        for more in (*(FEATURES[name] for name in self.features), self.changes):
            for name, keys in more.items():
                sections[name] = {**sections.get(name, {}), **keys}
        if self.copies is not None:
            sections["checkpoint"]["copy_to"] = self.copies.as_uri()
        return tiny_tree(**sections)

    def remove(self) -> None:
        """Delete all that the run left."""
        for folder in (self.folder, self.mirror, self.copies):
            if folder is not None:
                shutil.rmtree(folder)

    def slow(self, generate_delay_s: float) -> None:
        """From now on a group takes as long. Waits for: the model's folder."""
        if self.engine == "scripted":
            tokenizer = self.path / "model" / "tokenizer.json"
            self.wait(tokenizer.exists, "the run made its model", 120)
            write_script(self.path / "model", generate_delay_s=generate_delay_s)

    def ended(self) -> int | None:
        """The exit status, once the process is gone."""
        return None if self._process is None else self._process.poll()

    def repeat(self) -> None:
        """The same command again, after its process ended."""
        code = self.ended()
        assert code is not None
        self.ends.append(f"ended with {code}" + (f": {self.last_line()}" if code > 0 else ""))
        self.start()

    def last_line(self) -> str:
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["no output"])[-1]

    def status(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def wait(
        self, condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = POLL_S
    ) -> Any:
        """The first true value of `condition`. Raises `Stuck`, also when the process ended before."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if self.ended() is not None:
                raise Stuck(f"the run ended before: {what}; {self.last_line()}")
            if time.monotonic() > deadline:
                raise Stuck(f"not within {timeout_s:g} s: {what}; {self.last_line()}")
            time.sleep(every_s)
        return value

    def processes(self) -> set[Process]:
        """All of the run that is alive, the driver included."""
        return marked(str(self.folder)) | {process for process in self.seen if process.alive()}

    def remains(self, timeout_s: float = GONE_WITHIN_S) -> dict[int, str]:
        """Processes that outlive the run by `timeout_s`, with their commands."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return {process.pid: process.command() for process in left}

    def end(self) -> None:
        """Kill the driver, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)
