"""A cluster of hundreds of generation workers, in virtual time.

The product's own `Pipeline`, `WeightSync`, `WorkerPool`, `RayGeneration`, `PoolVersion`, buffer,
`Mirror` and `RelayPlan` decide everything. Simulated are what they decide about: nodes, worker
processes, the learner, and a network in which every link is shared evenly by the transfers on it.
Nothing here waits for real time; run it on a `JumpingLoop`.

    storage --(streams)--> a few nodes --> the other nodes --> each node's memory --> its readers
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from actors.cluster.calls import answer
from actors.services.generation_client import RayGeneration
from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import PlacementError, RlhfError, StalledError, WeightError, WorkerError
from rlhf_cluster.generation.generation_worker import BRING_SHARE
from rlhf_cluster.pipeline import Pipeline
from rlhf_cluster.records import (
    GroupSummary,
    Handle,
    Sampling,
    StepReport,
    WeightVersion,
)
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from rlhf_cluster.weights.sync import WeightSync
from rlhf_cluster.weights.transports.node_mirror import PARALLEL, Mirror
from rlhf_cluster.weights.transports.relay_plan import RelayPlan
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import (
    FakeLearner,
    FakeObserver,
    FakePrompts,
)
from tests.support.simulation.simulated_mirror import (
    ROOT,
    NodeState,
    SimulatedCarrier,
    SimulatedCopies,
    Storage,
    manifest_of,
)
from tests.support.simulation.simulated_network import Link, Network

GB = 1e9
PROCESS_S, HEALTH_S = 30.0, 10.0  # a worker's process up to its first read of the model; an answer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is simulated. Rates are bytes a second, times seconds. A worker starts from a model of
    `num_bytes`, which its node reads from the storage once."""

    nodes: int = 56
    workers_per_node: int = 8
    files: int = 70
    num_bytes: float = 140 * GB
    storage: float = 10 * GB
    stream: float = 5 * GB  # one connection or read
    nic: float = 25 * GB
    reader: float = 25 * GB  # from a node's memory to a GPU
    memory: float = 200 * GB
    relay: bool = True
    start_timeout_s: float = 3600.0
    steps: int = 6
    groups_per_step: int = 448
    train_s: float = 240.0
    group_s: float = 120.0  # the median; some take four times as long
    max_staleness: int = 2
    generation: dict[str, Any] = field(default_factory=dict)


