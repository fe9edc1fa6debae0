"""The critic of one learner rank: its values, its step, and what it leaves alone."""

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.step.critic import (
    score_values,
    value_metrics,
)
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    build_llama,
    make_group,
    make_prompt,
    make_scored,
    random_groups,
    response_logprobs,
)

PPO = {"type": "ppo", "group_size": 4, "correction": {"type": "none"}}


def _value_model(learner: LearnerRank) -> Any:
    assert learner._value_model is not None
    return learner._value_model


def _set_head(learner: LearnerRank, seed: int = 0) -> tuple[torch.Tensor, float]:
    """A value head that is not 0, and what it holds."""
    weight = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    head = _value_model(learner).module.value_head
    with torch.no_grad():
        head.weight.to_local().copy_(weight[None])
        head.bias.to_local().fill_(0.25)
    return weight, 0.25


def _plain_values(lm: Any, head: torch.nn.Linear, rollout: Any) -> torch.Tensor:
    """The value before each response token, one rollout at a time."""
    tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    ids = torch.from_numpy(tokens).long()[None]
    hidden = lm.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return head(hidden[len(rollout.prompt_ids) - 1 : -1]).squeeze(-1)


def _plain_head(weight: torch.Tensor, bias: float) -> torch.nn.Linear:
    head = torch.nn.Linear(32, 1)
    with torch.no_grad():
        head.weight.copy_(weight[None])
        head.bias.fill_(bias)
    return head


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_s14_values_are_those_before_each_token_of_every_rollout_alone(
    start_learner: Any, batching: str
) -> None:
    learner = start_learner(algorithm=PPO, learner={"batching": batching})
    head = _plain_head(*_set_head(learner))
    groups, lm = random_groups(0), build_llama()
    found = score_values(_value_model(learner), groups, learner._layout)
    for group, values in zip(groups, found, strict=True):
        for scored, own in zip(group.scored, values, strict=True):
            expected = _plain_values(lm, head, scored.rollout).detach().numpy()
            np.testing.assert_allclose(own, expected, atol=1e-5)
            assert own.dtype == np.float32


def test_a_value_does_not_know_the_token_that_is_sampled_after_it(start_learner: Any) -> None:
    learner = start_learner(algorithm=PPO)
    _set_head(learner)
    prompt, responses = make_prompt(0, [2, 9]), ([5, 6, 7, 8], [5, 6, 40, 8])
    scored = [make_scored(f"0/{i}", prompt, r, [-1.0] * 4, 1.0) for i, r in enumerate(responses)]
    groups = [make_group(0, prompt, scored)]
    ((one, other),) = score_values(_value_model(learner), groups, learner._layout)
    np.testing.assert_allclose(one[:3], other[:3], atol=1e-4)
    assert abs(one[3] - other[3]) > 1e-2


def _plain_step(
    groups: list[ExperienceGroup], head: torch.nn.Linear, clip: float
) -> tuple[Any, torch.nn.Linear, float]:
    """One critic step as one would write it first. Returns decoder, head and gradient norm."""
    lm = build_llama()
    total, count = torch.zeros(()), 0
    for scored in (s for g in groups for s in g.scored):
        rollout = scored.rollout
        values = _plain_values(lm, head, rollout)
        places = np.flatnonzero(rollout.response_mask).tolist()
        start = values.detach().tolist()
        advantage = 0.0
        for i in reversed(range(len(places))):
            after = start[places[i + 1]] if i + 1 < len(places) else 0.0
            reward = scored.reward if i + 1 == len(places) else 0.0
            advantage = reward + after - start[places[i]] + 0.95 * advantage
            target = advantage + start[places[i]]
            total = total + (values[places[i]] - target) ** 2 / 2
            count += 1
    (total / count).backward()
    parameters = [*lm.model.parameters(), *head.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    ).step()
    return lm.model, head, norm


