"""The worked example against the room's own classes, with every number that a reader sees in it."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import Grpo, GrpoConfig
from rlhf_cluster.algorithms.off_policy_correction import TokenTis
from rlhf_cluster.algorithms.policy_losses import token_weights
from tests.support.builders.tiny_learner import loss_inputs, make_group, make_prompt, make_scored

EXAMPLE = Path("docs/examples/grpo_in_60_lines.py")


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """Every variable of the example after it ran."""
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLE))


def inputs_of(steps: dict[str, Any]) -> Any:
    return loss_inputs(
        steps["learner"].detach().clone().requires_grad_(),
        steps["sampler"],
        steps["advantages"],
        proximal=steps["proximal"],
        lengths=steps["num_tokens"].tolist(),
    )


def test_the_example_has_at_most_60_lines_and_the_defaults(steps: dict[str, Any]) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    config = GrpoConfig()
    assert (steps["CLIP_LOW"], steps["CLIP_HIGH"]) == (config.clip_low, config.clip_high)
    assert config.correction == TokenTis(cap=steps["CAP"])
    assert (config.proximal, config.aggregation) == ("recompute", "token_mean")


def test_the_advantages_are_those_of_the_algorithm(steps: dict[str, Any]) -> None:
    rewards, lengths = steps["rewards"].tolist(), steps["num_tokens"].tolist()
    groups = []
    for number in range(2):
        prompt = make_prompt(number, [1])
        scored = [
            make_scored(
                f"{number}/{at}", prompt, [2] * lengths[at], [-1.0] * lengths[at], rewards[at]
            )
            for at in range(3 * number, 3 * number + 3)
        ]
        groups.append(make_group(number, prompt, scored))
    expected = Grpo(GrpoConfig(group_size=3)).advantages(groups)
    flat = np.concatenate([tokens for group in expected for tokens in group])
    np.testing.assert_allclose(steps["advantages"].numpy(), flat, rtol=1e-12, atol=0)


def test_weight_losses_mean_and_gradient_are_those_of_the_algorithm(steps: dict[str, Any]) -> None:
    algorithm, inputs = Grpo(GrpoConfig(group_size=3)), inputs_of(steps)
    weights = algorithm.correction_weights(inputs)
    torch.testing.assert_close(steps["weight"], weights, rtol=1e-12, atol=0)
    losses, sums = algorithm.loss(inputs)
    torch.testing.assert_close(steps["token_losses"], losses, rtol=1e-12, atol=1e-15)
    lengths = steps["num_tokens"].tolist()
    each = torch.tensor(token_weights(lengths, "token_mean", max_tokens=5), dtype=torch.float64)
    loss = (each[steps["response"]] * losses).sum()
    torch.testing.assert_close(steps["loss"], loss, rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(
        steps["learner"].grad, inputs.learner_logprobs.grad, rtol=1e-12, atol=1e-15
    )
    # both bounds act in the batch, else the example would show neither
    assert sums["learner/clip_fraction"][0] > 0
    assert sums["importance/capped_fraction"][0] > 0
