"""PPO: estimates from values, the clipped value loss, and their gradients."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_cluster.algorithms.algorithm import ValueInputs
from rlhf_cluster.algorithms.ppo import Ppo, PpoConfig, clipped_value_loss
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.tiny_learner import (
    loss_inputs,
    make_group,
    make_prompt,
    make_scored,
    random_groups,
)


def _group(
    rewards: list[float], masks: list[list[bool]], ref: float | None = None
) -> list[ExperienceGroup]:
    prompt = make_prompt(0, [3])
    scored = [
        make_scored(
            f"0/{i}",
            prompt,
            [7] * len(mask),
            [-1.0] * len(mask),
            reward,
            mask=mask,
            ref_logprobs=None if ref is None else [ref] * len(mask),
        )
        for i, (reward, mask) in enumerate(zip(rewards, masks, strict=True))
    ]
    return [make_group(0, prompt, scored)]


def _array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_the_published_example_is_the_estimate_of_one_answer() -> None:
    ppo = Ppo(PpoConfig(whiten=False))
    values = _array(0.5, 0.55, 0.6, 0.65, 0.7)
    advantages, returns = ppo.estimate(_group([0.8], [[True] * 5]), [[values]])
    np.testing.assert_allclose(advantages[0][0][::-1][:3], [0.1, 0.145, 0.18775], rtol=1e-5)
    np.testing.assert_allclose(returns[0][0], advantages[0][0] + values, rtol=1e-6)


def test_s22_the_reward_and_s20_the_values_skip_masked_tokens() -> None:
    ppo = Ppo(PpoConfig(whiten=False))
    groups = _group([1.0], [[True, False, True, False]])
    advantages, returns = ppo.estimate(groups, [[_array(0.2, math.nan, 0.5, 100.0)]])
    # trained tokens: values 0.2, 0.5, reward 1 on the second; delta 0.3 and 0.5
    np.testing.assert_allclose(advantages[0][0], [0.3 + 0.95 * 0.5, 0, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(returns[0][0], [0.975, 0, 1.0, 0], rtol=1e-6)


def test_a_kl_in_the_reward_is_paid_token_by_token_and_enters_the_returns() -> None:
    config = PpoConfig(whiten=False, kl_coef=0.1, kl_in="reward", trace=1.0)
    groups = _group([1.0], [[True, True]], ref=-3.0)  # k1 = -1 - (-3) = 2 a token
    advantages, returns = Ppo(config).estimate(groups, [[_array(0.0, 0.0)]])
    np.testing.assert_allclose(returns[0][0], [1 - 0.4, 1 - 0.2], rtol=1e-6)
    np.testing.assert_allclose(advantages[0][0], returns[0][0])


def test_s21_advantages_are_whitened_over_the_step_and_returns_are_not() -> None:
    groups = random_groups(3)
    draw = np.random.default_rng(0)
    values = [
        [draw.standard_normal(len(s.rollout.response_ids)).astype(np.float32) for s in g.scored]
        for g in groups
    ]
    whitened, returns = Ppo(PpoConfig()).estimate(groups, values)
    plain, same = Ppo(PpoConfig(whiten=False)).estimate(groups, values)
    masks = [s.rollout.response_mask for g in groups for s in g.scored]
    flat = [a for g in whitened for a in g]
    tokens = np.concatenate([a[m] for a, m in zip(flat, masks, strict=True)])
    raw = np.concatenate([a[m] for a, m in zip((a for g in plain for a in g), masks, strict=True)])
    np.testing.assert_allclose(tokens, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    for one, other in zip(
        (r for g in returns for r in g), (r for g in same for r in g), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_value_loss_matches_hand_numbers() -> None:
    values = torch.tensor([1.0, 0.1, 0.5, -1.0], requires_grad=True)
    start, returns = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    losses, clipped = clipped_value_loss(values, start, returns, clip=0.2)
    # 1.0 moved past 0.2: held error 0.8^2 beats 0; 0.1 is inside; 0.5 moved the wrong way: the free
    # error 1.5^2 is the larger; -1.0 moved past -0.2: held error 0.8^2 beats 0
    np.testing.assert_allclose(losses.detach(), [0.32, 0.405, 1.125, 0.32], rtol=1e-6)
    assert clipped.tolist() == [True, False, False, True]
    losses.sum().backward()
    np.testing.assert_allclose(values.grad, [0, 0.1 - 1, 0.5 + 1, 0], rtol=1e-6)


def test_without_a_clip_the_value_loss_is_half_the_squared_error() -> None:
    values = torch.tensor([3.0, -2.0])
    losses, clipped = clipped_value_loss(values, torch.zeros(2), torch.ones(2), clip=0)
    assert losses.tolist() == [2.0, 4.5]
    assert not clipped.any()


number = st.floats(-5, 5)


@example([(0.0, 1e-20, 1.0)], 1e-30)
@example([(1.6158596483014218e-15, 1.0, 0.0)], 1.0)
@given(st.lists(st.tuples(number, number, number), max_size=8), st.floats(0, 2))
def test_the_value_loss_is_the_slow_loop_and_clipped_values_get_no_gradient(
    tokens: list[tuple[float, float, float]], clip: float
) -> None:
    columns = [torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in range(3)]
    values = columns[0].requires_grad_()
    start, returns = columns[1].requires_grad_(), columns[2].requires_grad_()
    losses, clipped = clipped_value_loss(values, start, returns, clip)
    for (v, s, r), loss in zip(tokens, losses.tolist(), strict=True):
        expected = (v - r) ** 2 / 2
        if clip > 0:
            expected = max(expected, (max(s - clip, min(s + clip, v)) - r) ** 2 / 2)
        assert loss == pytest.approx(expected, abs=1e-12)
    losses.sum().backward()
    assert values.grad is not None
    assert not values.grad[clipped].any()
    np.testing.assert_allclose(
        values.grad[~clipped], (values - returns)[~clipped].detach(), atol=1e-12
    )
    assert start.grad is None
    assert returns.grad is None


def test_s11_values_that_would_broadcast_are_refused() -> None:
    with pytest.raises(RecordError, match=r"\[2, 1\].*must all be \[N\]"):
        clipped_value_loss(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2), 0.2)


def test_the_share_of_clipped_values_is_reported() -> None:
    inputs = ValueInputs(
        values=torch.tensor([1.0, 0.1]), start_values=torch.zeros(2), returns=torch.ones(2)
    )
    _, sums = Ppo(PpoConfig()).value_loss(inputs)
    assert [t.item() for t in sums["critic/clip_fraction"]] == [1, 2]


def test_the_entropy_bonus_pulls_towards_more_entropy() -> None:
    ppo = Ppo(PpoConfig(entropy_coef=0.01, correction={"type": "none"}))  # type: ignore[arg-type]
    assert ppo.trains_entropy
    learner = torch.full((3,), -1.0, requires_grad=True)
    entropy = torch.full((3,), 2.0, requires_grad=True)
    inputs: Any = loss_inputs(learner, learner.detach(), torch.ones(3), entropy=entropy)
    losses, _ = ppo.loss(inputs)
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), [-1.02] * 3, rtol=1e-6)
    np.testing.assert_allclose(entropy.grad, [-0.01] * 3, rtol=1e-6)
