"""GRPO: what is its own. Objective, gradients and invariances: test_objectives.py."""

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import Grpo, GrpoConfig
from rlhf_cluster.algorithms.algorithm import LossInputs
from rlhf_cluster.errors import RecordError
from tests.support.builders.tiny_learner import (
    loss_inputs,
    random_groups,
)

NUM_TOKENS = 40


def _inputs(seed: int = 0, with_reference: bool = True, num_tokens: int = NUM_TOKENS) -> LossInputs:
    draw = torch.Generator().manual_seed(seed)

    def logprobs() -> torch.Tensor:
        return -2 + 0.7 * torch.randn(num_tokens, generator=draw, dtype=torch.float64)

    return loss_inputs(
        logprobs().requires_grad_(),
        logprobs(),
        torch.randn(num_tokens, generator=draw, dtype=torch.float64),
        ref=logprobs() if with_reference else None,
    )


def test_recompute_gradient_is_weight_times_advantage_and_is_never_clipped() -> None:
    inputs = _inputs()
    loss, sums = Grpo(GrpoConfig()).loss(inputs)
    loss.sum().backward()
    weight = (inputs.learner_logprobs - inputs.sampled_logprobs).detach().exp().clamp(max=2.0)
    torch.testing.assert_close(inputs.learner_logprobs.grad, -weight * inputs.advantages)
    assert sums["learner/clip_fraction"][0] == 0


def test_bypass_counts_clipped_tokens_and_gives_them_no_gradient() -> None:
    inputs = _inputs()
    loss, sums = Grpo(GrpoConfig(proximal="bypass")).loss(inputs)
    loss.sum().backward()
    grad = inputs.learner_logprobs.grad
    assert grad is not None
    ratio = (inputs.learner_logprobs - inputs.sampled_logprobs).detach().exp()
    assert (grad == 0).sum() == sums["learner/clip_fraction"][0] > 0
    truncated = (ratio > 2.0) & (inputs.advantages < 0)
    assert truncated.any()
    torch.testing.assert_close(grad[truncated], -2.0 * inputs.advantages[truncated])


def test_b2_bypass_truncates_the_weight_of_a_bad_token_at_the_cap_and_still_trains_it() -> None:
    inputs = loss_inputs(
        torch.tensor([0.0], requires_grad=True), torch.tensor([-3.0]), torch.tensor([-1.0])
    )
    loss, _ = Grpo(GrpoConfig(proximal="bypass")).loss(inputs)
    assert loss.item() == pytest.approx(2.0), "the ratio is 20, the cap is 2"
    loss.sum().backward()
    assert inputs.learner_logprobs.grad is not None
    assert inputs.learner_logprobs.grad.item() == pytest.approx(2.0), "cap x A, not 0"


def test_kl_without_reference_logprobs_is_refused() -> None:
    with pytest.raises(RecordError, match=r"scoring\.reference"):
        Grpo(GrpoConfig(kl_coef=0.1)).loss(_inputs(with_reference=False))


def test_kl_is_reported_where_a_reference_is_there_and_left_out_otherwise() -> None:
    algorithm = Grpo(GrpoConfig())
    assert "learner/kl_ref" in algorithm.loss(_inputs())[1]
    assert "learner/kl_ref" not in algorithm.loss(_inputs(with_reference=False))[1]


def test_advantages_are_nested_as_the_groups_and_equal_over_a_response() -> None:
    groups = random_groups(0, num_groups=3)
    found = Grpo(GrpoConfig(group_size=4)).advantages(groups)
    for group, arrays in zip(groups, found, strict=True):
        rewards = np.array([s.reward for s in group.scored])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for scored, array, value in zip(group.scored, arrays, expected, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_allclose(
                array, np.full(len(scored.rollout.response_ids), value), 1e-5
            )


def test_two_rollouts_a_prompt_are_a_contrast_whatever_the_rewards() -> None:
    rewards = [1.0, 0.0, 7.0, 3.0, 0.4, 0.4]
    groups = random_groups(0, num_groups=3, group_size=2, rewards=rewards)
    found = Grpo(GrpoConfig(group_size=2)).advantages(groups)
    # centred: +-d/2; with Bessel's correction the deviation is d / sqrt(2)
    values = [array[0] for arrays in found for array in arrays]
    expected = [0.7071, -0.7071, 0.7071, -0.7071, 0, 0]
    np.testing.assert_allclose(values, expected, atol=2e-4)


def test_a_kl_in_the_reward_lowers_it_before_the_advantages() -> None:
    groups = random_groups(1, num_groups=2, with_reference=True)
    config = GrpoConfig(group_size=4, kl_coef=0.2, kl_in="reward", normalize_std=False)
    algorithm = Grpo(config)
    for group, arrays in zip(groups, algorithm.advantages(groups), strict=True):
        penalised = []
        for s in group.scored:
            assert s.ref_logprobs is not None
            difference = s.rollout.sampled_logprobs.astype(float) - s.ref_logprobs
            penalised.append(s.reward - 0.2 * sum(difference[s.rollout.response_mask]))
        expected = np.array(penalised) - np.mean(penalised)
        np.testing.assert_allclose([a[0] for a in arrays], expected, rtol=1e-5)
    assert algorithm.zero_advantage_is_zero_loss
    assert algorithm.needs_reference


def test_a_kl_in_the_reward_without_reference_logprobs_is_refused() -> None:
    algorithm = Grpo(GrpoConfig(group_size=4, kl_coef=0.2, kl_in="reward"))
    with pytest.raises(RecordError, match=r"rollout 0/0 has no ref_logprobs.*scoring\.reference"):
        algorithm.advantages(random_groups(1))


def test_the_adaptive_coefficient_follows_the_reported_kl_and_survives_a_restart() -> None:
    config = GrpoConfig(kl_coef=0.1, kl_control={"type": "adaptive", "target": 5, "horizon": 100})  # type: ignore[arg-type]
    algorithm, other = Grpo(config), Grpo(config)
    algorithm.finish_step({"learner/kl_ref_response": 10.0, "learner/rollouts": 50.0})
    assert algorithm.kl_coef == pytest.approx(0.1 * 1.1)
    assert algorithm.derive({})["learner/kl_coef"] == algorithm.kl_coef
    other.load_state(algorithm.state())
    assert other.kl_coef == algorithm.kl_coef
    loss = other.loss(_inputs())[0] - Grpo(GrpoConfig()).loss(_inputs())[0]
    before = Grpo(config).loss(_inputs())[0] - Grpo(GrpoConfig()).loss(_inputs())[0]
    torch.testing.assert_close(loss, 1.1 * before)


def test_the_kl_of_a_response_is_the_sum_over_its_tokens() -> None:
    _, sums = Grpo(GrpoConfig()).loss(_inputs())
    total, count = sums["learner/kl_ref_response"]
    assert (total, count) == (sums["learner/kl_ref"][0], 1)
