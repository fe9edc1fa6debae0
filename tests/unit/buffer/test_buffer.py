import pytest

from rlhf_cluster.buffer.buffer import (
    ExperienceBuffer,
    trim_to_bound,
)
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.config.check_rollouts import largest_look_ahead
from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.records import BufferState, Ticket
from tests.support.fakes.services import (
    finished_group,
    make_group,
    make_prompt,
)


def gate(**changes) -> AdmissionGate:
    values = {"max_staleness": 1, "pipeline_depth": 1, "groups_per_step": 2, "num_steps": 10}
    return AdmissionGate(**(values | changes))


def finish(buffer: ExperienceBuffer, ticket: Ticket, version: int | None = None) -> bool:
    version = ticket.version if version is None else version
    group = make_group(ticket, make_prompt(), [0.0, 1.0], version=version)
    return buffer.finish(finished_group(ticket, group))


def admit_all(buffer: ExperienceBuffer) -> list[Ticket]:
    tickets = []
    while (ticket := buffer.admit()) is not None:
        tickets.append(ticket)
    return tickets


def test_nothing_is_admitted_before_a_version_is_live():
    buffer = ExperienceBuffer(gate())
    assert buffer.admit() is None
    buffer.set_live_version(0)
    assert buffer.admit() == Ticket(number=0, version=0)


def test_staleness_zero_admits_one_step_at_a_time():
    buffer = ExperienceBuffer(gate(max_staleness=0, pipeline_depth=5))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 2
    for ticket in tickets:
        finish(buffer, ticket)
    buffer.take(2)
    buffer.set_learner_version(1)
    assert buffer.admit() is None, "version 1 is not live yet"
    buffer.set_live_version(1)
    assert [t.version for t in admit_all(buffer)] == [1, 1]


def test_pipeline_depth_paces_below_the_bound():
    buffer = ExperienceBuffer(gate(max_staleness=4, pipeline_depth=1))
    buffer.set_live_version(0)
    assert len(admit_all(buffer)) == 4


def test_in_flight_limit_holds_back_and_finish_frees():
    buffer = ExperienceBuffer(gate(max_staleness=4, pipeline_depth=4, max_in_flight_groups=3))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 3
    finish(buffer, tickets[1])
    assert len(admit_all(buffer)) == 1


def test_a_discard_frees_a_place_among_those_in_flight():
    buffer = ExperienceBuffer(gate(max_staleness=4, pipeline_depth=4, max_in_flight_groups=3))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    buffer.discard(tickets[0], "ScoringError")
    assert buffer.num_in_flight == len(buffer.stats().in_flight) == 2
    assert len(admit_all(buffer)) == 1


def test_groups_leave_in_admission_order_not_in_completion_order():
    buffer = ExperienceBuffer(gate())
    buffer.set_live_version(0)
    first, second, third, _ = admit_all(buffer)
    finish(buffer, third)
    finish(buffer, second)
    assert not buffer.ready(2), "the oldest group is still in flight"
    finish(buffer, first)
    assert [t.ticket.number for t in buffer.take(2)] == [0, 1]


def test_a_discard_frees_its_slot_and_is_counted():
    buffer = ExperienceBuffer(gate())
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    buffer.discard(tickets[0], "ScoringError")
    assert len(admit_all(buffer)) == 1
    for ticket in tickets[1:3]:
        finish(buffer, ticket)
    assert [t.ticket.number for t in buffer.take(2)] == [1, 2]
    assert buffer.stats().discarded == {"ScoringError": 1}


def test_no_group_is_admitted_beyond_the_last_step():
    buffer = ExperienceBuffer(gate(num_steps=1, max_staleness=3, pipeline_depth=3))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 2
    for ticket in tickets:
        finish(buffer, ticket)
    assert not buffer.complete
    buffer.take(2)
    assert buffer.complete
    assert buffer.admit() is None


def test_a_ticket_ends_exactly_once():
    buffer = ExperienceBuffer(gate())
    buffer.set_live_version(0)
    ticket = buffer.admit()
    assert ticket is not None
    finish(buffer, ticket)
    with pytest.raises(RecordError, match="g00000000.*exactly once"):
        finish(buffer, ticket)
    with pytest.raises(RecordError, match="discard of group g00000000"):
        buffer.discard(ticket, "late")


def test_versions_never_go_back():
    buffer = ExperienceBuffer(gate())
    buffer.set_live_version(3)
    with pytest.raises(StalenessError, match="from 3 to 2"):
        buffer.set_live_version(2)


def test_tokens_older_than_the_live_version_are_refused():
    buffer = ExperienceBuffer(gate(max_staleness=9))
    buffer.set_live_version(4)
    ticket = buffer.admit()
    assert ticket is not None
    with pytest.raises(StalenessError, match="holds tokens of version 3"):
        finish(buffer, ticket, version=3)


def test_take_raises_when_the_bound_is_broken():
    buffer = ExperienceBuffer(gate(max_staleness=1))
    buffer.set_live_version(0)
    for ticket in admit_all(buffer)[:2]:
        finish(buffer, ticket)
    buffer.set_learner_version(2)
    with pytest.raises(StalenessError, match="staleness 2 is outside 0..1"):
        buffer.take(2)
    assert buffer.stats().ready == 2, "nothing is lost by the refusal"