@pytest.mark.parametrize("budget", [16384, 32])
def test_s1_one_step_of_the_critic_matches_a_plain_pytorch_loop(
    start_learner: Any, budget: int
) -> None:
    learner = start_learner(
        algorithm=PPO,
        learner={"weight_decay": 0.1, "tokens_per_micro_batch": budget},
        critic={"learning_rate": 1e-3, "max_grad_norm": 0.5},
    )
    groups = random_groups(5)
    decoder, head, norm = _plain_step(groups, _plain_head(*_set_head(learner)), clip=0.5)
    metrics = learner.train_step(groups).metrics
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["critic/learning_rate"] == 1e-3
    module = _value_model(learner).module
    for name, parameter in decoder.named_parameters():
        found = dict(module.lm.named_parameters())[name].full_tensor()
        torch.testing.assert_close(found, parameter.detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(
        module.value_head.weight.full_tensor(), head.weight.detach(), atol=2e-5, rtol=0
    )


def test_the_first_values_are_zero_and_the_critic_learns_what_they_should_be(
    start_learner: Any,
) -> None:
    learner = start_learner(
        algorithm=PPO,
        learner={"learning_rate": 1e-6, "epochs": 2, "minibatches": 2},
        critic={"learning_rate": 3e-3},
        run={"steps": 20, "groups_per_step": 4},
        staleness={"max_staleness": 20},
    )
    groups = random_groups(0)
    reports = [learner.train_step(groups).metrics for _ in range(12)]
    assert reports[0]["critic/value_mean"] == 0
    assert reports[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert reports[-1]["critic/loss"] < 0.3 * reports[0]["critic/loss"]
    assert reports[-1]["critic/explained_variance"] > 0.5
    assert reports[-1]["critic/value_mean"] == pytest.approx(
        reports[-1]["critic/return_mean"], abs=0.1
    )


def test_s9_ppo_raises_the_probability_of_good_answers_with_epochs_and_minibatches(
    start_learner: Any,
) -> None:
    learner = start_learner(
        algorithm={**PPO, "entropy_coef": 0.001},
        learner={"learning_rate": 1e-3, "epochs": 2, "minibatches": 2},
        critic={"learning_rate": 1e-3},
        staleness={"max_staleness": 20},
    )
    groups = random_groups(1, rewards=[1.0, 0.0] * 8)

    def favoured() -> float:
        values = [v.mean() for v in response_logprobs(learner, groups)]
        return float(np.mean(values[::2]) - np.mean(values[1::2]))

    before = favoured()
    for _ in range(6):
        learner.train_step(groups)
    assert favoured() > before + 0.5


def test_the_policy_step_does_not_depend_on_how_the_critic_learns(start_learner: Any) -> None:
    groups, weights = random_groups(2), []
    for rate in (1e-6, 1e-1):
        learner = start_learner(algorithm=PPO, critic={"learning_rate": rate})
        learner.train_step(groups)
        weights.append({n: p.full_tensor() for n, p in learner.policy.named_parameters()})
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_critic_starts_as_the_policy_that_the_warm_up_left(start_learner: Any) -> None:
    learner = start_learner(
        algorithm=PPO,
        sft={"learning_rate": 1e-2, "warmup_steps": 0},
        learner={"learning_rate": 1e-12},
        critic={"learning_rate": 1e-12},
    )
    ids = np.arange(3, 8, dtype=np.int32)
    learner.sft_step([SftExample(prompt_ids=ids, target_ids=ids)])
    learner.train_step(random_groups(0))
    policy = dict(learner.policy.lm.base_model.named_parameters())
    start = dict(build_llama().model.named_parameters())
    for name, parameter in _value_model(learner).module.lm.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), policy[name].full_tensor())
        assert not torch.allclose(parameter.full_tensor(), start[name]), name


def test_s33_a_bfloat16_critic_keeps_float32_weights_and_values(start_learner: Any) -> None:
    learner = start_learner(algorithm=PPO, learner={"dtype": "bfloat16"})
    groups, lm = random_groups(0), build_llama()
    head = _plain_head(*_set_head(learner))
    learner.train_step(groups)
    model = _value_model(learner)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    moments = [v for s in model.optimizer.state.values() for v in s.values()]
    assert {m.dtype for m in moments} == {torch.float32}
    found = score_values(model, groups, learner._layout)[0][0]
    expected = _plain_values(lm, head, groups[0].scored[0].rollout).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert (found.view(np.int32) & 0xFFFF).any(), "more digits than bfloat16 has"


def test_metrics_of_the_critic_do_not_depend_on_micro_batches(start_learner: Any) -> None:
    groups = random_groups(0)
    reports = []
    for budget in (16384, 32):
        learner = start_learner(algorithm=PPO, learner={"tokens_per_micro_batch": budget})
        _set_head(learner)
        reports.append(learner.train_step(groups).metrics)
    first, second = ({k: v for k, v in r.items() if k.startswith("critic/")} for r in reports)
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert set(first) == {
        "critic/loss",
        "critic/explained_variance",
        "critic/clip_fraction",
        "critic/value_mean",
        "critic/return_mean",
        "critic/grad_norm",
        "critic/learning_rate",
        "critic/skipped_steps",
    }


def test_explained_variance_is_over_trained_tokens_and_absent_without_variance() -> None:
    prompt = make_prompt(0, [1])
    rows = [make_scored("0/0", prompt, [1, 2, 3], [-1.0] * 3, 1.0, mask=[True, True, False])]
    groups = [make_group(0, prompt, rows)]
    values, returns = [[np.array([0.0, 1.0, 9.0])]], [[np.array([0.0, 2.0, -9.0])]]
    found = value_metrics(groups, values, returns)
    # errors 0 and 1 with variance 1/4, returns 0 and 2 with variance 1
    assert found["critic/explained_variance"] == pytest.approx(0.75)
    assert found["critic/value_mean"] == 0.5
    flat = value_metrics(groups, values, [[np.array([1.0, 1.0, 7.0])]])
    assert "critic/explained_variance" not in flat


def test_a_section_for_a_critic_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[critic\] with algorithm.type = 'grpo'"):
        tiny_config(critic={"learning_rate": 1e-3})
    config = tiny_config(algorithm={"type": "ppo"}, critic={"learning_rate": 1e-3})
    assert config.critic.learning_rate == 1e-3
