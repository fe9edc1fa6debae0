"""Places of actors are given back, whatever happens to the actor."""

import asyncio
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.cluster.launch import (
    RayPlaces,
    place,
    take_down,
)
from actors.services.start_services import Launcher
from rlhf_cluster.errors import PlacementError, WorkerError
from rlhf_cluster.planning.placement import Bundle
from rlhf_cluster.run.restarts import FailedStarts
from rlhf_cluster.run.worker_pool import (
    ROOM_AGAIN_S,
    PoolLimits,
    Worker,
    WorkerPool,
)
from tests.support.builders.run_configs import tiny_config


class Group:
    """A placement group that is ready at once, or never."""

    def __init__(self, has_room: bool) -> None:
        self.is_ready: Future[None] = Future()
        self.node = ""
        if has_room:
            self.is_ready.set_result(None)

    def ready(self) -> Any:
        return self

    def future(self) -> Future[None]:
        return self.is_ready


@dataclass
class Places(RayPlaces):
    """In place of Ray: which groups are reserved, and which actors live."""

    has_room: bool = True
    nodes: list[str] = field(default_factory=lambda: ["node-a"])
    full: set[str] = field(default_factory=set)
    kills: bool = True
    reserved: list[Any] = field(default_factory=list)
    killed: list[Any] = field(default_factory=list)

    def reserve(
        self, resources: list[dict[str, float]], name: str, avoid: Collection[str] = ()
    ) -> Any:
        node = next((node for node in self.nodes if node not in {*avoid, *self.full}), "")
        self.reserved.append(Group(self.has_room and bool(node)))
        self.reserved[-1].node = node
        return self.reserved[-1]

    def node_of(self, group: Any) -> str:
        return group.node

    def fitting(self, resources: Mapping[str, float]) -> list[str]:
        return self.nodes

    def give_back(self, group: Any) -> None:
        self.reserved.remove(group)

    def kill(self, actor: Any) -> None:
        if not self.kills:
            raise ValueError("no such actor")
        self.killed.append(actor)

    def free(self) -> dict[str, float]:
        return {"CPU": 1.0}


BUNDLE = Bundle(owner="generation-0", cpus=1.0, gpus=0)


async def test_every_worker_that_a_pool_retires_gives_its_place_back():
    places = Places()

    async def launch(name: str) -> Worker:
        return Worker(name=name, actor=name, placement=await place([BUNDLE], name, 1.0, places))

    async def check(worker: Worker) -> None:
        pass

    pool = WorkerPool(
        kind="generation",
        launch=launch,
        retire=lambda worker: take_down(worker.actor, worker.placement, places),
        check=check,
        limits=PoolLimits(backoff_s=0.0),
    )
    await pool.start(3)
    assert len(places.reserved) == 3
    await pool.fail(pool.live[0], WorkerError("the process died"))
    assert (places.killed, len(places.reserved)) == (["generation-0"], 2)
    await pool.resize(1)
    assert len(places.reserved) == 1
    pool.close()
    assert places.reserved == []


def test_a_place_is_given_back_though_its_actor_cannot_be_killed():
    places = Places(kills=False)
    group = places.reserve([], "generation-0")
    with pytest.raises(ValueError, match="no such actor"):
        take_down("actor", group, places)
    assert places.reserved == []


async def test_a_place_that_is_never_ready_is_given_back():
    places = Places(has_room=False)
    with pytest.raises(PlacementError, match="no resources for .* within 0.01 s"):
        await place([BUNDLE], "generation-0", 0.01, places)
    assert places.reserved == []


async def test_a_place_is_given_back_when_who_waits_for_it_gives_up():
    places = Places(has_room=False)
    waiting = asyncio.create_task(place([BUNDLE], "generation-0", 3600.0, places))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert places.reserved == []


async def test_a_place_whose_actor_cannot_be_made_is_given_back():
    def spawn(*arguments: Any, **options: Any) -> Any:
        raise ValueError("an actor's arguments do not pickle")

    places = Places()
    launcher = Launcher(
        config=tiny_config(),
        model_dir="",
        engine_factory="",
        engine_environment={},
        places=places,
        spawn=spawn,
    )
    with pytest.raises(ValueError, match="do not pickle"):
        await launcher.actor(object, [], BUNDLE)
    assert places.reserved == []


class Starting:
    """An actor whose `start` fails on a node that is `bad`."""

    def __init__(self, node: str, bad: set[str]) -> None:
        self.node, self.bad = node, bad
        self.start = self

    def remote(self) -> Any:
        return self

    def future(self) -> Future[None]:
        done: Future[None] = Future()
        if self.node in self.bad:
            done.set_exception(WorkerError(f"CUDA error on {self.node}"))
        else:
            done.set_result(None)
        return done