class _Call:
    """What a call returns, as a `ray.ObjectRef` is asked for it."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def end(self, found: Any = None, error: Exception | None = None) -> None:
        if self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(found)


class _Method:
    def __init__(self, work: Callable[..., Coroutine[Any, Any, Any]], actor: Actor) -> None:
        self._work, self._actor = work, actor

    def options(self, **options: Any) -> _Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._actor.begin(self._work(*arguments))


class Actor:
    """A generation worker's process on a node."""

    def __init__(self, name: str, node: NodeState, cluster: SimulatedCluster) -> None:
        self.name, self.node, self.cluster = name, node, cluster
        self.version, self.is_alive = -1, True
        self._open: dict[asyncio.Task[None], _Call | None] = {}
        self.carrier = SimulatedCarrier(node, cluster.storage, self._spawn)
        self.mirror = Mirror(name, cluster.plan, SimulatedCopies(node), self.carrier)
        self.generate = _Pair(self._generate, self)
        self.pull = _Method(self._pull, self)
        self.health = _Method(self._health, self)

    def begin(self, work: Coroutine[Any, Any, Any]) -> _Call:
        call = _Call()
        if not self.is_alive:
            work.close()
            call.end(error=RayActorError())
            return call
        self._spawn(self._end(call, work), call)
        return call

    def _spawn(
        self, work: Coroutine[Any, Any, None], call: _Call | None = None
    ) -> asyncio.Task[None]:
        """Work of this process, whose error is for who waits for it, if anybody does."""
        task = asyncio.get_running_loop().create_task(work)
        self._open[task] = call

        def ended(task: asyncio.Task[None]) -> None:
            self._open.pop(task, None)
            if not task.cancelled():
                task.exception()

        task.add_done_callback(ended)
        return task

    def kill(self) -> None:
        """The process is gone, with all that it did."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.node.room += 1
        self.carrier.close()
        for task, call in list(self._open.items()):
            task.cancel()
            if call is not None:
                call.end(error=RayActorError())

    async def _end(self, call: _Call, work: Coroutine[Any, Any, Any]) -> None:
        try:
            call.end(await work)
        except RlhfError as error:
            call.end(error=RayTaskError("method", "its stack", error))

    async def _health(self) -> None:
        return None

    async def _generate(self, ticket: Any, prompt: Any, sampling: Any, partial: Any) -> Any:
        version, took_s = self.version, self.cluster.duration(ticket.number)
        self.cluster.sampled[ticket.number] = version
        if version < ticket.version:
            text = f"{self.name} at {version} began group {ticket.number} of {ticket.version}"
            self.cluster.outcome.stale_starts.append(text)
        try:
            async with asyncio.timeout(self.cluster.config.generation.request_timeout_s):
                await asyncio.sleep(took_s)
        except TimeoutError:
            raise StalledError(f"{self.name}: group {ticket.number} not finished") from None
        return {"num_tokens": 100, "queued": 0, "num_unfinished": 0, "generate_s": took_s}

    async def _pull(self, version: WeightVersion) -> WeightVersion:
        """As `GenerationWorker.pull`, deadline by deadline."""
        cluster = self.cluster
        limit_s = cluster.config.generation.take_deadline_s(version.num_bytes)
        here = version
        if cluster.shape.relay:
            what = f"{self.name}: bringing version {version.version} to {self.node.name}"
            deadline = Deadline(what, BRING_SHARE * limit_s, cluster.loop.time)
            try:
                here = await self.mirror.bringing(version, deadline)
            except TimeoutError as error:
                raise WeightError(str(error)) from error
        try:
            async with asyncio.timeout(limit_s):
                await self._read(here)
        except TimeoutError:
            raise StalledError(f"{self.name}: version {version.version} not read") from None
        self.version = version.version
        return version

    async def _read(self, version: WeightVersion) -> None:
        cluster, reader = self.cluster, Link(self.cluster.shape.reader)
        if version.path.startswith(ROOT):
            cluster.storage.given += version.num_bytes
            links = (cluster.storage.out, self.node.down, reader)
        else:
            links = (self.node.memory, reader)
        await cluster.network.move(version.num_bytes, *links)


class _Pair(_Method):
    """A method with two results: its summary, and the record, which stays where it is."""

    def remote(self, *arguments: Any) -> Any:
        return super().remote(*arguments), arguments[0]


class _Learner(FakeLearner):
    """Trains and publishes at the speed of the storage."""

    cluster: SimulatedCluster

    async def snapshot(self) -> int:
        self.cluster.published_s = self.cluster.loop.time()
        return await super().snapshot()

    async def publish(self) -> WeightVersion:
        number, cluster = self.snapshot_version, self.cluster
        shape = cluster.shape
        await cluster.network.move(shape.num_bytes, cluster.storage.into)
        manifest = manifest_of(number, shape.files, shape.num_bytes)
        cluster.storage.publish(manifest)
        return WeightVersion(
            version=number,
            path=f"{ROOT}/v{number}",
            digest=manifest.digest,
            num_tensors=1,
            num_bytes=int(shape.num_bytes),
        )


class _Scoring:
    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster

    async def score(self, group: Any) -> tuple[Handle, GroupSummary]:
        await asyncio.sleep(1.0)
        return group, GroupSummary(
            group_id=group.group_id,
            oldest_version=self._cluster.sampled[group.number],
            num_rollouts=8,
            num_tokens=800,
            rewards=(0.0, 1.0),
        )


class _Observer(FakeObserver):
    after: Callable[[int], None] = lambda step: None

    def step(self, report: StepReport, taken: Any, times: Any) -> None:
        super().step(report, taken, times)
        self.after(report.step)


@dataclass
class Outcome:
    """What a scenario has shown. `live_s`: from the end of a step to its version live, of each version
    that was published."""

    ended: str = ""  # the error that ended the run
    steps: int = 0
    healthy_killed: int = 0
    started: int = 0
    behind: int = 0
    most_behind: int = 0
    live_at_end: int = 0
    refused: int = 0  # publishes
    stale_starts: list[str] = field(default_factory=list)
    """Groups that a worker began with older weights than those that admitted them."""
    staleness: list[int] = field(default_factory=list)  # of each group, when it was trained
    told: list[str] = field(default_factory=list)
    live_s: list[float] = field(default_factory=list)
    started_s: float = 0.0  # until the pool had enough workers
    storage_bytes: float = 0.0  # read of versions
    versions_held: float = 0.0  # in the memory of a node at one moment, the most of all nodes
    took_s: float = 0.0


class SimulatedCluster:
    """Call `run` on a `JumpingLoop`, with what shall happen in `events`."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.outcome = shape, Outcome()
        self.loop = asyncio.get_running_loop()
        self.config = tiny_config(
            run={"start_timeout_s": shape.start_timeout_s},
            weights={"mirror": "/dev/shm"} if shape.relay else {},
            generation=shape.generation,
        )
        self.network = Network()
        links = Link(shape.storage), Link(shape.storage)
        self.storage = Storage(self.network, *links, shape.stream, self.loop.time)
        self.nodes = [
            NodeState(
                f"node-{number}",
                *(Link(shape.nic), Link(shape.nic), Link(shape.memory)),
                shape.workers_per_node,
            )
            for number in range(shape.nodes)
        ]
        self.plan = RelayPlan(
            streams=self.config.weights.mirror_streams, uploads=PARALLEL, clock=self.loop.time
        )
        self.sampled: dict[int, int] = {}
        self.published_s = 0.0
        self.sync: WeightSync | None = None
        self.learner: Any = _Learner(step_delay_s=shape.train_s)
        self.actors: dict[str, Actor] = {}
        self.pool = WorkerPool(
            kind="generation",
            launch=self._launch,
            retire=self._retire,
            check=self._check,
            limits=PoolLimits(heartbeat_s=30.0, max_in_flight=4),
            restarts=RestartWindow(clock=self.loop.time),
            tell=self.outcome.told.append,
        )
        self.client = RayGeneration(self.pool, self.config.generation, self.config.pull_deadline_s)
        self.observer = _Observer()

    def duration(self, number: int) -> float:
        return min(4.0, random.Random(number).lognormvariate(0.0, 0.5)) * self.shape.group_s

    # Workers

    async def _launch(self, name: str) -> Worker:
        node = max((n for n in self.nodes if n.is_alive), key=lambda n: n.room, default=None)
        if node is None or not node.room:
            raise PlacementError(f"{name}: no node has room")
        node.room -= 1
        actor = self.actors[name] = Actor(name, node, self)
        self.outcome.started += 1
        try:
            await self._start(name, node)
            worker = Worker(name=name, actor=actor, placement=node)
            await self.client.join(worker)
        except BaseException:
            actor.kill()
            raise
        return worker

    async def _start(self, name: str, node: NodeState) -> None:
        """Waits for: the process; the model, which the node's first worker reads from the storage, and
        the others find in its memory."""
        shape, limit_s = self.shape, self.config.run.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.sleep(limit_s + 1.0 if node.hangs else PROCESS_S)
                async with node.loading:
                    if not node.has_model:
                        links = (self.storage.out, node.down, Link(shape.stream))
                        await self.network.move(shape.num_bytes, *links)
                        node.has_model = True
                await self.network.move(shape.num_bytes, node.memory, Link(shape.reader))
        except TimeoutError:
            raise WorkerError(f"{name} was not up within {limit_s:g} s on {node.name}") from None

    def _retire(self, worker: Worker) -> None:
        actor = worker.actor
        if actor.is_alive:
            self.outcome.healthy_killed += 1
        actor.kill()

    async def _check(self, worker: Worker) -> None:
        await answer(worker.actor.health.remote(), HEALTH_S, f"{worker.name}.health")

    # What happens

    def lose_nodes(self, *numbers: int) -> None:
        for number in numbers:
            node = self.nodes[number]
            node.is_alive = False
            node.up.bytes_per_s = node.down.bytes_per_s = 0.0
            for actor in self.actors.values():
                if actor.node is node:
                    actor.kill()
        self.network.changed()

    def lose_workers(self, count: int) -> None:
        """As many, of those that serve, at the same moment."""
        for worker in self.pool.live[:count]:
            worker.actor.kill()

    def stall_storage(self, seconds: float) -> None:
        self._set_storage(0.0)
        self.loop.call_later(seconds, self._set_storage, self.shape.storage)

    def slow_network(self, seconds: float, share: float) -> None:
        """Between the nodes; what the storage gives comes another way, as it often does."""
        for node in self.nodes:
            node.up.bytes_per_s = share * self.shape.nic
        self.network.changed()
        if share < 1.0:
            self.loop.call_later(seconds, self.slow_network, 0.0, 1.0)

    def slow_links(self, seconds: float, share: float) -> None:
        """All of them, those of the storage too."""
        self.slow_network(seconds, share)
        self._set_storage(share * self.shape.storage)
        for node in self.nodes:
            node.down.bytes_per_s = share * self.shape.nic
        if share < 1.0:
            self.loop.call_later(seconds, self.slow_links, 0.0, 1.0)

    def _set_storage(self, bytes_per_s: float) -> None:
        self.storage.into.bytes_per_s = self.storage.out.bytes_per_s = bytes_per_s
        self.network.changed()

    # The run

    async def run(
        self, events: Callable[[SimulatedCluster, int], None] = lambda cluster, step: None
    ) -> Outcome:
        """`events` is called after every step, and with 0 before the first."""
        shape, outcome = self.shape, self.outcome
        began = self.loop.time()
        supervising = None
        try:
            events(self, 0)
            await self.pool.start(shape.nodes * shape.workers_per_node)
            outcome.started_s = self.loop.time() - began
            supervising = self.loop.create_task(self.pool.supervise())
            pipeline = await self._pipeline()
            self.observer.after = lambda step: self._stepped(events, step)
            outcome.steps = await pipeline.run()
        except RlhfError as error:
            outcome.ended = f"{type(error).__name__}: {error}"
        if supervising is not None:
            supervising.cancel()
            with suppress(asyncio.CancelledError):
                await supervising
        outcome.refused = self.sync.stats.refused if self.sync is not None else 0
        outcome.staleness = [age for _, _, age in self.learner.trained]
        outcome.took_s = self.loop.time() - began
        outcome.storage_bytes = self.storage.given
        outcome.versions_held = max(node.most_held for node in self.nodes) / shape.num_bytes
        outcome.live_at_end, outcome.behind = self.pool.num_live, self.pool.num_behind
        return outcome

    def _stepped(self, events: Callable[[SimulatedCluster, int], None], step: int) -> None:
        self.outcome.most_behind = max(self.outcome.most_behind, self.pool.num_behind)
        events(self, step)

    async def _pipeline(self) -> Pipeline:
        shape, clock = self.shape, self.loop.time
        gate = AdmissionGate(
            max_staleness=shape.max_staleness,
            pipeline_depth=shape.max_staleness,
            groups_per_step=shape.groups_per_step,
            num_steps=shape.steps,
        )
        buffer = BufferService(ExperienceBuffer(gate), 7200.0, 0.5, clock)
        learner = self.learner
        learner.cluster = self
        sync = WeightSync(learner, self.client, buffer, 1, clock, self._went_live)
        self.sync = sync
        await sync.publish_last(0, 7200.0)
        return Pipeline(
            generation=self.client,
            scoring=_Scoring(self),
            buffer=buffer,
            learner=learner,
            sync=sync,
            prompts=FakePrompts(),
            observer=self.observer,
            sampling=Sampling(num_samples=8, temperature=1.0, max_tokens=100),
            num_steps=shape.steps,
            groups_per_step=shape.groups_per_step,
            max_error_rate=0.1,
            live_timeout_s=7200.0,
            clock=clock,
        )

    async def _went_live(self, version: WeightVersion) -> None:
        self.outcome.live_s.append(self.loop.time() - self.published_s)