def test_a_version_from_the_future_is_refused():
    with pytest.raises(StalenessError, match="staleness -1"):
        gate(max_staleness=5).check(group_id="g", oldest_version=3, learner_version=2)


def take_numbers(buffer: ExperienceBuffer, num_groups: int) -> list[int]:
    return [taken.ticket.number for taken in buffer.take(num_groups)]


def test_the_window_lets_a_slow_group_be_overtaken_by_as_many_as_it_allows():
    """G = 2, K = 2, W = 3: the bound admits (2 + 0 + 1) * 2 - 2 = 4 groups at version 0."""
    buffer = ExperienceBuffer(gate(look_ahead=3, max_staleness=2, pipeline_depth=2))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 4
    finish(buffer, tickets[2])
    assert not buffer.ready(2), "one of the window 0..2 is finished"
    finish(buffer, tickets[3])
    assert not buffer.ready(2), "group 3 is outside the window of group 0"
    finish(buffer, tickets[1])
    assert take_numbers(buffer, 2) == [1, 2]
    buffer.set_learner_version(1)
    assert not buffer.ready(1), "group 0 has been overtaken twice and is waited for"
    finish(buffer, tickets[0])
    assert take_numbers(buffer, 2) == [0, 3]


def test_the_window_moves_on_with_the_groups_that_a_batch_itself_takes():
    buffer = ExperienceBuffer(gate(look_ahead=2, max_staleness=2, pipeline_depth=2))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    for number in (0, 2, 3):
        finish(buffer, tickets[number])
    assert buffer.ready(2), "after group 0 the window is 1..2"
    assert not buffer.ready(3), "group 3 stays outside while group 1 is missing"
    assert take_numbers(buffer, 2) == [0, 2]


def test_a_discarded_head_moves_the_window():
    buffer = ExperienceBuffer(gate(look_ahead=2, max_staleness=2, pipeline_depth=2))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    finish(buffer, tickets[1])
    finish(buffer, tickets[2])
    assert not buffer.ready(2)
    buffer.discard(tickets[0], "WorkerError")
    assert take_numbers(buffer, 2) == [1, 2]


def test_the_largest_look_ahead_still_admits_whole_steps_and_one_more_does_not():
    """The learner is at version 1, version 0 is live (a version is published every 2 steps)."""
    limit = largest_look_ahead(max_staleness=3, publish_every=2, groups_per_step=4)
    assert limit == 9
    for look_ahead, slots in ((limit, 8), (limit + 1, 7)):
        found = gate(
            max_staleness=3, pipeline_depth=9, groups_per_step=4, look_ahead=look_ahead
        ).capacity(learner_version=1, live_version=0, num_kept=0, num_in_flight=0)
        assert found == slots, "the second step needs groups 0..7 in all"


def test_drop_admits_past_a_slow_publish_and_discards_what_got_too_old():
    buffer = ExperienceBuffer(gate(on_stale="drop", max_staleness=1, pipeline_depth=1))
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    for ticket in tickets:
        finish(buffer, ticket)
    assert take_numbers(buffer, 2) == [0, 1]
    buffer.set_learner_version(1)
    late = admit_all(buffer)
    assert [t.version for t in late] == [0, 0], "on_stale = wait has no slot here"
    finish(buffer, late[0])
    assert take_numbers(buffer, 2) == [2, 3]
    buffer.set_learner_version(2)
    assert buffer.stats().discarded == {"stale": 1}, "group 4 would be trained at staleness 2"
    assert buffer.admit() is None, "a group of version 0 is too old for step 2 from the start"
    assert not finish(buffer, late[1], version=0), "too old when it finishes"
    assert buffer.stats().discarded == {"stale": 2}
    buffer.set_live_version(1)
    replaced = admit_all(buffer)
    assert [t.number for t in replaced] == [6, 7, 8, 9], "both slots and the next step's"
    for ticket in replaced:
        finish(buffer, ticket)
    assert take_numbers(buffer, 2) == [6, 7]


def test_reweight_trains_up_to_its_limit_counts_it_and_raises_beyond():
    rules = gate(on_stale="reweight", max_staleness=1, stale_limit=2, pipeline_depth=3)
    buffer = ExperienceBuffer(rules)
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    assert len(tickets) == 4, "max_staleness alone decides while publishing keeps up"
    for step in range(2):
        for ticket in tickets[:2]:
            finish(buffer, ticket)
        assert len(buffer.take(2)) == 2
        buffer.set_learner_version(step + 1)
        tickets = [*tickets[2:], *admit_all(buffer)]
    assert buffer.stats().admitted == 6, "(stale_limit + live + 1) * 2: one step beyond the bound"
    for ticket in tickets:
        finish(buffer, ticket)
    buffer.take(2)
    stats = buffer.stats()
    assert (stats.reweighted, stats.num_discarded) == (2, 0)
    assert buffer.admit() is None, "version 0 at step 3 would be over stale_limit"
    with pytest.raises(StalenessError, match="outside 0..2 .staleness.stale_limit"):
        rules.check(group_id="g", oldest_version=0, learner_version=3)


