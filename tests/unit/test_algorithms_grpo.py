"""GRPO's objective against a slow loop over tokens, and the gradients it must (not) have."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import Grpo, GrpoConfig
from rlhf_cluster.algorithms.base import LossInputs
from rlhf_cluster.errors import RecordError
from tests.learning_cases import random_groups

NUM_TOKENS = 40


def _inputs(seed: int = 0, with_reference: bool = True, num_tokens: int = NUM_TOKENS) -> LossInputs:
    draw = torch.Generator().manual_seed(seed)

    def logprobs() -> torch.Tensor:
        return -2 + 0.7 * torch.randn(num_tokens, generator=draw, dtype=torch.float64)

    return LossInputs(
        learner_logprobs=logprobs().requires_grad_(),
        sampled_logprobs=logprobs(),
        ref_logprobs=logprobs() if with_reference else None,
        advantages=torch.randn(num_tokens, generator=draw, dtype=torch.float64),
        entropy=torch.ones(num_tokens, dtype=torch.float64),
    )


def _slow_loss(config: GrpoConfig, inputs: LossInputs) -> float:
    total = 0.0
    cap = getattr(config.correction, "cap", None)
    for i in range(len(inputs.advantages)):
        learner, sampled = inputs.learner_logprobs[i].item(), inputs.sampled_logprobs[i].item()
        advantage = inputs.advantages[i].item()
        weight = 1.0 if cap is None else min(math.exp(learner - sampled), cap)
        ratio = 1.0 if config.proximal == "recompute" else math.exp(learner - sampled)
        if cap is not None and config.proximal == "bypass":
            ratio = min(ratio, cap)
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        policy = -min(ratio * advantage, bounded * advantage)
        total += policy * (weight if config.proximal == "recompute" else 1.0)
        if config.kl_coef:
            assert inputs.ref_logprobs is not None
            total += config.kl_coef * weight * (learner - inputs.ref_logprobs[i].item()) ** 2 / 2
    return total


@pytest.mark.parametrize("proximal", ["recompute", "bypass"])
@pytest.mark.parametrize("correction", [{"type": "token_tis", "cap": 1.5}, {"type": "none"}])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_loss_matches_a_slow_loop(proximal: Any, correction: Any, kl_coef: float) -> None:
    config = GrpoConfig(proximal=proximal, correction=correction, kl_coef=kl_coef)
    inputs = _inputs()
    loss, _ = Grpo(config).loss(inputs)
    assert loss.item() == pytest.approx(_slow_loss(config, inputs))


def test_recompute_gradient_is_weight_times_advantage_and_is_never_clipped() -> None:
    inputs = _inputs()
    loss, sums = Grpo(GrpoConfig()).loss(inputs)
    loss.backward()
    weight = (inputs.learner_logprobs - inputs.sampled_logprobs).detach().exp().clamp(max=2.0)
    torch.testing.assert_close(inputs.learner_logprobs.grad, -weight * inputs.advantages)
    assert sums["learner/clip_fraction"][0] == 0


def test_bypass_counts_clipped_tokens_and_gives_them_no_gradient() -> None:
    inputs = _inputs()
    loss, sums = Grpo(GrpoConfig(proximal="bypass")).loss(inputs)
    loss.backward()
    grad = inputs.learner_logprobs.grad
    assert grad is not None
    ratio = (inputs.learner_logprobs - inputs.sampled_logprobs).detach().exp()
    truncated = (ratio > 2.0) & (inputs.advantages < 0)
    assert truncated.any()
    assert (grad == 0).sum() - truncated.sum() == sums["learner/clip_fraction"][0] > 0


def test_bypass_truncates_the_ratio_of_a_bad_token_at_the_cap() -> None:
    inputs = LossInputs(
        learner_logprobs=torch.tensor([0.0], requires_grad=True),
        sampled_logprobs=torch.tensor([-3.0]),
        ref_logprobs=None,
        advantages=torch.tensor([-1.0]),
        entropy=torch.zeros(1),
    )
    loss, _ = Grpo(GrpoConfig(proximal="bypass")).loss(inputs)
    assert loss.item() == pytest.approx(2.0), "the ratio is 20, the cap is 2"


@pytest.mark.parametrize("proximal", ["recompute", "bypass"])
def test_s9_the_gradient_is_not_zero_and_raises_good_actions(proximal: Any) -> None:
    logits = torch.zeros(5, requires_grad=True)
    chosen = torch.tensor([3, 1])
    inputs = LossInputs(
        learner_logprobs=logits.log_softmax(0)[chosen],
        sampled_logprobs=torch.full((2,), math.log(0.2)),
        ref_logprobs=None,
        advantages=torch.tensor([1.0, -1.0]),
        entropy=torch.zeros(2),
    )
    loss, _ = Grpo(GrpoConfig(proximal=proximal)).loss(inputs)
    loss.backward()
    assert logits.grad is not None
    after = (logits - 0.1 * logits.grad).softmax(0)
    assert after[3] > 0.2 > after[1]


def test_no_gradient_flows_into_the_sampler_or_the_reference() -> None:
    inputs = _inputs()
    inputs.sampled_logprobs.requires_grad_()
    assert inputs.ref_logprobs is not None
    inputs.ref_logprobs.requires_grad_()
    loss, _ = Grpo(GrpoConfig(kl_coef=0.1)).loss(inputs)
    loss.backward()
    assert inputs.sampled_logprobs.grad is None
    assert inputs.ref_logprobs.grad is None


@pytest.mark.parametrize("size", [1, 2, 4, NUM_TOKENS])
def test_s1_loss_and_metric_sums_do_not_depend_on_the_micro_batch_size(size: int) -> None:
    algorithm, whole = Grpo(GrpoConfig(kl_coef=0.1)), _inputs()
    expected, expected_sums = algorithm.loss(whole)
    parts = [
        algorithm.loss(
            LossInputs(
                learner_logprobs=whole.learner_logprobs[i : i + size],
                sampled_logprobs=whole.sampled_logprobs[i : i + size],
                ref_logprobs=whole.ref_logprobs[i : i + size],  # type: ignore[index]
                advantages=whole.advantages[i : i + size],
                entropy=whole.entropy[i : i + size],
            )
        )
        for i in range(0, NUM_TOKENS, size)
    ]
    torch.testing.assert_close(torch.stack([p for p, _ in parts]).sum(), expected)
    for name, (total, count) in expected_sums.items():
        totals = torch.stack([sums[name][0].double() for _, sums in parts])
        found = totals.max() if name.endswith("_max") else totals.sum()
        torch.testing.assert_close(found, total.double(), msg=name)
        assert sum(sums[name][1].item() for _, sums in parts) == count


def test_a_micro_batch_without_tokens_has_loss_zero_and_the_same_metric_names() -> None:
    algorithm = Grpo(GrpoConfig(kl_coef=0.1))
    loss, sums = algorithm.loss(_inputs(num_tokens=0))
    loss.backward()
    assert loss.item() == 0
    assert set(sums) == set(algorithm.loss(_inputs())[1])


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
