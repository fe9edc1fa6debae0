"""The theorem of docs/staleness.md on simulated runs with random durations, and what breaks it.

`tests/unit/buffer/test_staleness_machine.py` tests the same with crashes, resumes and scaling.
"""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.config.check_rollouts import largest_look_ahead
from tests.support.simulation.simulated_run import SimulatedRun

STEPS = 12


@settings(max_examples=200)
@given(
    max_staleness=st.integers(0, 5),
    pipeline_depth=st.integers(0, 5),
    groups_per_step=st.integers(1, 6),
    publish_every=st.integers(1, 4),
    look_ahead=st.integers(1, 20),
    in_flight=st.one_of(st.none(), st.integers(1, 20)),
    discard_rate=st.sampled_from([0.0, 0.1, 0.5]),
    on_stale=st.sampled_from(["wait", "drop", "reweight"]),
    slow_publish=st.sampled_from([0.5, 5.0]),
    seed=st.integers(0, 10_000),
)
def test_s9_no_trained_group_is_staler_than_the_bound_and_the_run_always_ends(
    max_staleness,
    pipeline_depth,
    groups_per_step,
    publish_every,
    look_ahead,
    in_flight,
    discard_rate,
    on_stale,
    slow_publish,
    seed,
):
    publish_every = min(publish_every, max_staleness + 1)
    largest = largest_look_ahead(
        max_staleness=max_staleness, publish_every=publish_every, groups_per_step=groups_per_step
    )
    gate = AdmissionGate(
        max_staleness=max_staleness,
        pipeline_depth=pipeline_depth,
        groups_per_step=groups_per_step,
        num_steps=STEPS,
        max_in_flight_groups=in_flight,
        look_ahead=min(look_ahead, largest),
        on_stale=on_stale,
        stale_limit=max_staleness + 2 if on_stale == "reweight" else None,
    )
    run = SimulatedRun(
        gate,
        seed,
        publish=lambda rng: slow_publish * rng.random(),
        publish_every=publish_every,
        discard_rate=discard_rate,
    ).run()
    assert len(run.ages) == STEPS * groups_per_step
    assert min(run.ages) >= 0
    assert max(run.ages) <= gate.bound
    stats = run.buffer.stats()
    numbers = [group.number for group in run.trained]
    assert len(set(numbers)) == len(numbers), "no group is trained twice"
    assert stats.admitted == len(numbers) + stats.num_discarded, "none is lost without a reason"
    assert stats.reweighted == sum(age > max_staleness for age in run.ages)
    if on_stale == "wait":
        assert set(stats.discarded) <= {"simulated"}


def test_staleness_zero_is_exactly_on_policy():
    gate = AdmissionGate(max_staleness=0, pipeline_depth=3, groups_per_step=4, num_steps=20)
    assert set(SimulatedRun(gate, 1, discard_rate=0.2).run().ages) == {0}


def stragglers(rng: random.Random) -> float:
    return 9.0 if rng.random() < 0.2 else 0.1


def worst_age(gate: AdmissionGate, **breaks) -> int:
    return max(
        max(SimulatedRun(gate, s, duration=stragglers, **breaks).run().ages) for s in range(20)
    )


@pytest.mark.parametrize("look_ahead", [1, 2, 5])
def test_the_bound_is_reached_so_it_could_not_be_smaller(look_ahead):
    """A slow publish, and K whole steps admitted at the version before it."""
    gate = AdmissionGate(
        max_staleness=3,
        pipeline_depth=3,
        groups_per_step=2,
        num_steps=60,
        look_ahead=look_ahead,
    )
    assert worst_age(gate) == 3


BOUND_3 = AdmissionGate(max_staleness=3, pipeline_depth=3, groups_per_step=2, num_steps=60)


def test_taking_in_completion_order_breaks_the_bound():
    """Counterexample 1: age 4 and more with bound 3."""
    assert worst_age(BOUND_3) <= 3
    assert worst_age(BOUND_3, order="completion") >= 4


def test_a_window_that_slides_past_the_oldest_group_breaks_the_bound():
    """Counterexample 2: the first 2 that are left, whatever their numbers; bound 3."""
    window = replace(BOUND_3, look_ahead=2)
    assert worst_age(window) <= 3
    assert worst_age(window, order="sliding", window=2) >= 4


def test_a_window_that_admission_does_not_pay_for_breaks_the_bound():
    """Counterexample 3: a window of 2 in front of the gate for strict order; bound 3."""
    assert worst_age(replace(BOUND_3, look_ahead=2), order="window", window=2) <= 3
    assert worst_age(BOUND_3, order="window", window=2) == 4


def test_counting_a_version_live_when_it_is_published_breaks_the_bound():
    """Counterexample 4: the slowest worker still samples with the version before; bound 3."""
    slow_pull = {"pull": lambda rng: 5 * rng.random()}
    assert worst_age(BOUND_3, **slow_pull) <= 3
    assert worst_age(BOUND_3, **slow_pull, live_at="published") >= 4


def test_counting_a_version_live_early_is_noticed_by_the_buffer():
    """The buffer refuses a group with tokens older than its ticket; here the report is honest."""

    class Honest(SimulatedRun):
        def _summary(self, ticket, version):
            return replace(super()._summary(ticket, version), oldest_version=version)

    run = Honest(BOUND_3, 0, pull=lambda rng: 5 * rng.random(), live_at="published")
    with pytest.raises(Exception, match="older than those reported live"):
        run.run()


def simulated_time(max_staleness: int, look_ahead: int) -> float:
    gate = AdmissionGate(
        max_staleness=max_staleness,
        pipeline_depth=2,
        groups_per_step=4,
        num_steps=60,
        look_ahead=look_ahead,
    )
    at_once = {"publish": lambda rng: 0.0, "pull": lambda rng: 0.0}
    return sum(SimulatedRun(gate, seed, **at_once).run().env.now for seed in range(10))


def test_a_window_is_paid_for_with_run_ahead():
    """G = 4, D = 2, publishes take no time. With K = 4 the window of 5 costs (5 - 1) / 4 = 1 step of
    the 2 to spare; with K = 2 none is to spare, and a window of 9 leaves no step of run-ahead."""
    assert simulated_time(4, look_ahead=5) < 0.95 * simulated_time(4, look_ahead=1)
    assert simulated_time(2, look_ahead=9) > 1.5 * simulated_time(2, look_ahead=1)
