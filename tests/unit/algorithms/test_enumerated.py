"""Expected gradients by exact enumeration of everything a tiny policy can answer."""

import itertools

import pytest
import torch
from torch import Tensor

from rlhf_cluster.algorithms.advantages import leave_one_out_advantages
from rlhf_cluster.algorithms.policy_losses import (
    Aggregation,
    token_weights,
)

MAX_TOKENS = 3
ANSWERS = ["E", "AE", "AAE", "AAA"]
"""At each of three places the policy ends its answer (E) or goes on (A)."""
REWARDS = {"E": 1.0, "AE": 0.2, "AAE": 0.0, "AAA": 0.7}


def logprob(logits: Tensor, answer: str) -> Tensor:
    ends = [logits[t] if token == "E" else -logits[t] for t, token in enumerate(answer)]
    return torch.nn.functional.logsigmoid(torch.stack(ends)).sum()


def policy() -> Tensor:
    return torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64, requires_grad=True)


def true_gradient() -> Tensor:
    logits = policy()
    sum(logprob(logits, a).exp() * REWARDS[a] for a in ANSWERS).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    return logits.grad


def expected_gradient(aggregation: Aggregation, baseline: str) -> Tensor:
    """Over every group of two answers, each as often as the policy gives it."""
    logits = policy()
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(ANSWERS, repeat=2):
        rewards = [REWARDS[answer] for answer in group]
        if baseline == "leave one out":
            advantages = leave_one_out_advantages(rewards, ["g", "g"]).tolist()
        else:
            advantages = [reward - REWARDS["AE"] for reward in rewards]
        weights = token_weights([len(answer) for answer in group], aggregation, MAX_TOKENS)
        logs = [logprob(logits, answer) for answer in group]
        share = torch.stack([log.detach() for log in logs]).sum().exp()
        for weight, advantage, log in zip(weights, advantages, logs, strict=True):
            total = total + share * weight * advantage * log
    total.backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("baseline", ["leave one out", "greedy answer"])
def test_b7_with_a_fixed_length_the_gradient_is_that_of_the_expected_reward(baseline: str) -> None:
    found = expected_gradient("fixed_length", baseline)
    torch.testing.assert_close(found * MAX_TOKENS, true_gradient(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("baseline", ["leave one out", "greedy answer"])
def test_b7_lengths_that_were_sampled_tilt_the_gradient(
    aggregation: Aggregation, baseline: str
) -> None:
    found, true = expected_gradient(aggregation, baseline), true_gradient()
    cosine = torch.nn.functional.cosine_similarity(found, true, dim=0).item()
    assert 0 < cosine < 0.998
