"""A control actor that dies costs the run nothing but a new one; Ray is played by a few lines."""

from __future__ import annotations

from typing import Any

from rlhf_cluster.errors import RunError, WorkerError
from rlhf_cluster.run.control_channel import (
    PATIENCE_S,
    ControlChannel,
)


class Cluster:
    """Actors are numbers. `dead` ones do not answer; a method of `dying` kills who is asked."""

    def __init__(self, max_restarts: int = 3) -> None:
        self.wishes: dict[int, list[tuple[int, dict[str, int]]]] = {}
        self.answers: list[tuple[int, int, dict[str, str]]] = []
        self.dead: set[int] = set()
        self.dying: set[str] = set()
        self.ended: list[int] = []
        self.refused = 0
        self.num_started = 1
        self.told: list[str] = []
        self.channel = ControlChannel(
            0,
            start=self.start,
            end=self.ended.append,
            ask=self.ask,
            max_restarts=max_restarts,
            tell=self.told.append,
        )

    def start(self, patience_s: float) -> int:
        assert patience_s == PATIENCE_S
        if self.refused:
            self.refused -= 1
            raise RunError("run 'x' is already alive on this cluster")
        self.num_started += 1
        return self.num_started - 1

    async def ask(self, actor: int, method: str, *arguments: Any) -> Any:
        if method in self.dying:
            self.dying.remove(method)
            self.dead.add(actor)
        if actor in self.dead:
            raise WorkerError(f"control.{method}: the process died")
        if method == "wishes":
            return self.wishes.pop(actor, [])
        if method == "answer":
            self.answers.append((actor, *arguments))
        return None


async def test_an_actor_that_died_is_replaced_under_its_name_and_the_run_goes_on():
    cluster = Cluster()
    cluster.dead.add(0)
    assert await cluster.channel.exchange({"step": 1}) == []
    assert (cluster.ended, cluster.num_started) == ([0], 2), "ended first: it may only be silent"
    assert cluster.channel.restarts.total == 1
    assert "the process died: another control channel is open, restart 1 of 3" in cluster.told[0]
    cluster.wishes[1] = [(1, {"generation": 2})]
    [wish] = await cluster.channel.exchange({"step": 2})
    assert (wish.number, wish.sizes, wish.actor) == (1, {"generation": 2}, 1)


async def test_wishes_of_an_actor_that_dies_when_they_are_taken_are_carried_out():
    cluster = Cluster()
    cluster.wishes[0] = [(1, {"generation": 2})]
    cluster.dying.add("set_status")
    [wish] = await cluster.channel.exchange({})
    assert wish.sizes == {"generation": 2}
    assert cluster.channel.restarts.total == 1


async def test_an_answer_never_reaches_a_wish_of_the_same_number_in_another_actor():
    cluster = Cluster()
    cluster.wishes[0] = [(1, {"generation": 2})]
    [wish] = await cluster.channel.exchange({})
    cluster.dead.add(0)
    await cluster.channel.exchange({})
    cluster.wishes[1] = [(1, {"scoring": 3})]
    [other] = await cluster.channel.exchange({})
    await cluster.channel.answer(wish, {"generation": "generation: 2 workers"})
    assert cluster.answers == []
    assert "nobody hears what became of scale {'generation': 2}" in cluster.told[-1]
    await cluster.channel.answer(other, {"scoring": "scoring: 3 workers"})
    assert cluster.answers == [(1, 1, {"scoring": "scoring: 3 workers"})]


async def test_a_name_that_is_taken_costs_a_restart_and_is_asked_for_again():
    cluster = Cluster()
    cluster.dead.add(0)
    cluster.refused = 2
    await cluster.channel.exchange({})
    assert cluster.channel.restarts.total == 3
    assert cluster.channel.is_open
    assert "already alive" in cluster.told[0], "the last failure is told"


async def test_the_run_goes_on_without_a_channel_that_is_lost_too_often():
    cluster = Cluster(max_restarts=2)
    cluster.dead.update(range(100))
    for _ in range(6):
        assert await cluster.channel.exchange({}) == []
    assert cluster.num_started == 3
    assert not cluster.channel.is_open
    assert len(cluster.told) == 3
    assert "lost 3 times within 3600 s, over cluster.max_restarts = 2" in cluster.told[-1]
    cluster.channel.close()


async def test_it_is_closed_once():
    cluster = Cluster()
    cluster.channel.close()
    cluster.channel.close()
    assert cluster.ended == [0]
    assert await cluster.channel.exchange({}) == []
