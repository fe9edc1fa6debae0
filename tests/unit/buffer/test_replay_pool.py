"""Groups that are trained again: which, how often, with what weight, and the same after a resume."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rlhf_cluster.buffer.buffer import (
    ExperienceBuffer,
    buffer_metrics,
)
from rlhf_cluster.buffer.group_store import (
    ExperienceStore,
    collect,
)
from rlhf_cluster.buffer.replay_pool import (
    FLOOR,
    ReplayPool,
    build_replay_pool,
    choose,
    draw,
    inclusion,
    replay_metrics,
)
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.records import (
    BufferState,
    GroupSummary,
    StoredGroup,
    Ticket,
    TrainedGroup,
    TrainingGroup,
)
from rlhf_cluster.sections.rl_run import Replay
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import (
    finished_group,
    make_group,
    make_prompt,
)

SPREAD = Replay(priority="reward_spread", alpha=1.0)


def taken(number: int, oldest: int = 0, rewards: Sequence[float] = (0.0, 1.0)) -> TrainingGroup:
    ticket = Ticket(number=number, version=oldest, attempt=3)
    summary = GroupSummary(
        group_id=ticket.group_id,
        oldest_version=oldest,
        num_rollouts=len(rewards),
        num_tokens=7,
        rewards=tuple(rewards),
        parts={"exact_match": 0.5},
    )
    return TrainingGroup(ticket=ticket, handle=f"object {number}", summary=summary)


def used(number: int, rewards: Sequence[float] = (0.0, 1.0)) -> TrainedGroup:
    one = taken(number, rewards=rewards)
    return TrainedGroup(ticket=one.ticket, summary=one.summary, steps=(1,))


def pool(num: int = 2, seed: int = 0, max_staleness: int = 3, **values) -> ReplayPool:
    return ReplayPool(Replay(**values), num, seed, max_staleness)


def numbers(groups: Sequence[TrainingGroup]) -> list[int]:
    return [group.ticket.number for group in groups]


# -- the draw ---------------------------------------------------------------------------------


def test_inclusion_is_in_proportion_and_never_over_one():
    assert inclusion([1.0, 1.0, 2.0, 4.0], 2).tolist() == [0.25, 0.25, 0.5, 1.0]
    assert inclusion([1.0, 1.0, 1.0, 9.0], 2).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert inclusion([3.0, 5.0], 2).tolist() == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(
    priorities=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_a_draw_has_as_many_places_as_asked_and_each_once(priorities, share, seed):
    num = max(1, round(share * len(priorities)))
    found = inclusion(priorities, num)
    assert found.sum() == pytest.approx(num)
    assert (found <= 1).all()
    places = draw(found.tolist(), np.random.default_rng(seed))
    assert len(places) == num
    assert places == sorted(set(places))
    assert set(places) <= set(range(len(priorities)))


def test_each_place_is_drawn_with_its_own_probability():
    probabilities = [0.1, 0.9, 0.35, 0.65, 1.0]
    random, times = np.random.default_rng(5), 2000
    counts = Counter(p for _ in range(times) for p in draw(probabilities, random))
    for place, probability in enumerate(probabilities):
        deviation = (probability * (1 - probability) / times) ** 0.5
        assert abs(counts[place] / times - probability) <= 5 * deviation


# -- the choice -------------------------------------------------------------------------------


def test_uniform_replay_weighs_nothing_and_takes_all_where_there_are_no_more():
    found = choose([used(3), used(5)], 4, Replay(), np.random.default_rng(0))
    assert numbers(found) == [3, 5]
    assert [group.handle for group in found] == [StoredGroup(n, 1, 1.0) for n in (3, 5)]
    assert choose([], 2, Replay(), np.random.default_rng(0)) == []


def test_importance_weights_by_hand():
    """Mean absolute deviations 0.5 and 0.1, one of two: shares 0.9 * s / 0.6 + 0.05."""
    groups = [used(0, (0.0, 1.0)), used(1, (0.4, 0.6))]
    assert [group.spread for group in groups] == pytest.approx([0.5, 0.1])
    expected = {0: 0.5 / 0.8, 1: 0.5 / 0.2}
    seen = {}
    for seed in range(20):
        [found] = choose(groups, 1, SPREAD, np.random.default_rng(seed))
        seen[found.ticket.number] = found.handle.weight
    assert seen == pytest.approx(expected)
    root = SPREAD.model_copy(update={"beta": 0.5})
    [found] = choose(groups[:1] * 2, 1, root, np.random.default_rng(0))
    assert found.handle.weight == 1.0, "as likely as in a uniform draw"
    [found] = choose(groups, 1, root, np.random.default_rng(0))
    assert found.handle.weight == pytest.approx(expected[found.ticket.number] ** 0.5)


def test_priority_shifts_frequencies_and_the_weights_take_it_back():
    """With beta = 1 a candidate's expected weight is that of a uniform draw, n / N."""
    groups = [used(n, (0.5 - d, 0.5 + d)) for n, d in enumerate((0.0, 0.05, 0.1, 0.2, 0.5, 0.5))]
    random, times = np.random.default_rng(1), 2000
    counts, weights = Counter[int](), Counter[int]()
    for _ in range(times):
        for found in choose(groups, 2, SPREAD, random):
            counts[found.ticket.number] += 1
            weights[found.ticket.number] += found.handle.weight
    frequencies = [counts[n] / times for n in range(6)]
    assert frequencies == sorted(frequencies[:5]) + frequencies[5:]
    assert frequencies[4] > 5 * frequencies[1] > 0
    assert frequencies[0] == pytest.approx(2 * FLOOR / 6, rel=0.3), "no spread, and not forgotten"
    for n in range(6):
        assert weights[n] / times == pytest.approx(2 / 6, rel=0.3)


