"""Places of actors are given back, whatever happens to the actor."""

import asyncio
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
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from tests.support.builders.run_configs import tiny_config


class Group:
    """A placement group that is ready at once, or never."""

    def __init__(self, has_room: bool) -> None:
        self.is_ready: Future[None] = Future()
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
    kills: bool = True
    reserved: list[Any] = field(default_factory=list)
    killed: list[Any] = field(default_factory=list)

    def reserve(self, resources: list[dict[str, float]], name: str) -> Any:
        self.reserved.append(Group(self.has_room))
        return self.reserved[-1]

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
    with pytest.raises(PlacementError, match="no room for .* within 0.01 s"):
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
