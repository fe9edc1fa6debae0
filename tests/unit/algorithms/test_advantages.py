"""Advantages by group id and by token, against slow loops and the cases that go wrong."""

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.algorithms.advantages import (
    decoupled_advantages,
    gae,
    group_advantages,
    leave_one_out_advantages,
    process_advantages,
    terminal_rewards,
    whiten,
)
from rlhf_cluster.errors import RecordError

REWARDS = [1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.0, 1.0]
GROUPS = ["a"] * 4 + ["b"] * 3 + ["c"] * 4

reward = st.floats(-100, 100, allow_subnormal=False)
groups_of_rewards = st.lists(st.tuples(reward, st.sampled_from("abcd")), min_size=1, max_size=24)


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


def test_leave_one_out_matches_hand_numbers() -> None:
    # group a: the others of 1 are 2, 3, 6 with mean 11/3, those of 2 are 1, 3, 6 with mean 10/3 ...
    found = leave_one_out_advantages([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 7.0], [*"aaaa", *"bb", "c"])
    np.testing.assert_allclose(
        found, [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3, 0, 0, 0], rtol=1e-6
    )
    assert found.dtype == np.float32


@given(groups_of_rewards)
def test_leave_one_out_is_the_slow_loop_over_the_other_members(
    scored: list[tuple[float, str]],
) -> None:
    rewards, ids = [r for r, _ in scored], [g for _, g in scored]
    found = leave_one_out_advantages(rewards, ids)
    for i, (own, owner) in enumerate(scored):
        others = [r for j, (r, g) in enumerate(scored) if g == owner and j != i]
        expected = own - sum(others) / len(others) if others else 0.0
        assert found[i] == pytest.approx(expected, abs=1e-3, rel=1e-5)


EVERY = [
    lambda r, g: group_advantages(r, g, True),
    lambda r, g: group_advantages(r, g, False),
    leave_one_out_advantages,
    lambda r, g: decoupled_advantages([{"a": x, "b": x * x} for x in r], {"a": 1, "b": 2}, g, True),
]


@pytest.mark.parametrize("advantages", EVERY)
def test_s17_uneven_groups_in_any_order_give_the_same_result_by_id(advantages: Any) -> None:
    rewards = [1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.0, 1.5]
    ids = ["a"] * 4 + ["b"] * 3 + ["c"] * 4
    expected = advantages(rewards, ids)
    assert expected[4:7].tolist() == [0, 0, 0], "all equal; against the batch it would not be"
    order = list(range(len(rewards)))
    random.Random(0).shuffle(order)
    found = advantages([rewards[i] for i in order], [ids[i] for i in order])
    np.testing.assert_allclose(found, expected[order], rtol=1e-6)


@pytest.mark.parametrize("advantages", EVERY)
def test_s17_a_group_of_one_has_advantage_zero(advantages: Any) -> None:
    assert advantages([7.0, 1.0, 2.0], ["x", "y", "y"])[0] == 0


@pytest.mark.parametrize("advantages", EVERY)
def test_s18_a_member_that_never_came_leaves_the_group_of_the_others(advantages: Any) -> None:
    whole = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    alone = advantages(whole, ["g"] * 7)
    beside = advantages([*whole, 0.3, 0.7], [*["g"] * 7, "h", "h"])
    np.testing.assert_array_equal(beside[:7], alone)
    scored_zero = advantages([*whole, 0.0], ["g"] * 8)
    assert not np.allclose(scored_zero[:7], alone), "a failure that scores 0 moves the others"


@pytest.mark.parametrize("advantages", EVERY)
@pytest.mark.parametrize("base", [0.0, 0.3, 1000.0])
def test_s19_rewards_equal_up_to_rounding_have_advantage_exactly_zero(
    advantages: Any, base: float
) -> None:
    rewards = [base, base + 1e-7 * max(1, base), base - 1e-7 * max(1, base)]
    assert advantages(rewards, ["g"] * 3).tolist() == [0, 0, 0]


def test_s19_small_but_real_differences_are_kept() -> None:
    assert group_advantages([0.500, 0.501], ["g"] * 2, True)[1] > 0.5


def test_rewards_that_are_not_finite_or_not_as_many_as_groups_are_refused() -> None:
    with pytest.raises(RecordError, match="finite"):
        group_advantages([1.0, math.nan], ["g"] * 2, True)
    with pytest.raises(RecordError, match="3 rewards for 2"):
        leave_one_out_advantages([1.0, 2.0, 3.0], ["g"] * 2)