def test_no_weight_is_over_the_bound_and_equal_rewards_are_uniform():
    groups = [used(0, (0.0, 1e6)), *(used(n, (0.0, 1e-6)) for n in range(1, 20))]
    for seed in range(20):
        for found in choose(groups, 3, SPREAD, np.random.default_rng(seed)):
            assert 0 < found.handle.weight <= 1 / FLOOR
    flat = [used(n, (0.5, 0.5)) for n in range(5)]
    for found in choose(flat, 2, SPREAD, np.random.default_rng(0)):
        assert found.handle.weight == pytest.approx(1)


# -- over the steps of a run ------------------------------------------------------------------


def run_steps(replay: ReplayPool, first: int, last: int, fresh: int = 3) -> list[list[int]]:
    """Step s trains `fresh` groups sampled with version s - 1, and what is replayed."""
    found = []
    for version in range(first, last):
        again = replay.take(version)
        group = [taken(n, version) for n in range(version * fresh, (version + 1) * fresh)]
        replay.record_trained(group, version)
        found.append([*numbers(group), *numbers(again)])
    return found


@pytest.mark.parametrize("max_uses", [2, 3])
@pytest.mark.parametrize("max_staleness", [1, 3])
def test_no_group_is_too_old_nor_trained_too_often_nor_twice_in_a_step(max_uses, max_staleness):
    replay = pool(max_uses=max_uses, max_staleness=max_staleness)
    steps = run_steps(replay, 0, 30)
    uses = Counter(itertools.chain.from_iterable(steps))
    assert max(uses.values()) == min(max_uses, max_staleness + 1)
    for version, own in enumerate(steps):
        assert len(set(own)) == len(own)
        assert all(version - number // 3 <= max_staleness for number in own)
    assert [len(own) for own in steps] == [3] + [5] * 29, "the first step has none to replay"
    assert replay.replayed == 29 * 2
    assert {used.summary.oldest_version for used in replay.state(30)} <= set(
        range(30 - max_staleness, 30)
    )


def test_the_choice_follows_from_the_seed():
    runs = [run_steps(pool(seed=seed), 0, 12) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_pool_that_goes_on_from_its_state_chooses_the_same(cut):
    settings = {"priority": "reward_spread", "max_uses": 3}
    straight = pool(**settings)
    steps = run_steps(straight, 0, cut)
    state, count = straight.state(cut), straight.replayed
    steps += run_steps(straight, cut, 12)
    again = pool(**settings)
    again.load_state(state, count)
    assert run_steps(again, cut, 12) == steps[cut:]
    assert (again.state(12), again.replayed) == (straight.state(12), straight.replayed)


def test_what_is_forgotten_is_replayed_no_more():
    replay = pool(num=3)
    run_steps(replay, 0, 1)
    replay.exclude([1, 77])
    assert numbers(replay.take(1)) == [0, 2]


def test_a_use_that_may_not_be_is_an_error():
    replay = pool(num=1)
    replay.record_trained([taken(0)], 0)
    with pytest.raises(
        RecordError, match=r"group g00000000 .* step 2 as its use 1, and steps \[1\]"
    ):
        replay.record_trained([taken(0)], 1)
    [again] = replay.take(1)
    replay.load_state([used(0)], 0)
    replay.settings = Replay(max_uses=2)
    replay._use(again, 2)
    with pytest.raises(RecordError, match=r"as its use 2, and steps \[1, 2\]"):
        replay._use(again, 3)
    replay.load_state([used(0)], 0)
    with pytest.raises(RecordError, match="would be trained by step 1"):
        replay._use(again, 1)


# -- in the buffer ----------------------------------------------------------------------------


GATE = AdmissionGate(max_staleness=3, pipeline_depth=1, groups_per_step=2, num_steps=8)


def run(buffer: ExperienceBuffer, num_steps: int) -> list[list[TrainingGroup]]:
    """Steps of a run whose versions are live at once."""
    found = []
    for _ in range(num_steps):
        buffer.set_live_version(buffer.learner_version)
        while (ticket := buffer.admit()) is not None:
            finish(buffer, ticket)
        found.append(buffer.take(2))
        buffer.set_learner_version(buffer.learner_version + 1)
    return found


def finish(buffer: ExperienceBuffer, ticket: Ticket) -> None:
    group = make_group(ticket, make_prompt(), [0.0, 1.0], version=ticket.version)
    buffer.finish(finished_group(ticket, group))


def test_a_step_has_its_fresh_groups_first_and_no_counter_counts_the_others():
    buffer = ExperienceBuffer(GATE, replay=pool())
    steps = run(buffer, 8)
    assert [numbers(groups)[:2] for groups in steps] == [[2 * s, 2 * s + 1] for s in range(8)]
    assert [[group.uses for group in groups] for groups in steps[:2]] == [[0, 0], [0, 0, 1, 1]]
    assert buffer.complete
    stats = buffer.stats()
    assert (stats.taken, stats.replayed) == (16, 14)
    values = buffer_metrics(stats)
    assert values["buffer/replayed_total"] == 14
    assert values["buffer/replayable"] == stats.replayable > 0
    plain = ExperienceBuffer(GATE)
    run(plain, 1)
    assert {name for name in buffer_metrics(plain.stats()) if "replay" in name} == set()
    assert plain.state().used == ()


def test_a_resumed_buffer_hands_out_the_same_groups_again():
    straight = ExperienceBuffer(GATE, replay=pool(priority="reward_spread"))
    run(straight, 3)
    state = straight.state()
    assert state.replayable == tuple(sorted(each.ticket.number for each in state.used))
    again = ExperienceBuffer.resume(GATE, state, pool(priority="reward_spread"))
    for ticket in state.open:
        finish(again, ticket)
    for before, after in zip(run(straight, 5), run(again, 5), strict=True):
        assert numbers(before) == numbers(after)
        assert [g.handle for g in before[2:]] == [g.handle for g in after[2:]]
    assert straight.state() == again.state()


def test_a_checkpoint_keeps_what_may_be_replayed_to_the_bit():
    buffer = ExperienceBuffer(GATE, replay=pool(priority="reward_spread"))
    buffer.set_live_version(0)
    while (ticket := buffer.admit()) is not None:
        group = make_group(ticket, make_prompt(), [0.1, 1 / 3, ticket.number], version=0)
        buffer.finish(finished_group(ticket, group))
    buffer.take(2)
    buffer.set_learner_version(1)
    state = buffer.state()
    assert state.replayable == (0, 1)
    adapter = TypeAdapter(BufferState)
    assert adapter.validate_json(adapter.dump_json(state)) == state


def test_a_replayed_group_over_the_bound_is_never_handed_out():
    buffer = ExperienceBuffer(GATE, replay=pool(max_staleness=5, max_uses=9))
    with pytest.raises(StalenessError, match=r"staleness [45] is outside 0\.\.3"):
        run(buffer, 8)


# -- its handles, metrics and settings --------------------------------------------------------


def test_what_is_read_again_knows_its_use_and_its_weight(tmp_path):
    store = ExperienceStore(tmp_path)
    store.write(make_group(Ticket(number=4, version=0), make_prompt(4), [0.0, 1.0]))
    [group] = collect([(4, StoredGroup(4, uses=1, weight=0.25))], lambda handles: [], store)
    assert (group.uses, group.weight) == (1, 0.25)
    [fresh] = collect([(4, StoredGroup(4))], lambda handles: [], store)
    assert (fresh.uses, fresh.weight) == (0, 1.0)


def replay_config(**section):
    return tiny_config(
        staleness={"max_staleness": 3}, buffer={"replay": {"fraction": 0.5, **section}}
    )


def test_metrics_of_a_step_by_hand():
    replay = replay_config().buffer.replay
    groups = [taken(8), taken(9), used(3).taken(0.5)]
    assert replay_metrics(groups, replay, 4) == {
        "replay/groups": 1,
        "replay/missing_groups": 1,
        "replay/uses_mean": 2,
        "replay/weight_mean": 0.5,
    }
    assert replay_metrics(groups[:2], replay, 4) == {
        "replay/groups": 0,
        "replay/missing_groups": 2,
    }
    assert replay_metrics(groups, None, 4) == {}


def test_the_settings_of_a_run_make_its_pool():
    config = replay_config(max_uses=4)
    found = build_replay_pool(config.buffer.replay, config.run, config.staleness)
    assert found is not None
    assert (found.num, found.max_staleness, found.settings.max_uses) == (2, 3, 4)
    assert config.fresh_groups == 2
    assert build_replay_pool(None, config.run, config.staleness) is None
    assert tiny_config().fresh_groups == 4
