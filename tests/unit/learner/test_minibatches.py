"""Cutting a batch into optimizer steps."""

from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.learner.step.train_step import (
    minibatches,
    order_of_parts,
)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))
def test_every_rollout_is_in_one_part_and_parts_are_of_like_size(n, count, seed, number):
    parts = minibatches(n, count, seed, number)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert len(parts) == count
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == minibatches(n, count, seed, number)


def test_batches_are_cut_differently():
    assert minibatches(40, 4, 0, 0) != minibatches(40, 4, 0, 1) != minibatches(40, 4, 1, 1)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 9))
def test_every_epoch_trains_every_part_once(count, epochs, number):
    order = order_of_parts(count, epochs, 0, number)
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
