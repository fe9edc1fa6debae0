"""A control actor that dies costs the run nothing but a restart; Ray is played by a few lines."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from actors.services.control_actor import ControlActor, ControlChannel
from rlhf_cluster.errors import WorkerError

SIZES = {"generation": 2}
RESULTS = {"generation": "generation: 2 workers"}


class Cluster:
    """Restarts the actor. A silent one answers nothing until it is killed."""

    def __init__(self, max_restarts: int = 3) -> None:
        self.actor = ControlActor()
        self.is_silent = self.loses_reply = False
        self.ended: list[bool] = []
        self.told: list[str] = []
        self.channel = ControlChannel(
            self.exchange, end=self.end, max_restarts=max_restarts, tell=self.told.append
        )

    def die(self) -> None:
        self.actor = ControlActor()

    def end(self, for_good: bool) -> None:
        self.ended.append(for_good)
        self.is_silent = False
        self.die()

    async def exchange(self, answers: dict[str, dict[str, str]]) -> Any:
        if self.is_silent:
            raise WorkerError("control.exchange: no answer within 33.5 s")
        reply = copy.deepcopy(self.actor.exchange(answers))  # Ray copies too
        if self.loses_reply:
            self.loses_reply = False
            raise WorkerError("control.exchange: no answer within 33.5 s")
        return reply


async def test_an_actor_that_died_is_restarted_and_a_silent_one_is_killed_for_that():
    cluster = Cluster()
    assert await cluster.channel.exchange() == []
    cluster.die()
    assert await cluster.channel.exchange() == []
    assert cluster.ended == [], "Ray has restarted it"
    assert cluster.told == [
        "control: the process died: another control channel is open, restart 1 of 3"
    ]
    cluster.is_silent = True
    assert await cluster.channel.exchange() == []
    assert cluster.ended == [False]
    assert "no answer within 33.5 s: another control channel is open, restart 2" in cluster.told[1]
    assert cluster.actor.scale("a", SIZES) is None
    [wish] = await cluster.channel.exchange()
    assert (wish.key, wish.sizes) == ("a", SIZES)
    assert cluster.channel.restarts.total == 2, "the start after the kill is not counted again"


@pytest.mark.parametrize("dies_before_the_answer", [True, False])
async def test_a_request_outlives_a_restart_and_is_carried_out_once(dies_before_the_answer: bool):
    cluster = Cluster()
    cluster.actor.scale("a", SIZES)
    cluster.die()  # before the driver saw the request
    assert await cluster.channel.exchange() == []
    assert cluster.actor.scale("a", SIZES) is None
    [wish] = await cluster.channel.exchange()
    assert await cluster.channel.exchange() == [], "it is being carried out"
    if dies_before_the_answer:
        cluster.die()
        assert cluster.actor.scale("a", SIZES) is None
    cluster.channel.answer(wish, RESULTS)
    assert await cluster.channel.exchange() == []
    if not dies_before_the_answer:
        cluster.die()  # with the answer, which nobody has read
    if cluster.actor.scale("a", SIZES) is None:
        assert await cluster.channel.exchange() == [], "the driver knows the answer"
        assert await cluster.channel.exchange() == []
    assert cluster.actor.scale("a", SIZES) == RESULTS


async def test_answers_that_may_have_been_lost_are_sent_again():
    cluster = Cluster()
    cluster.actor.scale("a", SIZES)
    [wish] = await cluster.channel.exchange()
    cluster.channel.answer(wish, RESULTS)
    cluster.loses_reply = True
    assert await cluster.channel.exchange() == []
    assert cluster.actor.scale("a", SIZES) is None, "the actor was restarted"
    assert await cluster.channel.exchange() == []
    assert cluster.actor.scale("a", SIZES) == RESULTS


async def test_each_request_gets_its_own_answer():
    cluster = Cluster()
    cluster.actor.scale("a", SIZES)
    [first] = await cluster.channel.exchange()
    cluster.die()
    cluster.actor.scale("b", {"scoring": 3})
    [second] = await cluster.channel.exchange()
    cluster.channel.answer(first, RESULTS)
    await cluster.channel.exchange()
    assert cluster.actor.scale("b", {"scoring": 3}) is None
    cluster.channel.answer(second, {"scoring": "scoring: 3 workers"})
    await cluster.channel.exchange()
    assert cluster.actor.scale("b", {"scoring": 3}) == {"scoring": "scoring: 3 workers"}


async def test_the_run_goes_on_without_a_channel_that_is_lost_too_often():
    cluster = Cluster(max_restarts=2)
    for _ in range(6):
        cluster.is_silent = True
        assert await cluster.channel.exchange() == []
    assert cluster.ended == [False, False, True]
    assert not cluster.channel.is_open
    assert len(cluster.told) == 3
    assert "lost 3 times within 3600 s, over cluster.max_restarts = 2" in cluster.told[-1]
    cluster.channel.close()
    assert len(cluster.ended) == 3


async def test_it_is_closed_once():
    cluster = Cluster()
    cluster.channel.close()
    cluster.channel.close()
    assert cluster.ended == [True]
    assert await cluster.channel.exchange() == []
