import asyncio

import pytest

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import StalledError
from rlhf_cluster.records import Ticket
from tests.support.fakes.services import (
    finished_group,
    make_group,
    make_prompt,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def service(clock: Clock, patience_s: float = 0.02) -> BufferService:
    gate = AdmissionGate(max_staleness=0, pipeline_depth=0, groups_per_step=2, num_steps=3)
    return BufferService(ExperienceBuffer(gate), 30.0, patience_s, clock)


async def finish(buffer: BufferService, ticket: Ticket) -> None:
    group = make_group(ticket, make_prompt(), [1.0], version=ticket.version)
    await buffer.finish(finished_group(ticket, group))


async def admitted(buffer: BufferService) -> list[Ticket]:
    tickets = await buffer.admit()
    assert isinstance(tickets, list)
    assert tickets, "no ticket is no answer"
    return tickets


async def test_a_waiting_take_is_woken_by_the_last_missing_group():
    buffer = service(Clock(), patience_s=30.0)
    await buffer.set_live_version(0)
    tickets = await admitted(buffer)
    take = asyncio.create_task(buffer.take(2, 0))
    await finish(buffer, tickets[1])
    await finish(buffer, tickets[0])
    async with asyncio.timeout(5):
        taken = await take
    assert [t.ticket for t in taken] == tickets


async def test_a_waiting_admit_is_woken_by_a_live_version():
    buffer = service(Clock(), patience_s=30.0)
    admit = asyncio.create_task(buffer.admit())
    await asyncio.sleep(0)
    await buffer.set_live_version(0)
    async with asyncio.timeout(5):
        assert await admit == [Ticket(number=0, version=0), Ticket(number=1, version=0)]


async def test_waits_end_after_their_patience_and_say_so():
    buffer = service(Clock())
    assert await buffer.admit() is None
    assert await buffer.take(2, 0) is None


async def test_a_learner_without_groups_stalls_with_the_pending_groups_named():
    clock = Clock()
    buffer = service(clock)
    await buffer.set_live_version(0)
    finished, pending = await admitted(buffer)
    await finish(buffer, finished)
    assert await buffer.take(2, 0) is None
    clock.now = 31.0
    with pytest.raises(StalledError) as stalled:
        await buffer.take(2, 0)
    message = str(stalled.value)
    assert pending.group_id in message
    assert "1 ready, 1 in flight" in message
    assert "run.stall_timeout_s = 30" in message


async def test_progress_puts_the_stall_off():
    clock = Clock()
    buffer = service(clock)
    await buffer.set_live_version(0)
    first, _ = await admitted(buffer)
    assert await buffer.take(2, 0) is None
    clock.now = 20.0
    await finish(buffer, first)
    clock.now = 40.0
    assert await buffer.take(2, 0) is None


async def test_discards_alone_are_no_progress():
    clock = Clock()
    buffer = service(clock)
    await buffer.set_live_version(0)
    ticket, _ = await admitted(buffer)
    assert await buffer.take(2, 0) is None
    clock.now = 31.0
    await buffer.discard(ticket, "ScoringError")
    with pytest.raises(StalledError, match=r"1 discarded \{'ScoringError': 1\}"):
        await buffer.take(2, 0)


async def test_admit_ends_with_the_run():
    buffer = service(Clock())
    for version in range(3):
        await buffer.set_live_version(version)
        for ticket in await admitted(buffer):
            await finish(buffer, ticket)
        await buffer.take(2, version)
    assert await buffer.admit() == []


async def test_groups_that_finish_too_old_are_no_progress():
    clock = Clock()
    gate = AdmissionGate(
        max_staleness=1, pipeline_depth=1, groups_per_step=2, num_steps=9, on_stale="drop"
    )
    buffer = BufferService(ExperienceBuffer(gate), 30.0, 0.02, clock)
    await buffer.set_live_version(0)
    tickets = await admitted(buffer)
    assert await buffer.take(2, 2) is None
    clock.now = 31.0
    await finish(buffer, tickets[0])
    with pytest.raises(StalledError, match=r"1 discarded \{'stale': 1\}"):
        await buffer.take(2, 2)


async def test_a_deeper_pipeline_wakes_a_waiting_admit():
    gate = AdmissionGate(max_staleness=2, pipeline_depth=0, groups_per_step=2, num_steps=9)
    buffer = BufferService(ExperienceBuffer(gate), 30.0, 30.0, Clock())
    await buffer.set_live_version(0)
    await admitted(buffer)
    admit = asyncio.create_task(buffer.admit())
    await asyncio.sleep(0)
    await buffer.set_pipeline_depth(1)
    async with asyncio.timeout(5):
        assert [t.number for t in await admit] == [2, 3]


async def test_a_stopped_buffer_hands_out_nothing_and_keeps_what_it_has():
    buffer = service(Clock(), patience_s=30.0)
    await buffer.set_live_version(0)
    tickets = await admitted(buffer)
    taking = asyncio.create_task(buffer.take(2, 0))
    admitting = asyncio.create_task(buffer.admit())
    await asyncio.sleep(0)
    await buffer.stop()
    async with asyncio.timeout(5):
        assert await taking == []
        assert await admitting == []
    for ticket in tickets:
        await finish(buffer, ticket)
    assert await buffer.take(2, 0) == []
    assert (await buffer.stats()).ready == len(tickets)
    state = await buffer.state(0)
    assert state.open == tuple(tickets)
    assert (state.taken, state.finished) == (0, 0)


async def test_the_state_after_a_step_is_what_a_resumed_buffer_takes():
    buffer = service(Clock())
    await buffer.set_live_version(0)
    tickets = await admitted(buffer)
    for ticket in tickets[:2]:
        await finish(buffer, ticket)
    assert len(await buffer.take(2, 0)) == 2
    state = await buffer.state(1)
    assert state.learner_version == 1
    gate = buffer.buffer.gate
    again = ExperienceBuffer.resume(gate, state)
    assert again.state() == state
    assert [t.number for t in state.open] == [t.number for t in tickets[2:]]


async def test_the_age_of_the_oldest_group_is_counted_from_its_admission():
    clock = Clock()
    buffer = service(clock)
    assert (await buffer.stats()).oldest_age_s == 0.0
    await buffer.set_live_version(0)
    clock.now = 100.0
    first, second = await admitted(buffer)
    clock.now = 103.0
    await buffer.discard(first, "out of luck")
    [third] = await admitted(buffer)
    clock.now = 110.0
    assert (await buffer.stats()).oldest_age_s == 10.0, "that of the second group"
    await finish(buffer, second)
    await finish(buffer, third)
    assert (await buffer.stats()).oldest_age_s == 10.0, "it waits for the learner"
    await buffer.take(2, 0)
    assert (await buffer.stats()).oldest_age_s == 0.0


async def test_a_group_that_was_open_at_a_resume_counts_from_then():
    clock = Clock()
    before = service(clock)
    await before.set_live_version(0)
    await admitted(before)
    clock.now = 50.0
    state = await before.state(0)
    gate = AdmissionGate(max_staleness=0, pipeline_depth=0, groups_per_step=2, num_steps=3)
    again = BufferService(ExperienceBuffer.resume(gate, state), 30.0, 0.02, clock)
    clock.now = 57.0
    assert (await again.stats()).oldest_age_s == 7.0
