"""A cluster of hundreds of generation workers, in virtual time.

The product's own `Pipeline`, `WeightSync`, `WorkerPool`, `RayGeneration`, `PoolVersion`, buffer and
`RelayPlan` decide everything. Simulated are what they decide about: nodes, worker processes, the
learner, and a network in which every link is shared evenly by the transfers on it. Nothing here waits
for real time; run it on a `JumpingLoop`.

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
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import PlacementError, RlhfError, StalledError, WorkerError
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
from rlhf_cluster.weights.transports.node_mirror import PARALLEL, blamed
from rlhf_cluster.weights.transports.relay_plan import (
    Assignment,
    Piece,
    RelayPlan,
)
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import (
    FakeLearner,
    FakeObserver,
    FakePrompts,
    LocalBuffer,
)

GB = 1e9
START_S, HANG_S, HEALTH_S = 90.0, 600.0, 10.0
ASK_S, POLL_S = 0.0005, (0.01, 0.5)  # a call of the planner, and how soon it is asked again


@dataclass(eq=False)
class Link:
    bytes_per_s: float
    used: int = 0


@dataclass(eq=False)
class _Flow:
    left: float
    links: tuple[Link, ...]
    ended: asyncio.Future[None]
    rate: float = 0.0


class Network:
    """Transfers, each at the smallest of its even shares of the links that it takes."""

    def __init__(self) -> None:
        self._flows: dict[_Flow, None] = {}
        self._then = 0.0
        self._timer: asyncio.Handle | None = None

    async def move(self, num_bytes: float, *links: Link) -> None:
        flow = _Flow(num_bytes, links, asyncio.get_running_loop().create_future())
        self._flows[flow] = None
        self.changed()
        try:
            await flow.ended
        finally:
            if self._flows.pop(flow, flow) is None:
                self.changed()

    def changed(self) -> None:
        """Flows or links are others: look at it once all that happens now has happened."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._share)

    def _share(self) -> None:
        loop = asyncio.get_running_loop()
        now, self._timer = loop.time(), None
        passed, self._then = now - self._then, now
        for flow in list(self._flows):
            flow.left -= flow.rate * passed
            if flow.left <= 1.0:
                del self._flows[flow]
                if not flow.ended.done():
                    flow.ended.set_result(None)
        for flow in self._flows:
            for link in flow.links:
                link.used = 0
        for flow in self._flows:
            for link in flow.links:
                link.used += 1
        next_s = float("inf")
        for flow in self._flows:
            shares = (link.bytes_per_s / link.used for link in flow.links)
            flow.rate = min(shares)
            if flow.rate:
                next_s = min(next_s, flow.left / flow.rate)
        if next_s < float("inf"):
            self._timer = loop.call_later(next_s, self._share)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is simulated. Rates are bytes a second, times seconds."""

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
    steps: int = 6
    groups_per_step: int = 448
    train_s: float = 240.0
    group_s: float = 120.0  # the median; some take four times as long
    max_staleness: int = 2
    generation: dict[str, Any] = field(default_factory=dict)


class _Node:
    def __init__(self, number: int, shape: Shape) -> None:
        self.name = f"node-{number}"
        self.up, self.down = Link(shape.nic), Link(shape.nic)
        self.memory = Link(shape.memory)
        self.room, self.is_alive, self.hangs = shape.workers_per_node, True, False
        self.turn = asyncio.Lock()
        self.has: set[Piece] = set()


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

    def __init__(self, name: str, node: _Node, cluster: SimulatedCluster) -> None:
        self.name, self.node, self.cluster = name, node, cluster
        self.version, self.is_alive = -1, True
        self._open: dict[asyncio.Task[None], _Call] = {}
        self.generate = _Pair(self._generate, self)
        self.pull = _Method(self._pull, self)
        self.health = _Method(self._health, self)

    def begin(self, work: Coroutine[Any, Any, Any]) -> _Call:
        call = _Call()
        if not self.is_alive:
            work.close()
            call.end(error=RayActorError())
            return call
        task = asyncio.get_running_loop().create_task(self._end(call, work))
        self._open[task] = call
        task.add_done_callback(lambda ended: self._open.pop(ended, None))
        return call

    def kill(self) -> None:
        """The process is gone, with all that it did."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.node.room += 1
        for task, call in list(self._open.items()):
            task.cancel()
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
        limit_s = self.cluster.config.pull_deadline_s(version.num_bytes)
        try:
            async with asyncio.timeout(limit_s):
                await self.cluster.bring(self, version)
        except TimeoutError:
            raise StalledError(f"{self.name}: version {version.version} not read") from None
        self.version = version.version
        return version


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
        await cluster.network.move(shape.num_bytes, cluster.storage_in)
        return WeightVersion(
            version=number,
            path=f"/weights/v{number}",
            digest=f"d{number}",
            num_tensors=2,
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
    storage_bytes: float = 0.0
    took_s: float = 0.0


class SimulatedCluster:
    """Call `run` on a `JumpingLoop`, with what shall happen in `events`."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.outcome = shape, Outcome()
        self.loop = asyncio.get_running_loop()
        self.config = tiny_config(
            weights={"mirror": "/dev/shm"} if shape.relay else {}, generation=shape.generation
        )
        self.network = Network()
        self.storage_out, self.storage_in = Link(shape.storage), Link(shape.storage)
        self.nodes = [_Node(number, shape) for number in range(shape.nodes)]
        self.plan = RelayPlan(
            streams=self.config.weights.mirror_streams, uploads=PARALLEL, clock=self.loop.time
        )
        self._planner = asyncio.Lock()
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
        self.client = RayGeneration(self.pool, self.config)
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
            await asyncio.sleep(HANG_S if node.hangs else START_S)
            if node.hangs:
                raise WorkerError(f"{name} was not up within {HANG_S:g} s on {node.name}")
            worker = Worker(name=name, actor=actor, placement=node)
            await self.client.join(worker)
        except BaseException:
            actor.kill()
            raise
        return worker

    def _retire(self, worker: Worker) -> None:
        actor = worker.actor
        if actor.is_alive:
            self.outcome.healthy_killed += 1
        actor.kill()

    async def _check(self, worker: Worker) -> None:
        await answer(worker.actor.health.remote(), HEALTH_S, f"{worker.name}.health")

    # Weights

    async def bring(self, actor: Actor, version: WeightVersion) -> None:
        """As `weights.mirror`: one reader of the node brings, all of them read what is there."""
        node, size = actor.node, self.shape.num_bytes / self.shape.files
        reader = Link(self.shape.reader)
        if not self.shape.relay:
            self.outcome.storage_bytes += version.num_bytes
            await self.network.move(version.num_bytes, self.storage_out, node.down, reader)
            return
        async with node.turn:
            pieces = [Piece(version.version, f"shard-{n}") for n in range(self.shape.files)]
            wanted = [piece for piece in pieces if piece not in node.has]
            async with asyncio.TaskGroup() as fetching:
                for _ in range(PARALLEL):
                    fetching.create_task(self._fetch_some(actor, wanted, size))
            node.has = set(pieces)
            await self._ask(self.plan.keeps, actor.name, [version.version])
        await self.network.move(version.num_bytes, node.memory, reader)

    async def _fetch_some(self, actor: Actor, wanted: list[Piece], size: float) -> None:
        node, pause_s = actor.node, POLL_S[0]
        while wanted:
            found = await self._ask(self._next, actor.name, wanted)
            if found is None:
                await asyncio.sleep(pause_s)
                pause_s = min(POLL_S[1], 2 * pause_s)
                continue
            pause_s, piece = POLL_S[0], found.piece
            wanted.remove(piece)
            try:
                got = await self._fetched(node, found, size)
            except asyncio.CancelledError:
                if actor.is_alive:  # its own deadline has passed
                    self.plan.failed(actor.name, piece, blamed(found, is_own=True))
                raise
            if got:
                node.has.add(piece)
                await self._ask(self.plan.done, actor.name, piece, actor)
            else:
                wanted.append(piece)
                source = blamed(found, is_own=False)
                await self._ask(self.plan.failed, actor.name, piece, source)

    async def _fetched(self, node: _Node, found: Assignment, size: float) -> bool:
        source: Actor | None = found.address
        if source is None:
            self.outcome.storage_bytes += size
            await self.network.move(size, self.storage_out, node.down, Link(self.shape.stream))
            return True
        if source.node.is_alive and not source.is_alive:
            return False  # nobody listens there any more
        try:
            async with asyncio.timeout(self.plan.lease_s):
                stream = Link(self.shape.stream)
                await self.network.move(size, source.node.up, node.down, stream)
            return source.is_alive
        except TimeoutError:
            return False

    def _next(self, node: str, wanted: list[Piece]) -> Assignment | None:
        return self.plan.next(node, wanted) if wanted else None

    async def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The planner is one process, and serves one call at a time."""
        async with self._planner:
            await asyncio.sleep(ASK_S)
            return call(*arguments)

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

    def _set_storage(self, bytes_per_s: float) -> None:
        self.storage_in.bytes_per_s = self.storage_out.bytes_per_s = bytes_per_s
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
        buffer = LocalBuffer(ExperienceBuffer(gate), 7200.0, 0.5, clock)
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
