"""What another process asks of the pools of a run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayError

from actors.drivers.supervisor import Supervisor
from actors.services.control_actor import Wish
from rlhf_cluster.errors import PlacementError


@dataclass
class SlowPool:
    """Has its new size once `meets` has been called by as many as it waits for."""

    kind: str
    meets: asyncio.Barrier
    wanted: int = 1
    live: list[Any] = field(default_factory=list)

    async def supervise(self) -> None:
        await asyncio.Event().wait()

    async def resize(self, wanted: int) -> str:
        await self.meets.wait()
        self.wanted = wanted
        return f"{self.kind}: {wanted} workers"


@dataclass
class AskedOnce:
    sizes: dict[str, int]
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    results: dict[str, str] = field(default_factory=dict)
    taken: bool = False

    async def exchange(self) -> list[Wish]:
        taken, self.taken = self.taken, True
        return [] if taken else [Wish(key="a", sizes=self.sizes)]

    def answer(self, wish: Wish, results: dict[str, str]) -> None:
        self.results = results
        self.answered.set()


class Observer:
    advice: None = None

    def event(self, text: str) -> None: ...


async def answers(control: AskedOnce, pools: list[Any]) -> dict[str, str]:
    supervisor = Supervisor(control, pools, Observer(), look_every_s=0.001)  # type: ignore[arg-type]
    started = asyncio.get_running_loop().create_future()
    started.set_result(None)
    async with asyncio.timeout(30), supervisor.watching(started):
        await control.answered.wait()
    return control.results


async def test_pools_that_are_asked_for_together_change_side_by_side() -> None:
    both = asyncio.Barrier(2)
    pools = [SlowPool("generation", both), SlowPool("scoring", both)]
    assert await answers(AskedOnce({"generation": 3, "scoring": 2}), pools) == {
        "generation": "generation: 3 workers",
        "scoring": "scoring: 2 workers",
    }


@pytest.mark.parametrize("error", [PlacementError("no room"), RayError("the head node is silent")])
async def test_a_size_that_cannot_be_had_is_refused_and_ends_nothing(error: Exception) -> None:
    class Refusing(SlowPool):
        async def resize(self, wanted: int) -> str:
            raise error

    pools = [Refusing("generation", asyncio.Barrier(1))]
    assert await answers(AskedOnce({"generation": 3}), pools) == {"generation": f"refused: {error}"}
