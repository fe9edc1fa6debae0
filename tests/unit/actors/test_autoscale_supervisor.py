"""The supervisor carries out what the autoscaler decides."""

import asyncio

from actors.drivers.supervisor import Supervisor
from actors.services.control_actor import Wish
from rlhf_cluster.errors import PlacementError
from rlhf_cluster.run.autoscaler import Autoscaler
from rlhf_cluster.run.bottleneck_advisor import Advice
from tests.support.builders.advice import (
    BOTH,
    advice,
)


class FakePool:
    """One that changes its size at once, or refuses."""

    def __init__(self, kind: str, refuses: bool = False) -> None:
        self.kind, self.wanted, self.refuses = kind, 1, refuses
        self.resized: list[int] = []
        self.num_autoscaled = 0

    @property
    def live(self) -> list[None]:
        return [None] * self.wanted

    async def supervise(self) -> None:
        await asyncio.Event().wait()

    async def resize(self, size: int) -> str:
        if self.refuses:
            raise PlacementError("no node has room")
        self.wanted = size
        self.resized.append(size)
        return f"{self.kind}: {size} workers"


class FakeControl:
    """Nobody asks for anything."""

    async def exchange(self) -> list[None]:
        return []


class FakeObserver:
    """An advice, and what was told."""

    def __init__(self, given: Advice | None) -> None:
        self.advice, self.events = given, []
        self.told = asyncio.Event()

    def event(self, text: str) -> None:
        self.events.append(text)
        if len(self.events) == 2:
            self.told.set()


async def watched(pools, observer, scaler) -> None:
    started = asyncio.get_running_loop().create_future()
    started.set_result(None)
    supervisor = Supervisor(FakeControl(), pools, observer, scaler, look_every_s=0.001)
    async with asyncio.timeout(30), supervisor.watching(started):
        await observer.told.wait()


async def test_the_supervisor_carries_it_out_as_a_wish_and_says_why():
    pools, observer = [FakePool("generation"), FakePool("scoring")], FakeObserver(advice())
    await watched(pools, observer, Autoscaler(BOTH, {}))
    assert pools[0].resized == [2], "once: that advice is of one worker"
    assert [pool.num_autoscaled for pool in pools] == [1, 0]
    assert observer.events == [
        f"scale generation to 2: autoscale: {observer.advice.text}",
        "scale generation to 2: generation: 2 workers",
    ]


async def test_a_refusal_is_told_and_does_not_end_the_run():
    pools = [FakePool("generation", refuses=True), FakePool("scoring")]
    observer = FakeObserver(advice())
    await watched(pools, observer, Autoscaler(BOTH, {}))
    assert observer.events[-1] == "scale generation to 2: refused: no node has room"
    assert (pools[0].wanted, pools[0].num_autoscaled) == (1, 0)


async def test_a_pool_that_there_is_not_is_refused_by_name():
    class Asked(FakeControl):
        """One wish, and its answer."""

        async def exchange(self) -> list[Wish]:
            sizes = {"genration": 2, "learner": 2}
            return [] if told else [Wish(key="a", sizes=sizes)]

        def answer(self, wish, results) -> None:
            told.append(results)
            observer.told.set()

    told: list[dict[str, str]] = []

    pools, observer = [FakePool("generation"), FakePool("proxies")], FakeObserver(None)
    supervisor = Supervisor(Asked(), pools, observer, look_every_s=0.001)
    started = asyncio.get_running_loop().create_future()
    started.set_result(None)
    async with asyncio.timeout(30), supervisor.watching(started):
        await observer.told.wait()
    assert told[0] == {
        "genration": "refused: no pool 'genration'; did you mean 'generation'?",
        "learner": "refused: no pool 'learner'. Pools: generation, proxies",
    }
    assert not any(pool.resized for pool in pools)


async def test_nothing_is_decided_while_a_worker_is_missing():
    pools, observer = [FakePool("generation"), FakePool("scoring")], FakeObserver(advice())
    supervisor = Supervisor(FakeControl(), pools, observer, Autoscaler(BOTH, {}))
    assert supervisor.settled
    pools[1].wanted = 2
    pools[1].__class__ = type("Short", (FakePool,), {"live": [None]})
    assert not supervisor.settled
