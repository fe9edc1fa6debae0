"""The bound of rlhf_cluster.experience.staleness, on simulated runs with random durations."""

import heapq
import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.experience.buffer import ExperienceBuffer
from rlhf_cluster.experience.staleness import AdmissionGate
from rlhf_cluster.records import GroupSummary, Ticket


def simulate(
    gate: AdmissionGate,
    rng: random.Random,
    *,
    publish_every: int,
    discard_rate: float,
    duration: Callable[[random.Random], float],
    in_order: bool = True,
) -> list[int]:
    """An event simulation of one run. Returns the staleness of every trained group."""
    buffer = ExperienceBuffer(gate)
    buffer.version_live(0)
    sampler, learner, now = 0, 0, 0.0
    events: list[tuple[float, int, str, object]] = []
    counter, ages, training = 0, [], False
    done_early: list[tuple[Ticket, int]] = []

    def at(delay: float, kind: str, what: object) -> None:
        nonlocal counter
        counter += 1
        heapq.heappush(events, (now + delay, counter, kind, what))

    for _ in range(200_000):
        while (ticket := buffer.admit()) is not None:
            at(duration(rng), "sampled", (ticket, sampler))
        if not training:
            ready = (
                buffer.ready(gate.groups_per_step)
                if in_order
                else len(done_early) >= (gate.groups_per_step)
            )
            if ready and learner < gate.num_steps:
                if in_order:
                    taken = [t.summary.oldest_version for t in buffer.take(gate.groups_per_step)]
                else:
                    batch = done_early[: gate.groups_per_step]
                    del done_early[: gate.groups_per_step]
                    taken = [version for _, version in batch]
                ages += [learner - version for version in taken]
                training = True
                at(rng.random(), "trained", None)
        if not events:
            break
        now, _, kind, what = heapq.heappop(events)
        if kind == "sampled":
            ticket, version = what
            if rng.random() < discard_rate:
                buffer.discard(ticket, "simulated")
                continue
            summary = GroupSummary(
                group_id=ticket.group_id,
                oldest_version=version,
                num_rollouts=1,
                num_tokens=1,
                rewards=(0.0,),
            )
            buffer.finish(ticket, None, summary)
            done_early.append((ticket, version))
        elif kind == "trained":
            training, learner = False, learner + 1
            buffer.saw_learner(learner)
            if learner % publish_every == 0:
                at(rng.random() * 2, "live", learner)
        elif what > sampler:
            sampler = what
            buffer.version_live(sampler)
    assert learner == gate.num_steps, f"deadlock at step {learner}: {buffer.stats()}"
    return ages


def long_tailed(rng: random.Random) -> float:
    return rng.lognormvariate(0.0, 1.5)


@settings(max_examples=150, deadline=None)
@given(
    max_staleness=st.integers(0, 5),
    pipeline_depth=st.integers(0, 5),
    groups_per_step=st.integers(1, 6),
    publish_every=st.integers(1, 4),
    in_flight=st.one_of(st.none(), st.integers(1, 20)),
    discard_rate=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 10_000),
)
def test_s9_no_trained_group_is_staler_than_the_bound_and_the_run_always_ends(
    max_staleness, pipeline_depth, groups_per_step, publish_every, in_flight, discard_rate, seed
):
    gate = AdmissionGate(
        max_staleness=max_staleness,
        pipeline_depth=pipeline_depth,
        groups_per_step=groups_per_step,
        num_steps=12,
        max_in_flight_groups=in_flight,
    )
    ages = simulate(
        gate,
        random.Random(seed),
        publish_every=min(publish_every, max_staleness + 1),
        discard_rate=discard_rate,
        duration=long_tailed,
    )
    assert len(ages) == 12 * groups_per_step
    assert min(ages) >= 0
    assert max(ages) <= max_staleness


def test_staleness_zero_is_exactly_on_policy():
    gate = AdmissionGate(max_staleness=0, pipeline_depth=3, groups_per_step=4, num_steps=20)
    ages = simulate(gate, random.Random(1), publish_every=1, discard_rate=0.2, duration=long_tailed)
    assert set(ages) == {0}


def test_taking_in_completion_order_breaks_the_bound():
    gate = AdmissionGate(max_staleness=2, pipeline_depth=2, groups_per_step=2, num_steps=60)
    worst = max(
        max(
            simulate(
                gate,
                random.Random(seed),
                publish_every=1,
                discard_rate=0.0,
                duration=lambda rng: 9.0 if rng.random() < 0.2 else 0.1,
                in_order=False,
            )
        )
        for seed in range(20)
    )
    assert worst > 2


def test_s34_slow_groups_are_trained_as_often_as_fast_ones():
    gate = AdmissionGate(max_staleness=2, pipeline_depth=2, groups_per_step=4, num_steps=50)
    generated: list[float] = []

    def recorded(rng: random.Random) -> float:
        generated.append(long_tailed(rng))
        return generated[-1]

    ages = simulate(gate, random.Random(3), publish_every=1, discard_rate=0.0, duration=recorded)
    assert len(ages) == len(generated), "every generated group, however slow, was trained"
