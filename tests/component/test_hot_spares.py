"""Hot spares of the learner. Only the last test needs a cluster."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors.services.hot_spare_actors import (
    LOOK_S,
    ROOM_AGAIN_S,
    Spare,
    Spares,
)
from actors.services.learner_core import Core
from actors.services.rank_actors import build_learner_rank
from actors.services.start_services import Launcher
from rlhf_cluster.errors import CoreLost, PlacementError, RlhfError
from rlhf_cluster.run.restarts import Restarts
from rlhf_cluster.weights import store
from tests.component.test_learner_loss import pids
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.ray_references import (
    Actor,
    Reference,
)


class Nursery:
    """Starts spares that live until they are told to die; `troubles` are those of the next starts."""

    def __init__(self, wanted: int, limit: int = 3, troubles: Sequence[RlhfError] = ()) -> None:
        self.troubles = list(troubles)
        self.told: list[str] = []
        self.pauses: list[float] = []
        self.started: list[Spare] = []
        self.ended: list[Spare] = []
        self.given_up = 0
        self.hanging = False
        self.deaths: dict[str, asyncio.Event] = {}
        self.spares = Spares(
            wanted=wanted,
            start=self.start,
            present=self.present,
            end=self.ended.append,
            restarts=Restarts(limit=limit, what="hot spares of the learner"),
            tell=self.told.append,
            sleep=self.sleep,
        )

    async def start(self, number: int) -> Spare:
        await asyncio.sleep(0)
        if self.troubles:
            raise self.troubles.pop(0)
        if self.hanging:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up += 1
        spare = Spare(name=f"spare-{number}", actor=None, placement=None, where=f"process {number}")
        self.deaths[spare.name] = asyncio.Event()
        self.started.append(spare)
        return spare

    async def present(self, spare: Spare, after_s: float) -> None:
        assert after_s in (0.0, LOOK_S)
        if after_s:
            await self.deaths[spare.name].wait()
        if self.deaths[spare.name].is_set():
            raise CoreLost(f"{spare.name}: the process died")

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):  # turns of the event loop; nothing here takes longer
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("never")


async def test_those_that_are_ready_are_hired_and_others_take_their_place_after_resume():
    nursery = Nursery(wanted=2)
    spares = nursery.spares
    async with spares.kept():
        assert await spares.hire(2) == []
        spares.resume()
        await nursery.until(lambda: spares.num_ready == 2)
        [hired] = await spares.hire(1)
        assert hired is nursery.started[0]
        assert (spares.num_ready, len(nursery.started)) == (1, 2), "nothing starts before resume"
        spares.resume()
        await nursery.until(lambda: spares.num_ready == 2)
        assert len(nursery.started) == 3
    assert set(nursery.ended) == {*nursery.started} - {hired}, "who was hired is not ours to end"
    assert nursery.told[0] == "hot spare spare-0 (process 0) of the learner is ready"


async def test_a_start_under_way_is_given_up_before_the_ranks_take_their_places():
    nursery = Nursery(wanted=1)
    nursery.hanging = True
    async with nursery.spares.kept():
        nursery.spares.resume()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await nursery.spares.hire(1) == []
        assert nursery.given_up == 1


async def test_a_spare_that_dies_is_replaced_within_the_budget_and_ends_nothing():
    nursery = Nursery(wanted=1, limit=2)
    spares = nursery.spares
    async with spares.kept():
        spares.resume()
        for number in range(3):
            await nursery.until(lambda n=number: len(nursery.started) == n + 1)
            await nursery.until(lambda: spares.num_ready == 1)
            nursery.deaths[f"spare-{number}"].set()
        await nursery.until(lambda: spares.num_ready == 0 and len(nursery.told) == 6)
        assert await spares.hire(1) == []
    assert nursery.ended == nursery.started
    assert nursery.pauses == [1.0, 2.0]
    assert nursery.told[1] == ("spare-0: the process died: another hot spare is started, 1 of 2")
    assert nursery.told[-1].startswith(
        "the run continues with 0 hot spares: hot spares of the learner lost 3 times within 3600 s, "
        "over learner.max_restarts = 2. First cause: spare-0: the process died"
    )


async def test_a_spare_that_died_unseen_is_not_hired():
    nursery = Nursery(wanted=2)
    spares = nursery.spares
    async with spares.kept():
        spares.resume()
        await nursery.until(lambda: spares.num_ready == 2)
        nursery.deaths["spare-0"].set()
        assert [str(spare) for spare in await spares.hire(2)] == ["spare-1 (process 1)"]
    assert nursery.told[-1] == "a hot spare was no help: spare-0: the process died"


async def test_no_room_is_told_once_asked_for_again_and_costs_nothing():
    no_room = PlacementError("no room for spare-0 (1 CPU) within 5 s")
    nursery = Nursery(wanted=1, limit=0, troubles=[no_room] * 3)
    async with nursery.spares.kept():
        nursery.spares.resume()
        await nursery.until(lambda: nursery.spares.num_ready == 1)
    assert nursery.pauses == [ROOM_AGAIN_S] * 3
    assert [text for text in nursery.told if "room" in text] == [
        "a hot spare of the learner waits for room: no room for spare-0 (1 CPU) within 5 s"
    ]


class Cluster:
    """Holds so many bundles beside the spares; `asked` are the numbers that were to be placed."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    async def place(self, bundles: Sequence[Any], name: str, timeout_s: float) -> str:
        self.asked.append(len(bundles))
        if len(bundles) > self.room:
            raise PlacementError(f"no room for {len(bundles)} bundles")
        return f"group of {len(bundles)}"

    def core(self, nursery: Nursery, told: list[str], **learner: Any) -> Core:
        config = tiny_config(learner={"ranks": 4, "spares": 2, **learner})
        launcher = Launcher(config=config, model_dir="", engine_factory="", engine_environment={})
        may_shrink = config.learner.on_loss == "shrink"
        return Core(launcher, may_shrink, told.append, self.place, nursery.spares, {3})


