"""Advantages by group id, against a slow loop and the cases that go wrong."""

import math
import random

import numpy as np
import pytest

from rlhf_cluster.algorithms.advantages import group_advantages
from rlhf_cluster.errors import RecordError

REWARDS = [1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.0, 1.0]
GROUPS = ["a"] * 4 + ["b"] * 3 + ["c"] * 4


def test_advantages_match_hand_numbers() -> None:
    found = group_advantages(REWARDS, GROUPS, normalize_std=True)
    std_a, std_c = math.sqrt(14 / 3), math.sqrt(1 / 3)
    expected_a = [v / (std_a + 1e-4) for v in (-2, -1, 0, 3)]
    expected_c = [v / (std_c + 1e-4) for v in (-0.5, 0.5, -0.5, 0.5)]
    np.testing.assert_allclose(found, [*expected_a, 0, 0, 0, *expected_c], rtol=1e-6)
    assert found.dtype == np.float32


def test_without_the_standard_deviation_rewards_are_only_centred() -> None:
    found = group_advantages(REWARDS, GROUPS, normalize_std=False)
    np.testing.assert_allclose(found, [-2, -1, 0, 3, 0, 0, 0, -0.5, 0.5, -0.5, 0.5])


def test_s17_uneven_groups_in_any_order_give_the_same_result_by_id() -> None:
    expected = group_advantages(REWARDS, GROUPS, normalize_std=True)
    order = list(range(len(REWARDS)))
    random.Random(0).shuffle(order)
    found = group_advantages([REWARDS[i] for i in order], [GROUPS[i] for i in order], True)
    np.testing.assert_array_equal(found, expected[order])
    assert found[[i for i, o in enumerate(order) if GROUPS[o] == "b"]].tolist() == [0, 0, 0]


def test_s17_a_group_of_one_has_advantage_zero() -> None:
    assert group_advantages([7.0, 1.0, 2.0], ["x", "y", "y"], True)[0] == 0


@pytest.mark.parametrize("base", [0.0, 0.3, 1000.0])
def test_s19_rewards_equal_up_to_rounding_have_advantage_exactly_zero(base: float) -> None:
    rewards = [base, base + 1e-7 * max(1, base), base - 1e-7 * max(1, base)]
    assert group_advantages(rewards, ["g"] * 3, True).tolist() == [0, 0, 0]


def test_s19_small_but_real_differences_are_kept() -> None:
    assert group_advantages([0.500, 0.501], ["g"] * 2, True)[1] > 0.5


def test_rewards_that_are_not_finite_or_not_as_many_as_groups_are_refused() -> None:
    with pytest.raises(RecordError, match="finite"):
        group_advantages([1.0, math.nan], ["g"] * 2, True)
    with pytest.raises(RecordError, match="3 rewards for 2"):
        group_advantages([1.0, 2.0, 3.0], ["g"] * 2, True)
