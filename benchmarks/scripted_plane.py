"""The control plane of a run, with workers that are scripted: no Ray process, no engine, no tensors.

Real: `Pipeline`, `WorkerPool` with its supervision and health checks, `RayGeneration` and `RayScoring`
with retries and the watch for stragglers, `RayBuffer` and the service behind it with gate and buffer,
`WeightSync`, and `RunObserver` with metrics.jsonl, status.json and the advisor.

Scripted: what lies behind a call of Ray. A worker answers a group after `seconds_of(ticket)`, as many
groups at once as it is given; the learner and a pull answer at once. What Ray itself costs (pickling,
sockets, its scheduler) is not in it; the buffer, a process of its own in a run, is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actors.drivers.rl_observer import RunObserver
from actors.services.buffer_actor import PATIENCE_S, RayBuffer
from actors.services.generation_client import (
    RayGeneration,
    check_health,
)
from actors.services.scoring_client import RayScoring
from actors.services.start_services import SCORING_CALLS
from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.generation.engine import LoadedWeights
from rlhf_cluster.pipeline import Pipeline
from rlhf_cluster.records import (
    GroupSummary,
    Prompt,
    Sampling,
    StepReport,
    Ticket,
    TrainingGroup,
    WeightVersion,
)
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from rlhf_cluster.weights.sync import WeightSync

GROUP_SIZE = 8
NUM_TOKENS = 400  # of a group


def no_wait(ticket: Ticket) -> float:
    return 0.0


def plane_config(
    folder: Path, num_steps: int, groups_per_step: int, quarantine: dict[str, Any]
) -> RunConfig:
    tree = {
        "run": {
            "name": "control-plane",
            "root": str(folder),
            "steps": num_steps,
            "groups_per_step": groups_per_step,
        },
        "model": {"init": {"hidden_size": 128, "num_layers": 1, "num_heads": 4}},
        "data": {"task": "sort_digits", "max_prompt_tokens": 8},
        "algorithm": {"type": "grpo", "group_size": GROUP_SIZE},
        "generation": {"max_response_tokens": 50, "quarantine": quarantine},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {"learning_rate": 1e-6},
        "staleness": {"max_staleness": 2, "pipeline_depth": 2},
    }
    return validate(RunConfig, tree, source="the control plane's benchmark")


class Reference:
    """What a call gives at once; `future` is what the caller waits for."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def answer(self, value: Any) -> Reference:
        if not self._future.done():
            self._future.set_result(value)
        return self


def _answer_after(seconds: float, reference: Reference, value: Any) -> None:
    if seconds:
        asyncio.get_running_loop().call_later(seconds, reference.answer, value)
    else:
        reference.answer(value)


class Method:
    """`actor.method.remote(...)`, and with options."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> Method:
        return self


class ScriptedWorker:
    """A generation worker and a scoring worker in one. A group's handle is (ticket, version)."""

    def __init__(self, seconds_of: Callable[[Ticket], float], asked: Callable[[], None]) -> None:
        self._seconds_of, self._asked = seconds_of, asked
        self._version = -1
        self.generate, self.score = Method(self._generate), Method(self._score)
        self.pull, self.health = Method(self._pull), Method(lambda: Reference().answer({}))

    def _generate(self, ticket: Ticket, *_: Any) -> tuple[Reference, Any]:
        self._asked()
        reference, seconds = Reference(), self._seconds_of(ticket)
        meta = {"num_tokens": NUM_TOKENS, "num_unfinished": 0, "generate_s": 1.0, "queued": False}
        _answer_after(seconds, reference, meta)
        return reference, (ticket, self._version)

    def _score(self, group: tuple[Ticket, int]) -> tuple[Reference, Any]:
        ticket, version = group
        rewards = tuple(float((ticket.number + i) % 2) for i in range(GROUP_SIZE))
        summary = GroupSummary(
            group_id=ticket.group_id,
            oldest_version=version,
            num_rollouts=GROUP_SIZE,
            num_tokens=NUM_TOKENS,
            rewards=rewards,
            parts={"exact_match": 0.5},
            longest_tokens=NUM_TOKENS // GROUP_SIZE,
            num_stopped=GROUP_SIZE,
        )
        reference = Reference()
        _answer_after(self._seconds_of(ticket) / 10, reference, summary)
        return reference, group

    def _pull(self, version: WeightVersion) -> Reference:
        self._version = version.version
        loaded = LoadedWeights(
            version=version.version,
            digest=version.digest,
            num_tensors=version.num_tensors,
            pause_s=0.0,
        )
        return Reference().answer(loaded)