@pytest.mark.parametrize(
    ("num_spares", "room", "learner", "expected", "asked"),
    [
        (1, 3, {}, (4, "group of 3"), [3]),
        (4, 0, {}, (4, None), []),
        (2, 1, {"on_loss": "shrink"}, (3, "group of 1"), [2, 1]),
        (2, 0, {"on_loss": "shrink"}, (2, None), [2, 1]),
        (2, 0, {"on_loss": "shrink", "min_ranks": 3}, None, [2, 1]),
        (0, 0, {"on_loss": "shrink"}, None, [4, 3, 2, 1]),
        (1, 2, {}, None, [3]),
    ],
)
async def test_spares_have_their_places_then_new_processes_then_fewer_ranks(
    num_spares, room, learner, expected, asked
):
    cluster, told = Cluster(room), list[str]()
    core = cluster.core(Nursery(wanted=2), told, **learner)
    if expected is None:
        with pytest.raises(PlacementError, match="no room for"):
            await core.place_ranks(lambda: {"CPU": 100.0}, num_spares)
    else:
        assert await core.place_ranks(lambda: {"CPU": 100.0}, num_spares) == expected
    assert cluster.asked == asked


async def test_spares_that_wait_are_room_to_grow():
    nursery = Nursery(wanted=2)
    cluster = Cluster(room=0)
    core = cluster.core(nursery, [], on_loss="shrink")
    core.num_ranks = 2
    async with nursery.spares.kept():
        assert not await core.room_to_grow()
        nursery.spares.resume()
        await nursery.until(lambda: nursery.spares.num_ready == 2)
        assert await core.room_to_grow()
    assert cluster.asked == [2]


async def test_spares_are_kept_when_there_is_no_room_for_the_others():
    nursery = Nursery(wanted=2)
    async with nursery.spares.kept():
        nursery.spares.resume()
        await nursery.until(lambda: nursery.spares.num_ready == 2)
        with pytest.raises(PlacementError):
            await Cluster(room=0).core(nursery, [])._start_learner(lambda learner: asyncio.sleep(0))
        assert nursery.spares.num_ready == 2
        assert not nursery.ended


async def test_a_spare_becomes_the_rank_that_was_lost():
    """The actors' own calls: which of them is asked for what."""
    calls: list[tuple[str, Any]] = []

    def enlisted(config: Any, rank: int) -> Reference:
        calls.append((f"{config.learner.ranks} ranks", rank))
        return Reference().answered()

    spares = [
        Spare(name=f"spare-{n}", actor=Actor(enlist=enlisted), placement=f"place {n}", where="here")
        for n in range(2)
    ]
    config = tiny_config(learner={"ranks": 2, "spares": 2})
    launcher = Launcher(config=config, model_dir="", engine_factory="", engine_environment={})
    core = Core(launcher)
    actors = core.spawn_ranks(build_learner_rank, config, None, spares[::-1])
    assert actors == [spares[1].actor, spares[0].actor]
    assert calls == [("2 ranks", 0), ("2 ranks", 1)]
    assert [(m.name, m.placement) for m in core.members] == [
        ("learner-0", "place 1"),
        ("learner-1", "place 0"),
    ]


READY = re.compile(r"hot spare (spare-\d+) \(process (\d+) on \S+\) of the learner is ready")
STEPS = 12


def test_a_spare_takes_the_place_of_a_killed_rank_and_another_one_comes(start_run):
    run = start_run(
        run={"steps": STEPS, "groups_per_step": 4},
        learner={"ranks": 2, "spares": 1},
        checkpoint={"every": 2},
    )

    def log() -> str:
        path = run.path / "logs" / "controller.log"
        return path.read_text() if path.exists() else ""

    run.script(generate_delay_s=0.5)
    run.wait_for(lambda s: s.checkpoint is not None, "a checkpoint", 300)
    run.script(hang_generate=True)
    run.wait_for(lambda s: READY.search(log()), "a spare", 300)
    [(name, pid)] = READY.findall(log())
    spare = int(pid)
    ranks = [each for each in pids("RankActor") if each != spare]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    run.wait_for(lambda s: s.restarts == 1, "the loss was noticed", 300)
    run.wait_for(lambda s: len(READY.findall(log())) == 2, "another spare", 300)
    another = int(READY.findall(log())[1][1])
    now = pids("RankActor")
    assert spare in now, "the process that waited is a rank"
    assert len(now) == 3
    assert not set(now) & set(ranks), "the other rank began anew"
    assert another not in (spare, *ranks)
    taken = re.search(rf"rank (\d) \(lost\) is {name} \(process {pid} on", log())
    assert taken is not None, log()
    [rank_log] = (run.path / "logs").glob(f"learner-{taken[1]}.log")
    assert rank_log.read_text().count("set up:") == 2
    run.script()
    [hanging] = pids("GenerationActor")
    os.kill(hanging, signal.SIGKILL)  # its groups go to one that reads the script anew
    code, output = run.finish(300)
    assert code == 0, output
    records = [r for r in run.metrics() if "learner/loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["learner/spares_ready"] == 1
    assert records[-1]["learner/ranks"] == 2
    published = store.latest(run.path / "weights")
    assert published is not None
    assert published.version == STEPS, "weights were published to the end"
    assert len(run.trained()) == STEPS * 4 * 4
    assert not pids("RankActor"), "no spare is left"
