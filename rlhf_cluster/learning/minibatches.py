"""The optimizer steps of one batch: which units each of them computes with (numpy).

A unit is what must be trained together: a rollout, or those of a group. Promises: the parts depend on
the seed, the batch's number and its size alone, so every rank cuts alike and the number of ranks
changes nothing; in each epoch every unit is in exactly one part; parts differ in size by at most one.
Parts keep their members over epochs, only their order changes, so that each rank meets the same
sequences again and what it computed for them stays with it.
"""

from __future__ import annotations

import numpy as np


def minibatches(num_units: int, count: int, seed: int, number: int) -> list[list[int]]:
    """Cut units 0 .. num_units - 1 into `count` random parts, each in rising order."""
    if count == 1:
        return [list(range(num_units))]
    shuffled = np.random.default_rng((seed, number)).permutation(num_units)
    return [sorted(int(i) for i in part) for part in np.array_split(shuffled, count)]


def order_of_parts(count: int, epochs: int, seed: int, number: int) -> list[int]:
    """The parts in the order they are trained in, every one once an epoch: [count * epochs]."""
    if count == 1:
        return [0] * epochs
    random = np.random.default_rng((seed, number, 1))
    return [int(i) for _ in range(epochs) for i in random.permutation(count)]