class BufferProcess:
    """The buffer's service as an actor: each call is a task on this loop."""

    def __init__(self, service: BufferService) -> None:
        self._service = service

    def __getattr__(self, method: str) -> Method:
        def call(*arguments: Any) -> Reference:
            reference = Reference()

            async def run() -> None:
                reference.answer(await getattr(self._service, method)(*arguments))

            task = asyncio.get_running_loop().create_task(run())
            task.add_done_callback(lambda done: done.cancelled() or done.result())
            return reference

        return Method(call)


class ScriptedLearner:
    def __init__(self) -> None:
        self.version = 0

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        ages = [self.version - group.summary.oldest_version for group in groups]
        self.version += 1
        metrics = {"staleness/mean": float(np.mean(ages)), "staleness/max": float(max(ages))}
        return StepReport(step=self.version, metrics=metrics)

    async def snapshot(self) -> int:
        return self.version

    async def publish(self) -> WeightVersion:
        number = self.version
        return WeightVersion(
            version=number, path=f"v{number}", digest=f"d{number}", num_tensors=2, num_bytes=8
        )

    async def refused(self, version: int, reason: str) -> None:
        raise AssertionError(f"version {version} was refused: {reason}")


class ScriptedPrompts:
    def __init__(self) -> None:
        self._cursor = 0

    def seek(self, cursor: int) -> None:
        self._cursor = cursor

    def next(self) -> Prompt:
        ids = np.array([1, 2, 3], dtype=np.int32)
        return Prompt(prompt_id=f"p{self._cursor}", token_ids=ids, source="scripted")


def _pool(
    kind: str, launch: Callable[[str], ScriptedWorker], max_in_flight: int | None
) -> WorkerPool:
    async def launched(name: str) -> Worker:
        return Worker(name=name, actor=launch(name), placement=None)

    async def check(worker: Worker) -> None:
        await check_health(worker, 60.0)

    limits = PoolLimits(max_in_flight=max_in_flight)
    return WorkerPool(kind=kind, launch=launched, retire=lambda w: None, check=check, limits=limits)


@asynccontextmanager
async def control_plane(
    folder: Path,
    num_workers: int,
    num_steps: int,
    groups_per_step: int,
    seconds_of: Callable[[Ticket], float] = no_wait,
    quarantine: dict[str, Any] | None = None,
    told: Callable[[str], None] = lambda name: None,
) -> AsyncIterator[tuple[Pipeline, ScriptedLearner]]:
    """A run with `num_workers` in each pool, ready to be run. `folder` gets its run directory.

    `quarantine` are its settings; `told` hears the name of a generation worker that is asked for a
    group.
    """
    config = plane_config(folder, num_steps, groups_per_step, quarantine or {})
    rundir = RunDir.create(config.run_dir, config)

    def start(name: str) -> ScriptedWorker:
        return ScriptedWorker(seconds_of, lambda: told(name))

    pools = (_pool("generation", start, None), _pool("scoring", start, SCORING_CALLS))
    generation = RayGeneration(pools[0], config.generation, config.pull_deadline_s)
    scoring = RayScoring({"scoring": pools[1]}, config)
    held = ExperienceBuffer(build_gate(config))
    service = BufferService(held, config.run.stall_timeout_s, PATIENCE_S, time.monotonic)
    buffer, learner = RayBuffer(BufferProcess(service)), ScriptedLearner()
    sync = WeightSync(learner, generation, buffer, 1, time.monotonic)
    observer = RunObserver(
        config, rundir, pools, lambda: sync.stats, lambda snapshot: None, time.time()
    )
    for pool in pools:
        await pool.start(num_workers)
    watches = [asyncio.create_task(pool.supervise()) for pool in pools]
    await sync.after_step(0)
    await sync.drain(60)
    try:
        yield (
            Pipeline(
                generation=generation,
                scoring=scoring,
                buffer=buffer,
                learner=learner,
                sync=sync,
                prompts=ScriptedPrompts(),
                observer=observer,
                sampling=Sampling(num_samples=GROUP_SIZE, temperature=1.0, max_tokens=50),
                num_steps=num_steps,
                groups_per_step=groups_per_step,
                max_error_rate=0.5,
                live_timeout_s=60,
                num_workers=observer.num_workers,
            ),
            learner,
        )
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for pool in pools:
            pool.close()
        observer.close()
        rundir.close()