def test_rewards_normalised_apart_keep_what_their_sum_forgets() -> None:
    # correctness in {0, 1} and a length reward in {0, 100}: in the sum correctness is 1 % of it
    parts = [{"right": r, "short": s} for r, s in ((1.0, 0.0), (0.0, 100.0), (1.0, 100.0))]
    summed = group_advantages([p["right"] + p["short"] for p in parts], ["g"] * 3, True)
    assert summed[1] > 0 > summed[0], "the larger scale decides"
    found = decoupled_advantages(parts, {"right": 1.0, "short": 0.5}, ["g"] * 3, True)
    third = 1 / 3 / (math.sqrt(1 / 3) + 1e-4)  # (1 - 2/3) / std of (1, 0, 1)
    third_100 = 100 / 3 / (100 * math.sqrt(1 / 3) + 1e-4)
    expected = [third - 2 * 0.5 * third_100, -2 * third + 0.5 * third_100, third + 0.5 * third_100]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RecordError, match=r"\['right', 'short'\], weights are given for \['right'"):
        decoupled_advantages(parts, {"right": 1.0}, ["g"] * 3, True)


def test_step_rewards_are_normalised_in_the_group_and_summed_onward() -> None:
    # two responses, step rewards (1, 0) ending at tokens 1 and 3, and (1) ending at token 0
    found = process_advantages(
        [np.array([1.0, 0.0]), np.array([1.0])],
        [np.array([1, 3]), np.array([0])],
        [5, 2],
        ["g", "g"],
        normalize_std=True,
    )
    scale = math.sqrt(1 / 3) + 1e-4  # Bessel-corrected deviation of 1, 0, 1
    high, low = (1 - 2 / 3) / scale, (0 - 2 / 3) / scale
    np.testing.assert_allclose(found[0], [high + low, high + low, low, low, 0], rtol=1e-5)
    np.testing.assert_allclose(found[1], [high, 0], rtol=1e-5)


