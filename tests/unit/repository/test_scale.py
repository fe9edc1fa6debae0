"""Many workers, in virtual time: slow storage and lost nodes end no healthy worker and no run."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.scale import at, hang, hang_reading, limit_s, over_limit_after, simulated, soon
from tests.support.simulation.simulated_cluster import (
    GB,
    Shape,
)

SMALL = Shape(nodes=6, workers_per_node=4, files=24, steps=4, groups_per_step=24)
SHORT = {"pull_timeout_s": 20.0, "pull_bytes_per_s": 1 * GB}


def test_the_storage_gives_each_file_once_and_24_readers_wait_little_longer_than_one():
    outcome = simulated(SMALL)
    assert (outcome.steps, outcome.ended) == (4, "")
    assert outcome.storage_bytes == pytest.approx(5 * SMALL.num_bytes), "five versions"
    one_copy_s = SMALL.num_bytes / SMALL.storage
    memory_s = SMALL.num_bytes / SMALL.reader
    assert max(outcome.live_s) < 2 * one_copy_s + memory_s + 0.5 * one_copy_s
    alone = simulated(Shape(**{**vars(SMALL), "relay": False}))
    assert min(alone.live_s) > 10 * one_copy_s


def test_a_node_never_holds_more_than_two_versions_and_a_slow_minute_ends_with_itself():
    outcome = simulated(SMALL, soon(18.0, lambda c: c.slow_links(60.0, 0.01)))
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (4, "", 0)
    assert over_limit_after(SMALL, outcome.live_s[2:3], 0) > 2.0, "it was slow"
    assert over_limit_after(SMALL, outcome.live_s, 3) < 1.4, "and is no longer"
    assert outcome.storage_bytes == pytest.approx(5 * SMALL.num_bytes)
    assert outcome.versions_held == pytest.approx(2.0, rel=1e-5), "the newest, and what it replaces"


def test_a_start_takes_the_time_in_which_the_storage_gives_the_model_to_every_node():
    for storage in (10 * GB, 5 * GB):
        shape = Shape(**{**vars(SMALL), "storage": storage, "steps": 1})
        given_s = shape.nodes * shape.num_bytes / storage
        memory_s = shape.workers_per_node * shape.num_bytes / shape.memory
        begun_s = 30.0 + given_s + memory_s
        assert simulated(shape).started_s == pytest.approx(begun_s + limit_s(shape) / 2, rel=0.2)


@pytest.mark.parametrize(
    ("events", "live", "started"),
    [
        (soon(60.0, lambda c: c.lose_workers(12)), 24, 36),
        (soon(18.0, lambda c: c.lose_nodes(0, 1)), 16, 24),
        (at(0, hang), 20, None),
        (soon(5.0, lambda c: c.stall_storage(65.0)), 24, 24),
        (soon(18.0, lambda c: c.stall_storage(65.0)), 24, 24),
    ],
    ids=["half", "rack", "bad node", "stalled write", "stalled read"],
)
def test_lost_nodes_and_stalls_cost_neither_the_run_nor_a_healthy_worker(events, live, started):
    outcome = simulated(SMALL, events)
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (4, "", 0)
    assert outcome.live_at_end == live
    assert started is None or outcome.started == started
    assert outcome.behind == 0


def test_a_stall_longer_than_a_workers_deadline_costs_a_publish_and_no_worker():
    shape = Shape(**{**vars(SMALL), "num_bytes": 8 * GB, "generation": SHORT})
    outcome = simulated(shape, soon(1.0, lambda c: c.stall_storage(250.0)))
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (4, "", 0)
    assert (outcome.live_at_end, outcome.started) == (24, 24)
    assert outcome.refused > 0, "nobody could read it in time, and it was published again"


def test_n13_a_node_to_which_the_storage_gives_nothing_has_its_copy_from_others_in_time():
    """All readers of the node ask at one moment, and have the same deadline."""
    shape = Shape(**{**vars(SMALL), "num_bytes": 8 * GB, "generation": SHORT})
    outcome = simulated(shape, at(1, hang_reading))
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (4, "", 0)
    assert (outcome.refused, outcome.most_behind, outcome.live_at_end) == (0, 0, 24)


TINY = Shape(
    nodes=4,
    workers_per_node=3,
    files=6,
    num_bytes=8 * GB,
    steps=5,
    groups_per_step=12,
    group_s=90.0,
)
HAPPENINGS = {
    "lose a worker": lambda cluster: cluster.lose_workers(1),
    "lose half": lambda cluster: cluster.lose_workers(6),
    "stall": lambda cluster: cluster.stall_storage(65.0),
}


# a failure is not made smaller: tasks are told apart by their addresses, so that orders differ
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    happenings=st.lists(
        st.tuples(st.integers(0, 3), st.floats(0.0, 250.0), st.sampled_from(sorted(HAPPENINGS))),
        max_size=3,
        unique_by=lambda each: each[2],
    ),
    max_staleness=st.integers(0, 3),
)
def test_the_real_pool_and_client_keep_the_bound_whatever_is_lost_or_slow(
    happenings, max_staleness
):
    """What the theorem of the bound supposes: nobody works, and nobody joins, with older weights than
    those that were announced as live."""
    shape = Shape(**{**vars(TINY), "max_staleness": max_staleness, "generation": SHORT})

    def events(cluster, now):
        for step, delay_s, name in happenings:
            if step == now:
                cluster.loop.call_later(delay_s, HAPPENINGS[name], cluster)

    outcome = simulated(shape, events)
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (5, "", 0)
    assert outcome.stale_starts == []
    assert len(outcome.staleness) == 60
    assert max(outcome.staleness) <= max_staleness


def test_n03_a_slow_moment_of_the_network_is_forgotten_when_it_is_over():
    """It lasts longer than the workers' deadline: every reader gives up in the middle of its fetches,
    and no source is to blame."""
    shape = Shape(**{**vars(SMALL), "num_bytes": 8 * GB, "steps": 6, "generation": SHORT})
    calm = simulated(shape)
    outcome = simulated(shape, soon(1.0, lambda c: c.slow_network(100.0, 0.0)))
    assert (outcome.steps, outcome.ended, outcome.healthy_killed) == (6, "", 0)
    assert outcome.refused > 0, "nobody could read it in time"
    assert outcome.live_s[3:] == pytest.approx(calm.live_s[3:], rel=0.05)
    one_more = calm.storage_bytes + outcome.refused * shape.num_bytes
    assert outcome.storage_bytes <= one_more, "the relay goes on as before"
