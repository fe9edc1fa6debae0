"""What a group costs the control plane does not grow with the number of workers.

Counted are the bytecodes of our own code, not seconds: the same on any machine, however busy.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.control_plane import LAST_STEPS, measure
from benchmarks.scripted_plane import control_plane
from rlhf_cluster.buffer.buffer_service import ask_until_answered
from rlhf_cluster.run.worker_loads import (
    Loads,
    State,
    Worker,
)

OURS = tuple(f"{Path(__file__).parents[3] / part}/" for part in ("actors", "rlhf_cluster"))
COUNTED = 20


@contextmanager
def counting(found: list[int]) -> Iterator[None]:
    """`found[0]` grows by the bytecodes that our code executes in the block."""

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        found[0] += event == "opcode"
        return inside

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        return inside(frame, event, argument)

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        yield
    finally:
        sys.settrace(before)


async def bytecodes_a_group(folder: Path, num_workers: int) -> float:
    """From its ticket to the buffer, where every worker has a history, many groups are in the buffer
    and the learner waits for more."""
    rules = {"straggler_groups": 1}
    async with control_plane(folder, num_workers, 2, num_workers + 30, quarantine=rules) as plane:
        pipeline, _ = plane
        tickets = await ask_until_answered(pipeline.buffer.admit)
        learner = asyncio.ensure_future(
            ask_until_answered(pipeline.buffer.take, num_workers + 30, 0)
        )
        prompt = pipeline.prompts.next()
        await asyncio.gather(*(pipeline.produce(t, prompt) for t in tickets[:num_workers]))
        found = [0]
        with counting(found):
            for ticket in tickets[num_workers : num_workers + COUNTED]:
                await pipeline.produce(ticket, prompt)
        assert not learner.done()
        learner.cancel()
        await asyncio.gather(learner, return_exceptions=True)
        return found[0] / COUNTED


async def test_a_group_costs_as_much_with_many_workers_as_with_few(tmp_path):
    few = await bytecodes_a_group(tmp_path / "few", 10)
    many = await bytecodes_a_group(tmp_path / "many", 200)
    assert few > 500, "the way of a group was counted"
    assert many < 1.1 * few


async def test_a_scripted_run_trains_every_group_within_its_bound(tmp_path):
    async with control_plane(tmp_path, 20, 4, 30) as (pipeline, learner):
        assert await pipeline.run() == 4
        assert learner.version == 4
        stats = await pipeline.buffer.stats()
        assert (stats.admitted, stats.taken, stats.num_discarded) == (120, 120, 0)


def test_the_benchmark_counts_whole_steps_after_the_warm_ones():
    asked: list[str] = []
    found = measure(3, groups_per_step=5, warm_steps=1, steps=2, told=asked.append)
    assert len(asked) == (1 + 2 + LAST_STEPS) * 5
    assert set(asked) == {"generation-0", "generation-1", "generation-2"}
    assert found["workers"] == 3
    assert found["rollouts_per_s"] > 0
    assert found["cost_us"] > 0


def workers_of(*in_flight: int) -> tuple[Loads, list[Worker]]:
    loads, workers = Loads(), [Worker(name=f"w{i}", actor=None, placement=None) for i in range(3)]
    for worker, number in zip(workers, in_flight, strict=True):
        worker.num_in_flight = number
        worker.changed = loads.update
        loads.update(worker)
    return loads, workers


def test_the_least_loaded_worker_is_found_after_any_change():
    loads, (a, b, c) = workers_of(2, 1, 1)
    assert loads.least(None) is b, "the first of equals"
    b.num_in_flight += 2
    assert loads.least(None) is c
    c.state = State.DRAINING
    assert loads.least(None) is a
    b.num_in_flight = 0
    assert loads.least(None) is b
    c.state = State.LIVE
    a.state = b.state = State.RETIRED
    assert (loads.least(None), len(loads)) == (c, 1)
    c.state = State.RETIRED
    assert (len(loads), loads.has_room(None)) == (0, False)


def test_a_worker_that_is_avoided_is_taken_where_no_other_has_room():
    loads, (a, b, c) = workers_of(0, 1, 2)
    assert loads.least(None, [a, b]) is c
    assert loads.least(2, [a, b]) is a, "c is full"
    assert loads.least(None, [a, b, c]) is a
    assert loads.least(None) is a, "to be avoided once is no harm later"
    assert (loads.has_room(1), loads.has_room(0)) == (True, False)


def test_what_is_kept_of_loads_does_not_grow_with_the_number_of_calls():
    loads, workers = workers_of(0, 0, 0)
    for _ in range(300):
        for worker in workers:
            worker.num_in_flight += 1
        for worker in workers:
            worker.num_in_flight -= 1
    assert len(loads._heap) <= 6
