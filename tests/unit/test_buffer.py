import pytest

from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.experience.buffer import ExperienceBuffer
from rlhf_cluster.experience.staleness import AdmissionGate, check_staleness
from rlhf_cluster.records import Ticket
from tests.fakes import make_group, make_prompt


def gate(**changes) -> AdmissionGate:
    values = {"max_staleness": 1, "pipeline_depth": 1, "groups_per_step": 2, "num_steps": 10}
    return AdmissionGate(**(values | changes))


def finish(buffer: ExperienceBuffer, ticket: Ticket, version: int | None = None) -> None:
    version = ticket.version if version is None else version
    group = make_group(ticket, make_prompt(), [0.0, 1.0], version=version)
    buffer.finish(ticket, group, group.summary())


def admit_all(buffer: ExperienceBuffer) -> list[Ticket]:
    tickets = []
    while (ticket := buffer.admit()) is not None:
        tickets.append(ticket)
    return tickets


def test_nothing_is_admitted_before_a_version_is_live():
    buffer = ExperienceBuffer(gate())
    assert buffer.admit() is None
    buffer.version_live(0)
    assert buffer.admit() == Ticket(number=0, version=0)


def test_staleness_zero_admits_one_step_at_a_time():
    buffer = ExperienceBuffer(gate(max_staleness=0, pipeline_depth=5))
    buffer.version_live(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 2
    for ticket in tickets:
        finish(buffer, ticket)
    buffer.take(2)
    buffer.saw_learner(1)
    assert buffer.admit() is None, "version 1 is not live yet"
    buffer.version_live(1)
    assert [t.version for t in admit_all(buffer)] == [1, 1]


def test_pipeline_depth_paces_below_the_bound():
    buffer = ExperienceBuffer(gate(max_staleness=4, pipeline_depth=1))
    buffer.version_live(0)
    assert len(admit_all(buffer)) == 4


def test_in_flight_limit_holds_back_and_finish_frees():
    buffer = ExperienceBuffer(gate(max_staleness=4, pipeline_depth=4, max_in_flight_groups=3))
    buffer.version_live(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 3
    finish(buffer, tickets[1])
    assert len(admit_all(buffer)) == 1


def test_groups_leave_in_admission_order_not_in_completion_order():
    buffer = ExperienceBuffer(gate())
    buffer.version_live(0)
    first, second, third, _ = admit_all(buffer)
    finish(buffer, third)
    finish(buffer, second)
    assert not buffer.ready(2), "the oldest group is still in flight"
    finish(buffer, first)
    assert [t.ticket.number for t in buffer.take(2)] == [0, 1]


def test_a_discard_frees_its_slot_and_is_counted():
    buffer = ExperienceBuffer(gate())
    buffer.version_live(0)
    tickets = admit_all(buffer)
    buffer.discard(tickets[0], "ScoringError")
    assert len(admit_all(buffer)) == 1
    for ticket in tickets[1:3]:
        finish(buffer, ticket)
    assert [t.ticket.number for t in buffer.take(2)] == [1, 2]
    assert buffer.stats().discarded == {"ScoringError": 1}


def test_no_group_is_admitted_beyond_the_last_step():
    buffer = ExperienceBuffer(gate(num_steps=1, max_staleness=3, pipeline_depth=3))
    buffer.version_live(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 2
    for ticket in tickets:
        finish(buffer, ticket)
    assert buffer.complete


def test_a_ticket_ends_exactly_once():
    buffer = ExperienceBuffer(gate())
    buffer.version_live(0)
    ticket = buffer.admit()
    assert ticket is not None
    finish(buffer, ticket)
    with pytest.raises(RecordError, match="g00000000.*exactly once"):
        finish(buffer, ticket)
    with pytest.raises(RecordError, match="discard of group g00000000"):
        buffer.discard(ticket, "late")


def test_versions_never_go_back():
    buffer = ExperienceBuffer(gate())
    buffer.version_live(3)
    with pytest.raises(StalenessError, match="from 3 to 2"):
        buffer.version_live(2)


def test_tokens_older_than_the_live_version_are_refused():
    buffer = ExperienceBuffer(gate(max_staleness=9))
    buffer.version_live(4)
    ticket = buffer.admit()
    assert ticket is not None
    with pytest.raises(StalenessError, match="holds tokens of version 3"):
        finish(buffer, ticket, version=3)


def test_take_raises_when_the_bound_is_broken():
    buffer = ExperienceBuffer(gate(max_staleness=1))
    buffer.version_live(0)
    for ticket in admit_all(buffer)[:2]:
        finish(buffer, ticket)
    buffer.saw_learner(2)
    with pytest.raises(StalenessError, match="staleness 2 is outside 0..1"):
        buffer.take(2)
    assert buffer.stats().ready == 2, "nothing is lost by the refusal"


def test_a_version_from_the_future_is_refused():
    with pytest.raises(StalenessError, match="staleness -1"):
        check_staleness(group_id="g", oldest_version=3, learner_version=2, max_staleness=5)
