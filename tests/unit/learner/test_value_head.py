"""The value head on the policy's trunk: one loss, two optimizers, and nothing of it published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    build_llama,
    random_groups,
)

PPO = {"type": "ppo", "group_size": 4, "correction": {"type": "none"}, "whiten": False}


def _head(learner: LearnerRank) -> Any:
    assert learner._value_model is not None
    return learner._value_model.module


def _set_head(learner: LearnerRank) -> torch.nn.Linear:
    """A head that is not 0, and a plain one like it."""
    plain = torch.nn.Linear(32, 1)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
        plain.bias.fill_(0.25)
        _head(learner).weight.to_local().copy_(plain.weight)
        _head(learner).bias.to_local().copy_(plain.bias)
    return plain


def _plain_loss(
    lm: Any, head: torch.nn.Linear, groups: list[ExperienceGroup], coef: float
) -> torch.Tensor:
    """Policy and value loss of one PPO step on one trunk, a rollout at a time."""
    total, count = torch.zeros(()), 0
    for scored in (s for g in groups for s in g.scored):
        rollout = scored.rollout
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
        hidden = lm.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        hidden = hidden[len(rollout.prompt_ids) - 1 : -1][torch.from_numpy(rollout.response_mask)]
        labels = torch.from_numpy(rollout.response_ids[rollout.response_mask]).long()
        logprobs = lm.lm_head(hidden).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        values = head(hidden).squeeze(-1)
        start, advantage = [*values.tolist(), 0.0], 0.0
        for i in reversed(range(len(labels))):
            reward = scored.reward if i + 1 == len(labels) else 0.0
            advantage = reward + start[i + 1] - start[i] + 0.95 * advantage
            total = total - (logprobs[i] - logprobs[i].detach()).exp() * advantage
            total = total + coef * (values[i] - (advantage + start[i])) ** 2 / 2
        count += len(labels)
    return total / count


def _stepped(parameters: list[Any], rate: float, clip: float) -> float:
    """One clipped AdamW step; returns the norm before the clip."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    decay = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]]
    groups = [
        {"params": own, "weight_decay": w} for own, w in zip(decay, (0.1, 0.0), strict=True) if own
    ]
    torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)).step()
    return norm


@pytest.mark.parametrize(
    ("coef", "changes"),
    [
        (0.5, {}),
        (2.0, {"tokens_per_micro_batch": 32}),
        (0.5, {"batching": "padded", "gradient_checkpointing": True}),
    ],
)
def test_s1_one_step_of_trunk_and_head_matches_a_plain_pytorch_loop(
    start_learner: Any, coef: float, changes: dict[str, Any]
) -> None:
    learner = start_learner(
        algorithm=PPO,
        learner={"weight_decay": 0.1, "learning_rate": 1e-3, "max_grad_norm": 0.7, **changes},
        critic={"kind": "head", "coef": coef, "learning_rate": 5e-3, "max_grad_norm": 0.1},
    )
    groups, lm, head = random_groups(5), build_llama(), _set_head(learner)
    _plain_loss(lm, head, groups, coef).backward()
    trunk_norm = _stepped(list(lm.parameters()), 1e-3, 0.7)
    head_norm = _stepped(list(head.parameters()), 5e-3, 0.1)
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/grad_norm"] == pytest.approx(trunk_norm, rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(head_norm, rel=1e-4)
    assert (metrics["learner/learning_rate"], metrics["critic/learning_rate"]) == (1e-3, 5e-3)
    found = dict(learner.policy.lm.named_parameters())
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(
            found[name].full_tensor(), parameter.detach(), atol=2e-5, rtol=0, msg=name
        )
    for name, parameter in head.named_parameters():
        own = _head(learner).get_parameter(name).full_tensor()
        torch.testing.assert_close(own, parameter.detach(), atol=2e-5, rtol=0)


def test_the_first_values_are_zero_and_head_and_trunk_learn_what_they_should_be(
    start_learner: Any,
) -> None:
    learner = start_learner(
        algorithm=PPO,
        learner={"learning_rate": 1e-3, "epochs": 2, "minibatches": 2, "max_grad_norm": 10.0},
        critic={"kind": "head", "coef": 5.0, "learning_rate": 1e-2},
        run={"steps": 20, "groups_per_step": 4},
        staleness={"max_staleness": 20},
    )
    groups = random_groups(0)
    reports = [learner.train_step(groups).metrics for _ in range(12)]
    assert reports[0]["critic/value_mean"] == 0
    assert reports[-1]["critic/loss"] < 0.3 * reports[0]["critic/loss"]
    assert reports[-1]["critic/explained_variance"] > 0.5


@pytest.mark.parametrize("adapters", [{}, {"lora": {"rank": 4}}])
def test_what_is_published_has_no_head_and_the_trunk_gets_both_gradients(
    start_learner: Any, adapters: dict[str, Any]
) -> None:
    groups, norms = random_groups(2), []
    for coef in (1e-6, 1.0):
        learner = start_learner(
            algorithm=PPO, learner=adapters, critic={"kind": "head", "coef": coef}
        )
        _set_head(learner)
        norms.append(learner.train_step(groups).metrics["learner/grad_norm"])
        learner.snapshot()
        published = {part.name for part in learner._snapshot[1]}
        assert published == {name for name, _ in build_llama().named_parameters()}
        assert set(learner.tensor_shapes()) == published
    assert abs(norms[1] / norms[0] - 1) > 0.05


def test_s33_a_bfloat16_trunk_has_a_float32_head(start_learner: Any) -> None:
    learner = start_learner(
        algorithm=PPO, learner={"dtype": "bfloat16"}, critic={"kind": "head", "learning_rate": 1e-3}
    )
    _set_head(learner)
    metrics = learner.train_step(random_groups(0)).metrics
    assert {p.dtype for p in _head(learner).parameters()} == {torch.float32}
    assert np.float32(metrics["critic/value_mean"]).view(np.int32) & 0xFFFF
    assert metrics["critic/skipped_steps"] == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"critic": {"kind": "head"}, "learner": {"backend": "zero3"}},
            "critic.kind = 'head' with learner.backend = 'zero3'",
        ),
        ({"critic": {"coef": 0.25}}, "critic.coef = 0.25 with critic.kind = 'separate'"),
        (
            {"critic": {"kind": "head"}, "algorithm": {"type": "grpo", "group_size": 4}},
            "[critic] with algorithm.type = 'grpo'",
        ),
    ],
)
def test_a_head_that_cannot_be_is_refused_with_the_reason(
    sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(**{"algorithm": {"type": "ppo"}, **sections})
    assert words in str(error.value)