@given(
    st.lists(
        st.tuples(st.lists(reward, max_size=5), st.integers(5, 12), st.sampled_from("ab")),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_process_advantages_are_the_slow_loop(
    rollouts: list[tuple[list[float], int, str]], draw: random.Random
) -> None:
    ends = [sorted(draw.choices(range(t), k=len(r))) for r, t, _ in rollouts]
    found = process_advantages(
        [np.array(r) for r, _, _ in rollouts],
        [np.array(e, dtype=int) for e in ends],
        [t for _, t, _ in rollouts],
        [g for *_, g in rollouts],
        normalize_std=False,
    )
    for (rewards, length, owner), own_ends, values in zip(rollouts, ends, found, strict=True):
        steps = [r for other, _, g in rollouts if g == owner for r in other]
        mean = sum(steps) / len(steps) if steps else 0.0
        for token in range(length):
            expected = sum(r - mean for r, e in zip(rewards, own_ends, strict=True) if e >= token)
            assert values[token] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("ends", [[1, 0], [0, 5], [-1, 2], [1]])
def test_steps_that_do_not_lie_in_the_response_are_refused(ends: list[int]) -> None:
    with pytest.raises(RecordError, match="one end per reward"):
        process_advantages([np.ones(2)], [np.array(ends)], [5], ["g"], True)


def _one(
    rewards: list[float], values: list[float], mask: list[bool], discount: float, trace: float
) -> tuple[np.ndarray, np.ndarray]:
    found = gae(
        [np.array(rewards)], [np.array(values)], [np.array(mask)], discount=discount, trace=trace
    )
    return found[0][0], found[1][0]


def test_gae_gives_the_published_example() -> None:
    # delta of the last token 0.8 - 0.7 = 0.1, of the others 0.05: A = 0.1, 0.05 + 0.95 * 0.1, ...
    values = [0.5, 0.55, 0.6, 0.65, 0.7]
    rewards = terminal_rewards(0.8, np.ones(5, bool)).tolist()
    advantages, returns = _one(rewards, values, [True] * 5, discount=1.0, trace=0.95)
    expected = [0.1]
    for _ in range(4):
        expected.append(0.05 + 0.95 * expected[-1])
    np.testing.assert_allclose(advantages[::-1], expected, rtol=1e-6)
    np.testing.assert_allclose(advantages[::-1][:3], [0.1, 0.145, 0.18775], rtol=1e-6)
    np.testing.assert_allclose(returns, advantages + values, rtol=1e-6)


def test_s20_the_value_of_a_masked_token_does_not_leak() -> None:
    advantages, returns = _one([0, 1, 0], [0, 0, 100], [True, True, False], 1.0, 0.95)
    np.testing.assert_allclose(advantages, [0.95, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(returns, [0.95, 1, 0], rtol=1e-6)


def _slow_gae(rewards: Any, values: Any, discount: float, trace: float) -> list[float]:
    """The definition: every advantage as its own sum of discounted errors."""
    count = len(rewards)
    errors = [
        rewards[t] + (discount * values[t + 1] if t + 1 < count else 0.0) - values[t]
        for t in range(count)
    ]
    return [
        sum((discount * trace) ** (k - t) * errors[k] for k in range(t, count))
        for t in range(count)
    ]


rollout_tokens = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=60)
@given(st.lists(rollout_tokens, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_s20_gae_is_the_slow_sum_and_masked_tokens_change_nothing(
    rollouts: list[list[tuple[float, float, bool]]], discount: float, trace: float
) -> None:
    masks = [np.array([m for *_, m in tokens]) for tokens in rollouts]
    rewards = [np.array([r if m else 0.0 for r, _, m in tokens]) for tokens in rollouts]
    values = [np.array([v if m else math.nan for _, v, m in tokens]) for tokens in rollouts]
    advantages, returns = gae(rewards, values, masks, discount, trace)
    for r, v, m, found, back in zip(rewards, values, masks, advantages, returns, strict=True):
        expected = _slow_gae(r[m], v[m], discount, trace)
        np.testing.assert_allclose(found[m], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(back[m], expected + v[m], rtol=1e-5, atol=1e-5)
        assert not found[~m].any()
        assert not back[~m].any()


def test_s22_the_score_lands_on_the_last_trained_token() -> None:
    assert terminal_rewards(2.0, np.array([1, 1, 0], bool)).tolist() == [0, 2, 0]
    assert terminal_rewards(2.0, np.array([1, 1, 1, 0, 0], bool)).tolist() == [0, 0, 2, 0, 0]
    assert terminal_rewards(2.0, np.zeros(2, bool)).tolist() == [0, 0]
    with pytest.raises(RecordError, match="would be lost"):
        _one([0, 0, 1], [0, 0, 0], [True, True, False], 1.0, 1.0)


def test_gae_refuses_what_does_not_fit() -> None:
    with pytest.raises(RecordError, match=r"rewards \[2\], values \[1\]"):
        _one([0, 1], [0], [True, True], 1.0, 1.0)
    with pytest.raises(RecordError, match="not finite"):
        _one([0, 1], [0, math.nan], [True, True], 1.0, 1.0)


def test_s21_whitening_looks_at_trained_tokens_only() -> None:
    # trained tokens 0, 1, 2: mean 1 (0.5 if the three masked ones counted as 0)
    padded = [np.array([0.0, 1.0, 7.0]), np.array([math.nan, 2.0, -9.0])]
    masks = [np.array([True, True, False]), np.array([False, True, False])]
    found = whiten(padded, masks)
    deviation = math.sqrt(2 / 3)
    np.testing.assert_allclose(found[0], [-1 / deviation, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1], [0, 1 / deviation, 0], rtol=1e-6)
    short = whiten([np.array([0.0, 1.0]), np.array([2.0])], [np.ones(2, bool), np.ones(1, bool)])
    np.testing.assert_array_equal(np.concatenate(short), [found[0][0], found[0][1], found[1][1]])


@given(st.lists(rollout_tokens, min_size=1, max_size=5))
def test_s21_whitened_tokens_have_mean_zero_and_deviation_one(
    rollouts: list[list[tuple[float, float, bool]]],
) -> None:
    values = [np.array([v for _, v, _ in tokens]) for tokens in rollouts]
    masks = [np.array([m for *_, m in tokens]) for tokens in rollouts]
    found = whiten(values, masks)
    tokens = np.concatenate([v[m] for v, m in zip(found, masks, strict=True)]).astype(np.float64)
    before = np.concatenate([v[m] for v, m in zip(values, masks, strict=True)])
    assert all(not v[~m].any() for v, m in zip(found, masks, strict=True))
    if tokens.size < 2 or np.ptp(before) < 1e-3:
        assert np.isfinite(tokens).all()
    else:
        assert tokens.mean() == pytest.approx(0, abs=1e-5)
        assert tokens.std() == pytest.approx(1, abs=1e-5)
        assert (np.diff(tokens[np.argsort(before)]) >= -1e-6).all()


@pytest.mark.parametrize("count", [0, 1])
def test_s21_none_and_one_token_are_finite(count: int) -> None:
    (found,) = whiten([np.array([5.0, 6.0])], [np.arange(2) < count])
    assert found.tolist() == [0, 0]
    assert whiten([], []) == []
