"""Autoscaling: when a pool changes, and that it settles in simulated runs of the real buffer."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.config.pools import (
    Autoscale,
    PoolScale,
)
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.run.autoscaler import (
    HELD,
    REFUSED,
    REVERSAL,
    Autoscaler,
    Decision,
)
from rlhf_cluster.run.bottleneck_advisor import (
    Advice,
    advise,
)
from tests.support.builders.advice import (
    BOTH,
    COOLDOWN_S,
    advice,
    sized,
)
from tests.support.builders.run_configs import tiny_tree
from tests.support.simulation.simulated_services import (
    GROUPS,
    SimulatedServices,
)


def decided(scaler: Autoscaler, now_s: float, given: Advice, sizes) -> Decision:
    """And carried out."""
    decision = scaler.decide(now_s, given, sizes)
    if decision.action is not None:
        scaler.changed(now_s, decision.action, given)
    return decision


def test_a_generation_bound_run_gets_a_worker_and_the_reason_is_the_advisors():
    found = advice()
    action = Autoscaler(BOTH, {}).decide(0.0, found, sized()).action
    assert action is not None
    assert (action.pool, action.size, action.change) == ("generation", 2, 1)
    assert action.reason == found.text
    assert "generation-bound" in action.reason


def test_a_scoring_bound_run_gets_a_scoring_worker():
    action = Autoscaler(BOTH, {}).decide(0.0, advice(0.3, 1.0), sized()).action
    assert action is not None
    assert action.pool == "scoring"


def test_a_learner_bound_run_gives_workers_back_one_at_a_time():
    found = advice(0.2, 0.1, 1.0, sizes=(3, 2))
    action = Autoscaler(BOTH, {}).decide(0.0, found, sized(3, 2)).action
    assert action is not None
    assert action.change == -1
    assert "hardly busy" in action.reason
    assert f"{action.pool}" in action.reason


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (advice(sizes=(4, 1)), sized(4, 1)),  # at the maximum
        (advice(0.2, 0.1, 1.0), sized()),  # at the minimum
        (advice(steps=BOTH.steps - 1), sized()),  # too few steps
        (advice(), sized(2, 1)),  # of other pools than those of now
        (None, sized()),
        (advice(1.0, 0.99, 0.98), sized()),  # balanced: a worker gives nothing
    ],
)
def test_otherwise_nothing_is_done(given, sizes):
    assert Autoscaler(BOTH, {}).decide(0.0, given, sizes) == Decision()


def test_engines_with_room_are_no_reason_for_a_worker():
    for found in (advice(full=0.1), advice(scoring_s=1.0, full=0.1)):
        assert Autoscaler(BOTH, {}).decide(0.0, found, sized()).action is None
    assert Autoscaler(BOTH, {}).decide(0.0, advice(full=0.5), sized()).action is not None


def test_a_pool_without_a_section_keeps_its_size():
    only = Autoscale(scoring=PoolScale(maximum=4))
    assert Autoscaler(only, {}).decide(0.0, advice(), sized()).action is None


def test_a_gain_in_a_part_of_the_window_alone_is_no_reason():
    steady, bound = advice(1.0, 0.1, 0.99), advice()
    mixed = replace(bound, parts=(*bound.parts[:3], steady.parts[0]))
    assert Autoscaler(BOTH, {}).decide(0.0, mixed, sized()).action is None


def test_a_pool_rests_for_its_cooldown_and_longer_before_it_turns():
    scaler = Autoscaler(BOTH, {})
    assert decided(scaler, 0.0, advice(), sized()).action is not None
    now = advice(0.7, sizes=(2, 1))
    assert decided(scaler, COOLDOWN_S - 1, now, sized(2)).action is None
    assert decided(scaler, COOLDOWN_S, now, sized(2)).action is not None
    idle = advice(0.1, 0.1, 1.0, sizes=(3, 1))
    turned = COOLDOWN_S + REVERSAL * COOLDOWN_S
    assert decided(scaler, turned - 1, idle, sized(3)).action is None
    action = decided(scaler, turned, idle, sized(3)).action
    assert action is not None
    assert action.change == -1


def test_a_refused_change_is_tried_again_later_and_a_pool_changed_by_hand_is_left_alone():
    scaler = Autoscaler(BOTH, {})
    action = scaler.decide(0.0, advice(), sized()).action
    assert action is not None
    scaler.refused(0.0, action)
    assert scaler.decide(REFUSED * COOLDOWN_S - 1, advice(), sized()).action is None
    assert scaler.decide(REFUSED * COOLDOWN_S, advice(), sized()).action is not None
    scaler.resized_by_hand(1000.0, "generation")
    assert scaler.decide(1000.0 + COOLDOWN_S - 1, advice(), sized()).action is None
    assert scaler.decide(1000.0 + COOLDOWN_S, advice(), sized()).action is not None


def test_a_worker_that_gives_nothing_is_told_of_and_no_further_one_comes_for_long():
    scaler = Autoscaler(BOTH, {})
    decided(scaler, 0.0, advice(), sized())
    as_slow = advice(sizes=(2, 1))
    decision = decided(scaler, COOLDOWN_S, as_slow, sized(2))
    assert decision.action is None
    assert decision.note == (
        "generation worker 2 gave 1.00x, and 2.00x was foretold: no further one for 1000 s"
    )
    held = COOLDOWN_S + HELD * COOLDOWN_S
    assert decided(scaler, held - 1, as_slow, sized(2)) == Decision()
    assert decided(scaler, held, as_slow, sized(2)).action is not None


def test_the_budget_is_shared_and_an_idle_pool_gives_its_gpu_first():
    shared = BOTH.model_copy(update={"gpu_budget": 3.0})
    gpus = {"generation": 1.0, "scoring": 1.0}
    scaler = Autoscaler(shared, gpus)
    first = decided(scaler, 0.0, advice(sizes=(1, 2)), sized(1, 2)).action
    assert first is not None
    assert (first.pool, first.size) == ("scoring", 1)
    assert first.reason.startswith("its GPUs go to generation, autoscale.gpu_budget = 3")
    second = decided(scaler, 1.0, advice(sizes=(1, 1)), sized(1, 1)).action
    assert second is not None
    assert (second.pool, second.size) == ("generation", 2)


def test_a_full_budget_without_a_pool_that_can_spare_ends_growth():
    shared = BOTH.model_copy(update={"gpu_budget": 3.0})
    gpus = {"generation": 1.0, "scoring": 1.0}
    busy = advice(1.0, 0.9, sizes=(1, 2))
    assert Autoscaler(shared, gpus).decide(0.0, busy, sized(1, 2)).action is None


scales = st.builds(
    lambda low, more: PoolScale(minimum=low, maximum=low + more, cooldown_s=COOLDOWN_S),
    st.integers(1, 3),
    st.integers(0, 4),
)


@settings(max_examples=40)
@given(
    pools=st.fixed_dictionaries({"generation": scales, "scoring": scales}),
    gpus=st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 1.0])),
    spare=st.none() | st.floats(0, 6),
    demands=st.lists(
        st.tuples(*[st.floats(0.05, 3.0)] * 3, st.floats(1, 500)), min_size=1, max_size=30
    ),
)
def test_sizes_stay_within_bounds_budget_and_cooldown_whatever_is_measured(
    pools, gpus, spare, demands
):
    holds = dict(zip(("generation", "scoring"), gpus, strict=True))
    sizes = {name: scale.minimum for name, scale in pools.items()}
    start = sum(sizes[name] * holds[name] for name in sizes)
    budget = None if spare is None or start + spare <= 0 else start + spare
    scaler = Autoscaler(Autoscale(**pools, gpu_budget=budget), holds)
    now_s, changed = 0.0, {}
    for *seconds, passes_s in demands:
        now_s += passes_s
        given = advice(*seconds, sizes=(sizes["generation"], sizes["scoring"]), steps=8)
        action = decided(scaler, now_s, given, sizes).action
        if action is None:
            continue
        assert abs(action.size - sizes[action.pool]) == 1
        assert now_s - changed.get(action.pool, -COOLDOWN_S) >= COOLDOWN_S
        assert action.reason
        sizes[action.pool], changed[action.pool] = action.size, now_s
        assert pools[action.pool].minimum <= action.size <= pools[action.pool].maximum
        held = sum(sizes[name] * holds[name] for name in sizes)
        assert budget is None or held <= max(budget, start)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), target=st.sampled_from([1.0, 0.62, 0.35]))
def test_noise_makes_no_pool_flap(seed, target):
    """Each demand varies by 30 %. Work shrinks with the workers; the learner takes `target` of what one
    generation worker needs."""
    noise, scaler = random.Random(seed), Autoscaler(BOTH, {})
    sizes, directions = sized(), []
    for k in range(24):
        found = advice(
            1.0 / sizes["generation"],
            0.3 / sizes["scoring"],
            target,
            sizes=(sizes["generation"], sizes["scoring"]),
            noise=noise,
        )
        action = decided(scaler, k * REVERSAL * COOLDOWN_S, found, sizes).action
        if action is not None:
            sizes[action.pool] = action.size
            directions.append((action.pool, action.change))
    for pool in sizes:
        changes = [change for name, change in directions if name == pool]
        turns = sum(a != b for a, b in itertools.pairwise(changes))
        assert turns <= 1, directions


def test_even_a_signal_that_turns_each_time_turns_a_pool_ever_more_rarely():
    scaler, size, turned_at, last = Autoscaler(BOTH, {}), 2, [], 0
    for k in range(400):
        now_s = k * COOLDOWN_S
        wanted = -1 if last > 0 else 1
        given = advice(sizes=(size, 1)) if wanted > 0 else advice(0.1, 0.1, 1.0, sizes=(size, 1))
        # What it gave is as foretold, so that nothing but the turns holds it back.
        action = scaler.decide(now_s, given, sized(size)).action
        if action is None or action.pool != "generation":
            continue
        assert action.change == wanted
        scaler.changed(now_s, action, given)
        scaler._past["generation"].judged = True
        size, last = action.size, wanted
        turned_at.append(k)
    waits = [b - a for a, b in itertools.pairwise(turned_at)]
    assert waits == [REVERSAL * 2**n for n in range(len(waits))]
    assert len(waits) >= 5


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        ({"generate_s": 4.0 / GROUPS, "score_s": 0.2 / GROUPS, "train_s": 1.0}, sized(4, 1)),
        ({"generate_s": 2.2 / GROUPS, "score_s": 2.2 / GROUPS, "train_s": 1.0}, sized(2, 2)),
        ({"generate_s": 0.5 / GROUPS, "score_s": 0.2 / GROUPS, "train_s": 2.0}, sized(1, 1)),
    ],
)
def test_a_simulated_run_settles_where_a_worker_more_would_give_little(services, expected):
    """The real buffer, gates and advisor; each round is a stretch of the run at one size."""
    scaler, sizes, speeds = Autoscaler(BOTH, {}), sized(), []
    for k in range(14):
        run = SimulatedServices(**services, **sizes).run()
        speeds.append(1 / run.step_s)
        given = advise(run.records)
        assert given is not None
        action = decided(scaler, k * REVERSAL * COOLDOWN_S, given, sizes).action
        if action is None:
            break
        sizes[action.pool] = action.size
    assert sizes == expected
    assert speeds[-1] == pytest.approx(max(speeds), rel=0.05)
    assert speeds[-1] >= speeds[0]


def test_what_is_given_back_was_not_needed():
    services = {"generate_s": 0.5 / GROUPS, "score_s": 0.2 / GROUPS, "train_s": 2.0}
    many = SimulatedServices(**services, generation=4, scoring=3).run()
    scaler, sizes = Autoscaler(BOTH, {}), sized(4, 3)
    for k in range(10):
        run = SimulatedServices(**services, **sizes).run()
        action = decided(scaler, k * REVERSAL * COOLDOWN_S, advise(run.records), sizes).action
        if action is None:
            break
        sizes[action.pool] = action.size
    assert sizes == sized(1, 1)
    assert run.step_s == pytest.approx(many.step_s, rel=0.05)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "no pool would change"),
        ({"generation": {"maximum": 1}}, "the pool could not change"),
        ({"generation": {"maximum": 3, "minimum": 2}}, "generation.workers = 1 is not between"),
        (
            {"generation": {"maximum": 3}, "grow_at": 1.02},
            "autoscale.shrink_at = 1.03 is not under autoscale.grow_at = 1.02",
        ),
        ({"generation": {"maximum": 3}, "gpu_budget": 2}, "no worker holds a GPU"),
    ],
)
def test_impossible_settings_are_refused(section, words):
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny_tree(autoscale=section), source="run.toml")
    assert words in str(error.value)


def test_a_budget_under_the_start_is_refused():
    tree = tiny_tree(
        generation={"num_gpus": 1, "workers": 2},
        autoscale={"generation": {"maximum": 3}, "gpu_budget": 1},
    )
    with pytest.raises(ConfigError, match="is under the 2 GPUs"):
        validate(RunConfig, tree, source="run.toml")


def test_it_is_off_unless_asked_for():
    assert validate(RunConfig, tiny_tree(), source="run.toml").autoscale is None
