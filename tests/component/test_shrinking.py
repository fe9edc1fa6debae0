"""A learner that goes on with the ranks that fit, and goes back to all of them.

Only the last test needs a cluster: it takes a node away, and gives another.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayCluster

from actors.drivers.training_attempt import Attempt
from actors.services.learner_core import Core
from actors.services.start_services import Launcher
from rlhf_cluster.errors import PlacementError
from rlhf_cluster.run.checkpoint.background_saving import CheckpointStats
from rlhf_cluster.run.run_record import Snapshot
from tests.support.builders.run_configs import tiny_config


class Cluster:
    """Holds so many bundles; `asked` are the numbers of those that were to be placed."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int] = []

    async def place(self, bundles: Sequence[Any], name: str, timeout_s: float) -> str:
        self.asked.append(len(bundles))
        if len(bundles) > self.room:
            raise PlacementError(f"no room for {len(bundles)} bundles within {timeout_s:g} s")
        return f"group of {len(bundles)}"

    def core(self, may_shrink: bool, told: list[str], **learner: Any) -> Core:
        settings = {"ranks": 4, "on_loss": "shrink", **learner}
        launcher = Launcher(
            config=tiny_config(learner=settings),
            model_dir="",
            engine_factory="",
            engine_environment={},
        )
        return Core(launcher, may_shrink, told.append, self.place)


async def test_after_a_loss_the_run_goes_on_with_the_ranks_that_fit():
    cluster, told = Cluster(room=2), []
    free = {"CPU": 3.9}  # of which one node has only two ranks' worth
    found = await cluster.core(True, told).place_ranks(lambda: free)
    assert found == (2, "group of 2")
    assert cluster.asked == [4, 3, 2]
    assert told == [
        "continues with 2 of 4 learner ranks: no room for 4 bundles within 60 s",
    ]


async def test_with_room_for_all_ranks_none_is_left_out():
    cluster, told = Cluster(room=4), []
    assert await cluster.core(True, told).place_ranks(dict) == (4, "group of 4")
    assert (cluster.asked, told) == ([4], [])


@pytest.mark.parametrize("may_shrink", [True, False])
async def test_fewer_ranks_than_allowed_are_no_run(may_shrink: bool):
    cluster, told = Cluster(room=2), []
    core = cluster.core(may_shrink, told, min_ranks=3)
    with pytest.raises(PlacementError, match="no room for 4 bundles") as caught:
        await core.place_ranks(lambda: {"CPU": 100.0})
    assert cluster.asked == ([4, 3] if may_shrink else [4])
    assert ("learner.min_ranks = 3" in str(caught.value)) == may_shrink
    assert told == []


def attempt_of(tmp_path: Path, step: int | None) -> Attempt:
    """Of a run that goes on from `step`; only what `grow` looks at."""
    place: Any = SimpleNamespace(
        config=tiny_config(run={"root": str(tmp_path)}),
        generation=None,
        scoring=SimpleNamespace(follow=None),
        observer=None,
    )
    checkpoint: Any = None if step is None else SimpleNamespace(state=SimpleNamespace(step=step))
    return Attempt(
        place=place,
        learner=None,  # type: ignore[arg-type]
        buffer=None,  # type: ignore[arg-type]
        checkpoint=checkpoint,
        again=True,
    )


class StoppingPipeline:
    stopped = False

    async def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("step", [None, 4])
async def test_room_is_looked_for_once_after_each_further_checkpoint(tmp_path, step: int | None):
    attempt, pipeline = attempt_of(tmp_path, step), StoppingPipeline()
    stats = CheckpointStats(last=-1 if step is None else step)
    attempt.pipeline = pipeline  # type: ignore[assignment]
    attempt.checkpoints = SimpleNamespace(stats=stats)  # type: ignore[assignment]
    looks: list[int] = []

    async def has_room() -> bool:
        looks.append(stats.last)
        return stats.last >= 8

    def pause_of(steps: Iterator[int]) -> Callable[[float], Awaitable[None]]:
        async def pause(seconds: float) -> None:
            assert not pipeline.stopped
            stats.last = next(steps, stats.last)

        return pause

    await attempt.grow(has_room, pause_of(iter([stats.last, 6, 6, 6, 8, 10])))
    assert looks == [6, 8]
    assert pipeline.stopped
    assert attempt.growing
    await attempt.stop()
    assert not attempt.growing, "who asks for the end gets it"


def test_a_run_whose_node_is_gone_goes_on_with_fewer_ranks_and_then_with_all(
    ray_cluster: RayCluster, start_run: Callable[..., Any]
) -> None:
    """Each node has room for one rank."""
    steps, node = 40, ray_cluster.add_node(num_cpus=7)
    try:
        run = start_run(
            run={"steps": steps, "groups_per_step": 2},
            algorithm={"type": "grpo", "group_size": 2},
            learner={"ranks": 2, "num_cpus": 6.0, "on_loss": "shrink"},
            checkpoint={"every": 2},
            cluster={"placement_timeout_s": 10.0},
            observe={"live": False, "samples_per_step": 4},
        )
        run.script(generate_delay_s=0.5)
        run.wait_for(lambda s: s.checkpoint is not None and s.step > 1, "a checkpoint", 300)
        ray_cluster.remove_node(node)
        node = None
        run.script(generate_delay_s=2.0)  # steps enough for a node to start beside them
        run.wait_for(
            told("continues with 1 of 2 learner ranks: no resources for"), "fewer ranks", 300
        )
        node = ray_cluster.add_node(num_cpus=7)
        run.wait_for(told("there is room for all 2 learner ranks again"), "the node is used", 300)
        run.script()
        code, output = run.finish(300)
    finally:
        if node is not None:
            ray_cluster.remove_node(node)
    assert code == 0, output
    records = [r for r in run.metrics() if "learner/loss" in r]
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    ranks = [r["learner/ranks"] for r in records]
    assert [count for count, _ in groupby(ranks)] == [2, 1, 2]
    assert records[-1]["learner/restarts_total"] == 1
    assert len(run.trained()) == steps * 2 * 2


def told(text: str) -> Callable[[Snapshot], bool]:
    return lambda status: any(text in event.text for event in status.events)
