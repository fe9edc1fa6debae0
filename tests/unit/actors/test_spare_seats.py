"""Which process becomes which learner rank, and settings of spares that nothing would come of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.services.hot_spare_actors import (
    describe_seats,
    rank_of,
    seats,
)
from rlhf_cluster.planning.placement import demand
from tests.support.builders.run_configs import tiny_config


@pytest.mark.parametrize(
    ("ranks", "lost", "spares", "expected"),
    [
        (2, {1}, ["a"], (None, "a")),
        (2, {1}, ["a", "b"], ("b", "a")),
        (4, {3, 1}, ["a"], (None, "a", None, None)),
        (4, {3, 1}, ["a", "b", "c"], ("c", "a", None, "b")),
        (3, set(), ["a"], ("a", None, None)),
        (3, {2}, [], (None, None, None)),
        (1, {0}, ["a", "b"], ("a",)),
        (2, {3}, ["a"], ("a", None)),
    ],
)
def test_a_spare_takes_a_lost_rank_before_any_other(ranks, lost, spares, expected):
    assert seats(ranks, lost, spares) == expected


@given(st.integers(1, 8), st.sets(st.integers(0, 9)), st.integers(0, 10))
def test_no_spare_waits_while_a_rank_starts_and_none_takes_two(ranks, lost, num_spares):
    spares = list(range(num_spares))
    taken = seats(ranks, lost, spares)
    used = [spare for spare in taken if spare is not None]
    assert len(taken) == ranks
    assert sorted(used) == spares[:ranks]
    here = {rank for rank in lost if rank < ranks}
    assert sum(taken[rank] is not None for rank in here) == min(len(here), num_spares)


@pytest.mark.parametrize(
    ("process", "expected"),
    [("learner-1", {1}), ("learner-12", {12}), ("buffer", set()), ("", set()), ("spare-1", set())],
)
def test_the_name_of_a_process_says_which_rank_it_was(process: str, expected: set[int]):
    assert rank_of(process) == expected


def test_what_is_done_with_which_rank_is_one_line():
    assert describe_seats((None, "spare-0 (process 77 on 10.0.0.1)", None), {1}) == (
        "learner ranks from hot spares: rank 1 (lost) is spare-0 (process 77 on 10.0.0.1); "
        "ranks 0, 2 a new process"
    )


def test_a_spare_needs_a_place_as_large_as_a_ranks():
    config = tiny_config(
        learner={"ranks": 2, "spares": 1, "num_gpus": 1.0, "num_cpus": 4.0},
        cluster={"worker_groups": True},
    )
    bundles = {bundle.owner: bundle for bundle in demand(config)}
    assert bundles["spare-0"].resources == bundles["learner-1"].resources
    assert [name for name in bundles if name.startswith("spare")] == ["spare-0"]
