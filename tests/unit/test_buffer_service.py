import asyncio

import pytest

from rlhf_cluster.errors import StalledError
from rlhf_cluster.experience.buffer import ExperienceBuffer
from rlhf_cluster.experience.service import Answer, BufferService
from rlhf_cluster.experience.staleness import AdmissionGate
from rlhf_cluster.records import Ticket
from tests.fakes import make_group, make_prompt


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def service(clock: Clock, patience_s: float = 0.02) -> BufferService:
    gate = AdmissionGate(max_staleness=0, pipeline_depth=0, groups_per_step=2, num_steps=3)
    return BufferService(ExperienceBuffer(gate), 30.0, patience_s, clock)


async def finish(buffer: BufferService, ticket: Ticket) -> None:
    group = make_group(ticket, make_prompt(), [1.0], version=ticket.version)
    await buffer.finish(ticket, group, group.summary())


async def admitted(buffer: BufferService) -> Ticket:
    ticket = await buffer.admit()
    assert isinstance(ticket, Ticket)
    return ticket


async def test_a_waiting_take_is_woken_by_the_last_missing_group():
    buffer = service(Clock(), patience_s=30.0)
    await buffer.version_live(0)
    tickets = [await admitted(buffer), await admitted(buffer)]
    take = asyncio.create_task(buffer.take(2, 0))
    await finish(buffer, tickets[1])
    await finish(buffer, tickets[0])
    taken = await asyncio.wait_for(take, 5)
    assert [t.ticket for t in taken] == tickets


async def test_a_waiting_admit_is_woken_by_a_live_version():
    buffer = service(Clock(), patience_s=30.0)
    admit = asyncio.create_task(buffer.admit())
    await asyncio.sleep(0)
    await buffer.version_live(0)
    assert await asyncio.wait_for(admit, 5) == Ticket(number=0, version=0)


async def test_waits_end_after_their_patience_and_say_so():
    buffer = service(Clock())
    assert await buffer.admit() is Answer.WAIT
    assert await buffer.take(2, 0) is Answer.WAIT


async def test_a_learner_without_groups_stalls_with_the_pending_groups_named():
    clock = Clock()
    buffer = service(clock)
    await buffer.version_live(0)
    await finish(buffer, await admitted(buffer))
    pending = await admitted(buffer)
    assert await buffer.take(2, 0) is Answer.WAIT
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
    await buffer.version_live(0)
    first, _ = await admitted(buffer), await admitted(buffer)
    assert await buffer.take(2, 0) is Answer.WAIT
    clock.now = 20.0
    await finish(buffer, first)
    clock.now = 40.0
    assert await buffer.take(2, 0) is Answer.WAIT


async def test_discards_alone_are_no_progress():
    clock = Clock()
    buffer = service(clock)
    await buffer.version_live(0)
    ticket = await admitted(buffer)
    assert await buffer.take(2, 0) is Answer.WAIT
    clock.now = 31.0
    await buffer.discard(ticket, "ScoringError")
    with pytest.raises(StalledError, match=r"1 discarded \{'ScoringError': 1\}"):
        await buffer.take(2, 0)


async def test_admit_ends_with_the_run():
    buffer = service(Clock())
    for version in range(3):
        await buffer.version_live(version)
        for _ in range(2):
            await finish(buffer, await admitted(buffer))
        await buffer.take(2, version)
    assert await buffer.admit() is Answer.DONE