def test_wait_has_no_slot_until_the_publish_is_live():
    buffer = ExperienceBuffer(gate(max_staleness=1, pipeline_depth=3))
    buffer.set_live_version(0)
    for ticket in admit_all(buffer):
        finish(buffer, ticket)
    buffer.take(2)
    buffer.set_learner_version(1)
    assert buffer.admit() is None
    buffer.set_live_version(1)
    assert len(admit_all(buffer)) == 2


def test_a_new_pipeline_depth_paces_the_next_admission():
    buffer = ExperienceBuffer(gate(max_staleness=3, pipeline_depth=0))
    buffer.set_live_version(0)
    assert len(admit_all(buffer)) == 2
    buffer.set_pipeline_depth(2)
    assert len(admit_all(buffer)) == 4
    buffer.set_pipeline_depth(0)
    assert buffer.admit() is None


def counters(**changes) -> BufferState:
    values = {
        "learner_version": 50,
        "admitted": 400,
        "finished": 400,
        "taken": 400,
        "reweighted": 0,
        "discarded": {},
        "open": (),
    }
    return BufferState(**(values | changes))


def test_s29_a_resume_goes_on_from_the_counters():
    """v = 50, K = 2, 8 groups a step: (2 + 50 + 1) * 8 - 400 = 24 slots; from zero it is 424."""
    rules = gate(max_staleness=2, pipeline_depth=2, groups_per_step=8, num_steps=100)
    buffer = ExperienceBuffer.resume(rules, counters())
    buffer.set_live_version(50)
    tickets = admit_all(buffer)
    assert len(tickets) == 24
    assert {t.version for t in tickets} == {50}
    assert [t.number for t in tickets] == list(range(400, 424))
    from_zero = rules.capacity(learner_version=50, live_version=50, num_kept=0, num_in_flight=0)
    assert from_zero == 424


@pytest.mark.parametrize(
    "changes",
    [
        {"admitted": 0, "finished": 0, "taken": 0},
        {"learner_version": 0},
        {"taken": 408, "admitted": 408},
        {"discarded": {"stale": 1}},
        {"open": (Ticket(number=399, version=50),)},
    ],
)
def test_s29_counters_that_do_not_belong_to_the_version_are_refused(changes):
    rules = gate(max_staleness=2, pipeline_depth=2, groups_per_step=8, num_steps=100)
    with pytest.raises(StalenessError, match="same checkpoint"):
        ExperienceBuffer.resume(rules, counters(**changes))


@pytest.mark.parametrize("look_ahead", [1, 3])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_d10_a_resume_under_a_smaller_bound_trains_nothing_over_it(bound, look_ahead):
    wide = ExperienceBuffer(gate(max_staleness=5, pipeline_depth=5))
    wide.set_live_version(0)
    admit_all(wide)
    for ticket in list(wide._waiting.values())[:2]:
        finish(wide, ticket)
    wide.take(2)
    wide.set_learner_version(1)
    wide.set_live_version(1)
    admit_all(wide)
    state = wide.state()
    now = gate(max_staleness=bound, pipeline_depth=bound, look_ahead=min(look_ahead, 2 * bound + 1))
    kept = trim_to_bound(state, now)
    assert [t.number for t in kept.open] == [t.number for t in state.open][: len(kept.open)]
    assert len(kept.open) + kept.discarded["stale"] == len(state.open)
    free = now.capacity(learner_version=1, live_version=1, num_kept=2, num_in_flight=0)
    assert len(kept.open) == free, (
        "as many as could be admitted now: what the bound's proof supposes"
    )
    buffer = ExperienceBuffer.resume(now, kept)
    buffer.set_live_version(1)
    *others, held = (
        kept.open
    )  # the last of them is slow, and overtaken by all that the window allows
    for ticket in others:  # generated again at once, with the weights of the checkpoint
        finish(buffer, ticket, version=1)
    for version in range(1, 7):
        buffer.set_live_version(version)
        for ticket in admit_all(buffer):
            finish(buffer, ticket)
        if held is not None and not buffer.ready(2):
            finish(buffer, held, version=1)
            held = None
        buffer.take(2)  # raises over the bound
    assert held is None
    assert trim_to_bound(kept, now) is kept


def test_a_resumed_buffer_has_its_open_groups_in_flight_again():
    buffer = ExperienceBuffer(gate())
    buffer.set_live_version(0)
    tickets = admit_all(buffer)
    for ticket in tickets[:3]:
        finish(buffer, ticket)
    buffer.take(2)
    buffer.set_learner_version(1)
    again = ExperienceBuffer.resume(gate(), buffer.state())
    assert again.state() == buffer.state()
    assert again.stats().in_flight == ("g00000002", "g00000003")
    assert again.admit() is None, "no version is live after a resume until it is pulled"
    again.set_live_version(1)
    assert [t.number for t in admit_all(again)] == [4, 5]
    finish(again, tickets[2], version=1)
    finish(again, tickets[3], version=1)
    assert take_numbers(again, 2) == [2, 3]