def launching(
    places: Places, bad: set[str], cluster: Mapping[str, float] | None = None
) -> tuple[Launcher, WorkerPool]:
    """A pool of one worker, whose workers start where `places` has them."""

    async def joined(worker: Worker) -> None:
        pass

    async def launch(name: str) -> Worker:
        actor, group = await launcher.actor(object, [], BUNDLE)
        return await launcher.ready(Worker(name=name, actor=actor, placement=group), joined)

    launcher = Launcher(
        config=tiny_config(cluster=dict(cluster or {})),
        model_dir="",
        engine_factory="",
        engine_environment={},
        places=places,
        spawn=lambda *_, group, **__: Starting(group.node, bad),
    )
    pool = WorkerPool(
        kind="generation",
        launch=launch,
        retire=lambda worker: take_down(worker.actor, worker.placement, places),
        check=joined,
        limits=PoolLimits(max_restarts=10, backoff_s=0.0, min_workers=1),
    )
    return launcher, pool


async def settled(pool: WorkerPool) -> None:
    while pool._tasks:
        await asyncio.gather(*pool._tasks)


async def test_n16_a_node_where_starts_fail_is_avoided_and_costs_two_restarts():
    bad = {"node-a"}
    places = Places(nodes=["node-b"])
    launcher, pool = launching(places, bad)
    await pool.start(2)
    places.nodes = ["node-a", "node-b"]  # the bad one has the room that it lost
    for _ in range(5):
        await pool.fail(pool.live[0], WorkerError("the process died"))
        await settled(pool)
    assert [worker.placement.node for worker in pool.live] == ["node-b", "node-b"]
    assert pool.restarts.total == 5 + launcher.failed_starts.limit
    assert len(places.reserved) == 2


async def test_n16_where_no_other_node_is_large_enough_none_is_avoided():
    bad = {"node-a"}
    launcher, pool = launching(Places(), bad)
    with pytest.raises(WorkerError, match="CUDA error on node-a"):
        await pool.start(1)
    for _ in range(3):
        with pytest.raises(WorkerError, match="CUDA error"):
            await pool.launch("generation-9")
    bad.clear()
    await pool.launch("generation-9")
    assert launcher.failed_starts.avoided(lambda: ["node-a", "node-b"]) == {}, "it is well again"


async def test_n16_who_waits_for_another_node_is_told_which_is_avoided_and_why():
    places = Places(has_room=False, nodes=["node-a", "node-b"])
    avoid = {"node-a": WorkerError("CUDA error")}
    with pytest.raises(PlacementError, match=r"Node node-a is avoided: CUDA error\. Free in the"):
        await place([BUNDLE], "generation-0", 0.01, places, avoid)


async def test_an_avoided_node_is_tried_again_where_all_others_are_full_and_costs_no_restart():
    """The learner fills the only other node: for the window of failed starts there is no room else."""
    bad = {"node-a"}
    places = Places(nodes=["node-b"])
    launcher, pool = launching(places, bad, {"placement_timeout_s": 0.01})
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if waits.count(ROOM_AGAIN_S) == 3:
            bad.clear()

    pool.sleep = sleep
    await pool.start(2)
    places.nodes, places.full = ["node-a", "node-b"], {"node-b"}
    await pool.fail(pool.live[0], WorkerError("the process died"))
    await settled(pool)
    assert [worker.placement.node for worker in pool.live] == ["node-b", "node-a"]
    assert waits.count(ROOM_AGAIN_S) == 3
    assert pool.restarts.total == 1 + launcher.failed_starts.limit
    assert len(places.reserved) == 2
    assert launcher.last_resorts == {}


async def test_n16_a_failed_start_says_why_though_its_actor_cannot_be_ended():
    places = Places(kills=False)
    _, pool = launching(places, {"node-a"})
    with pytest.raises(WorkerError, match="CUDA error on node-a"):
        await pool.launch("generation-0")
    assert places.reserved == []


def test_n16_a_node_is_tried_again_when_its_failures_are_old():
    now = [0.0]
    starts = FailedStarts(window_s=60.0, clock=lambda: now[0])
    error = WorkerError("CUDA error")
    assert [starts.failed("a", error) for _ in range(3)] == [False, True, False]
    assert starts.avoided(lambda: ["a", "b"]) == {"a": error}
    now[0] = 60.0
    assert starts.avoided(lambda: ["a", "b"]) == {}
