"""RLOO and REINFORCE++: advantages by hand and by slow loops, and their losses."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms.reinforce_pp import ReinforcePp, ReinforcePpConfig
from rlhf_cluster.algorithms.rloo import Rloo, RlooConfig
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import (
    loss_inputs,
    make_group,
    make_prompt,
    make_scored,
    random_groups,
    response_logprobs,
)

FREE = {"correction": {"type": "none"}}


def _groups(
    rewards: list[list[float]], lengths: list[list[int]], masks: Any = None
) -> list[ExperienceGroup]:
    groups = []
    for number, (own, own_lengths) in enumerate(zip(rewards, lengths, strict=True)):
        prompt = make_prompt(number, [3, 5])
        scored = [
            make_scored(
                f"{number}/{i}",
                prompt,
                [7] * length,
                [-1.0] * length,
                reward,
                mask=None if masks is None else masks[number][i],
                ref_logprobs=[-1.0 - 0.1 * (t + 1) for t in range(length)],
            )
            for i, (reward, length) in enumerate(zip(own, own_lengths, strict=True))
        ]
        groups.append(make_group(number, prompt, scored))
    return groups


def test_rloo_gives_every_token_its_response_less_the_mean_of_the_others() -> None:
    groups = _groups([[1.0, 0.0, 0.5], [2.0]], [[2, 1, 3], [2]])
    found = Rloo(RlooConfig()).advantages(groups)
    np.testing.assert_allclose(found[0][0], [0.75, 0.75])  # 1 - (0 + 0.5) / 2
    np.testing.assert_allclose(found[0][1], [-0.75])  # 0 - (1 + 0.5) / 2
    np.testing.assert_allclose(found[0][2], [0, 0, 0])  # 0.5 - (1 + 0) / 2
    np.testing.assert_allclose(found[1][0], [0, 0])  # alone


def test_the_rloo_gradient_is_that_of_reinforce_when_the_policy_is_the_proximal_one() -> None:
    torch.manual_seed(0)
    learner = torch.randn(6, dtype=torch.float64).sub(2).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -0.5, -0.5, 0.25, 0.25], dtype=torch.float64)
    losses, _ = Rloo(RlooConfig(**FREE)).loss(loss_inputs(learner, learner.detach(), advantages))
    losses.sum().backward()
    torch.testing.assert_close(learner.grad, -advantages)  # grad of -A log pi


def test_clipped_tokens_have_no_gradient_and_are_counted() -> None:
    proximal = torch.full((4,), -1.0, dtype=torch.float64)
    learner = (proximal + torch.tensor([0.5, -0.5, 0.5, -0.5])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    inputs = loss_inputs(learner, proximal, advantages, proximal=proximal)
    losses, sums = Rloo(RlooConfig(**FREE)).loss(inputs)
    losses.sum().backward()
    up, down = math.exp(0.5), math.exp(-0.5)
    np.testing.assert_allclose(losses.detach(), [-1.2, -down, up, 0.8], rtol=1e-6)
    np.testing.assert_allclose(learner.grad, [0, -down, up, 0], rtol=1e-6)
    assert sums["learner/clip_fraction"][0].item() == 2


def _slow_reinforce_pp(groups: list[ExperienceGroup], coef: float) -> list[np.ndarray]:
    """Returns token by token, then one mean and deviation over all trained tokens."""
    returns, trained = [], []
    for scored in (s for g in groups for s in g.scored):
        rollout, own = scored.rollout, []
        places = [t for t, m in enumerate(rollout.response_mask) if m]
        for token in range(len(rollout.response_ids)):
            total = 0.0
            for later in (p for p in places if p >= token):
                total += scored.reward if later == places[-1] else 0.0
                assert scored.ref_logprobs is not None
                gap = float(rollout.sampled_logprobs[later]) - float(scored.ref_logprobs[later])
                total -= coef * gap
            own.append(total)
        returns.append(own)
        trained += [own[p] for p in places]
    mean = sum(trained) / len(trained)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in trained) / len(trained))
    masks = [s.rollout.response_mask for g in groups for s in g.scored]
    return [
        np.array([(v - mean) / deviation if m else 0.0 for v, m in zip(own, mask, strict=True)])
        for own, mask in zip(returns, masks, strict=True)
    ]


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_reinforce_pp_normalises_returns_over_the_tokens_of_the_whole_batch(coef: float) -> None:
    masks = [[[True, True, False], [True]], [[True, False, True, True], [False, True]]]
    groups = _groups([[1.0, 0.0], [0.0, 3.0]], [[3, 1], [4, 2]], masks)
    algorithm = ReinforcePp(ReinforcePpConfig(kl_coef=coef, kl_in="reward"))
    found = [a for group in algorithm.advantages(groups) for a in group]
    for own, expected in zip(found, _slow_reinforce_pp(groups, coef), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


def test_s21_reinforce_pp_is_that_of_the_batch_whatever_the_groups() -> None:
    one = ReinforcePp(ReinforcePpConfig())
    whole = one.advantages(_groups([[1.0, 0.0], [0.0, 1.0]], [[1, 1], [2, 1]]))
    # tokens 1, 0, 0, 0, 1: mean 0.4, deviation sqrt(0.24); of a group alone 0.5 or 1 / 3
    np.testing.assert_allclose(whole[0][0], [0.6 / math.sqrt(0.24)], rtol=1e-6)
    np.testing.assert_allclose(whole[1][0], [-0.4 / math.sqrt(0.24)] * 2, rtol=1e-6)
    assert one.advantages(_groups([[5.0]], [[1]]))[0][0].tolist() == [0], "one token is finite"


def test_reinforce_pp_with_a_group_baseline_centres_before_it_normalises() -> None:
    algorithm = ReinforcePp(ReinforcePpConfig(group_size=2, baseline="group"))
    found = algorithm.advantages(_groups([[1.0, 0.0], [11.0, 10.0]], [[1, 1], [1, 1]]))
    np.testing.assert_allclose(np.concatenate([*found[0], *found[1]]), [1, -1, 1, -1], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "rloo", "group_size": 1}, "group_size"),
        ({"type": "reinforce_pp", "group_size": 1, "baseline": "group"}, "its own mean"),
    ],
)
def test_groups_that_are_too_small_are_refused(settings: dict[str, Any], words: str) -> None:
    tree = tiny_tree()
    tree["algorithm"] = settings
    with pytest.raises(ConfigError, match=words):
        validate(RunConfig, tree, source="test")


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp"])
def test_s9_a_step_moves_weights_and_raises_the_probability_of_good_answers(
    start_learner: Any, name: str
) -> None:
    learner = start_learner(
        algorithm={"type": name, "group_size": 4, "correction": {"type": "none"}},
        learner={"learning_rate": 1e-3},
    )
    groups = random_groups(0)
    advantages = [a for group in learner._algorithm.advantages(groups) for a in group]
    masks = [s.rollout.response_mask for g in groups for s in g.scored]

    def favoured() -> float:
        values = response_logprobs(learner, groups)
        return sum(
            float((a * v)[m].sum()) for a, v, m in zip(advantages, values, masks, strict=True)
        )

    before = favoured()
    learner.train_step(groups)
    assert favoured() > before + 1
