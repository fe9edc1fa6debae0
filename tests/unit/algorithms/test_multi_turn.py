"""Rows of several turns: sampled actions, and observations between them that are never trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import ALGORITHMS, build_algorithm
from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.step.training_batch import training_batch
from rlhf_cluster.records import ExperienceGroup, RolloutGroup, ScoredRollout, Ticket
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import (
    learner_config,
    loss_inputs,
    make_prompt,
    make_scored,
    random_groups,
)

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in sorted(ALGORITHMS)},
    "on_policy_distillation": {"type": "on_policy_distillation", "reward_coef": 0.5},
    "grpo, process": {"type": "grpo", "advantage": "process"},
    "dapo, overlong": {"type": "dapo", "overlong_buffer_tokens": 12},
    "ppo, KL in the reward": {"type": "ppo", "kl_coef": 0.1, "kl_in": "reward"},
    "gspo, bypass": {
        "type": "gspo",
        "proximal": "bypass",
        "correction": {"type": "geometric_mask", "low": 0.5, "high": 2.0},
    },
}
STEPS = ("ppo", "ppo, KL in the reward", "reinforce_pp", "grpo, process")


def _algorithm(variant: str) -> Any:
    rewards = [{"type": "exact_match"}]
    if variant in STEPS:
        rewards.append({"type": "python", "function": "a:b", "per_step": True})
    scoring: dict[str, Any] = {"reference": True, "rewards": rewards}
    if variant == "on_policy_distillation":
        scoring["teacher"] = "nowhere"
    tree = tiny_tree(generation={"max_response_tokens": 24}, scoring=scoring)
    tree["algorithm"] = {"group_size": 4, **VARIANTS[variant]}
    return build_algorithm(validate(RunConfig, tree, source="test").algorithm, 24)


def _with_steps(groups: Sequence[ExperienceGroup], seed: int) -> list[ExperienceGroup]:
    """Every rollout with up to three rewards of steps."""
    draw = np.random.default_rng(seed)

    def of(scored: ScoredRollout) -> ScoredRollout:
        num_steps = int(draw.integers(0, 4))
        ends = np.sort(draw.integers(0, len(scored.rollout.response_ids), num_steps))
        return replace(
            scored,
            reward_parts={"exact_match": scored.reward},
            step_ends=ends.astype(np.int32),
            step_rewards=draw.random(num_steps),
        )

    return [replace(g, scored=tuple(map(of, g.scored)), greedy_reward=0.3) for g in groups]


def _observed(scored: ScoredRollout, draw: np.random.Generator) -> ScoredRollout:
    """The same rollout with up to 12 observed tokens put in anywhere."""
    rollout, num_tokens = scored.rollout, len(scored.rollout.response_ids)
    places = np.sort(draw.integers(0, num_tokens + 1, int(draw.integers(1, 13))))

    def put(array: np.ndarray, values: Any) -> np.ndarray:
        return np.insert(array, places, np.asarray(values).astype(array.dtype))

    wider = replace(
        rollout,
        response_ids=put(rollout.response_ids, draw.integers(0, 48, len(places))),
        sampled_logprobs=put(rollout.sampled_logprobs, -9 * draw.random(len(places))),
        versions=put(rollout.versions, np.zeros(len(places))),
        response_mask=put(rollout.response_mask, np.zeros(len(places), bool)),
    )
    assert scored.ref_logprobs is not None
    assert scored.step_ends is not None
    return replace(
        scored,
        rollout=wider,
        ref_logprobs=put(scored.ref_logprobs, -9 * draw.random(len(places))),
        step_ends=(scored.step_ends + np.searchsorted(places, scored.step_ends, "right")).astype(
            np.int32
        ),
    )


def _trained(algorithm: Any, groups: list[ExperienceGroup]) -> tuple[Any, torch.Tensor]:
    """(streams of the trained tokens, their weighted losses) as the learner computes them."""
    groups = list(algorithm.trained_groups(groups))
    scored = [s for g in groups for s in g.scored]
    masks = [s.rollout.response_mask for s in scored]
    if algorithm.needs_critic:
        values = [[_scattered(s.rollout.response_mask) for s in g.scored] for g in groups]
        advantages, returns = algorithm.estimate(groups, values)
        returns = [r[m] for r, m in zip((r for g in returns for r in g), masks, strict=True)]
    else:
        advantages, returns = algorithm.advantages(groups), []
    batch = training_batch(groups, advantages, 0, drop_zero_advantages=False)
    streams = {
        name: [s.streams[name][m] for s, m in zip(batch.sequences, masks, strict=True) if s]
        for name in batch.streams
    }
    weights = token_weights(batch.num_tokens, algorithm.aggregation, 24)
    flat = {name: torch.from_numpy(np.concatenate(v)) for name, v in streams.items()}
    learner = flat["sampled_logprobs"] + torch.linspace(-0.4, 0.4, len(flat["advantages"]))
    inputs = loss_inputs(
        learner,
        flat["sampled_logprobs"],
        flat["advantages"],
        proximal=learner - 0.1,
        ref=flat["ref_logprobs"],
        lengths=[n for n in batch.num_tokens if n],
        unit_size=2 if algorithm.keeps_groups else 1,
    )
    losses, _ = algorithm.loss(replace(inputs, teacher_logprobs=flat["sampled_logprobs"] / 2))
    repeated = torch.tensor(weights).repeat_interleave(torch.tensor(batch.num_tokens))
    return (streams, returns), losses * repeated


def _scattered(mask: np.ndarray) -> np.ndarray:
    """Values that depend on the place among the trained tokens only, and nonsense elsewhere."""
    values = np.full(len(mask), 1e6)
    values[mask] = np.sin(np.arange(mask.sum()))
    return values


@pytest.mark.parametrize("variant", VARIANTS)
def test_s24_observed_tokens_anywhere_change_no_trained_token(variant: str) -> None:
    algorithm, draw = _algorithm(variant), np.random.default_rng(7)
    groups = _with_steps(random_groups(3, with_reference=True), seed=5)
    wider = [replace(g, scored=tuple(_observed(s, draw) for s in g.scored)) for g in groups]
    plain, losses = _trained(algorithm, groups)
    found, wider_losses = _trained(algorithm, wider)
    for name, arrays in plain[0].items():
        for one, other in zip(arrays, found[0][name], strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6, err_msg=name)
    for one, other in zip(plain[1], found[1], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert any(a.any() for a in plain[0]["advantages"])
    torch.testing.assert_close(wider_losses, losses, rtol=1e-5, atol=1e-7)


CAP = 8
TURNS = ((6, 4), (5, 3), (7, 0))
"""Actions and observations of each turn: 18 sampled tokens of 25, 8 of them allowed a turn."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=64), folder)
    return str(folder)


def _config(model_dir: str, **changes: Any) -> RunConfig:
    sections = {
        "generation": {"max_response_tokens": CAP, "dtype": "float32"},
        "algorithm": {"type": "grpo", "group_size": 2, "correction": {"type": "none"}},
        "scoring": {
            "rewards": [{"type": "exact_match", "require_stop": False}],
            "reference": True,
            "dtype": "float32",
        },
        "learner": {"tokens_per_row": 48, "dtype": "float32"},
    }
    merged = {n: {**sections.get(n, {}), **changes.get(n, {})} for n in {*sections, *changes}}
    return learner_config(model_dir, **merged)


def _dialogues(last_is_trained: bool = True) -> RolloutGroup:
    """Two rollouts of three turns each; one of them gives the answer."""
    prompt = replace(make_prompt(0, [2, 3, 4]), columns={"answer": ""})
    mask = np.concatenate([np.repeat([True, False], turn) for turn in TURNS])
    mask[-1] = last_is_trained
    draw, rollouts = np.random.default_rng(0), []
    for index in range(2):
        ids = draw.integers(2, tiny_llama.VOCABULARY, len(mask)).tolist()
        scored = make_scored(f"0/{index}", prompt, ids, [-2.0] * len(mask), 0.0, mask=mask.tolist())
        rollouts.append(scored.rollout)
    text = " ".join(f"w{i}" for i in rollouts[0].response_ids)
    prompt = replace(prompt, columns={"answer": text})
    ticket = Ticket(number=0, version=0)
    return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))


def _scorer(config: RunConfig, model_dir: str) -> ScoringWorker:
    scorer = ScoringWorker(config, model_dir, "scoring-0")
    scorer.start()
    return scorer


def _plain_norm(group: ExperienceGroup) -> float:
    """The gradient norm of sum over trained tokens of -A log p / N, by the model's own logits."""
    lm = tiny_llama.build(seed=1, max_position=64)
    rewards = np.array([s.reward for s in group.scored])
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    total, count = torch.zeros(()), 0
    for scored, advantage in zip(group.scored, advantages.tolist(), strict=True):
        rollout = scored.rollout
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
        logits = lm(input_ids=ids[None], use_cache=False).logits[
            0, len(rollout.prompt_ids) - 1 : -1
        ]
        own = logits.log_softmax(-1).gather(-1, ids[len(rollout.prompt_ids) :, None])[:, 0]
        mask = torch.from_numpy(rollout.response_mask)
        total, count = total - advantage * own[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    norms = torch.stack([p.grad.norm() for p in lm.parameters() if p.grad is not None])
    return norms.norm().item()


def test_s40_three_turns_longer_than_the_cap_of_one_are_trained_to_the_last_action_token(
    model_dir: str,
) -> None:
    config = _config(model_dir)
    scorer = _scorer(config, model_dir)
    given = _dialogues()
    assert all(len(r.response_ids) > CAP for r in given.rollouts)
    experience = scorer.score(given)[1]
    assert [s.reward for s in experience.scored] == [1.0, 0.0]
    for scored, rollout in zip(experience.scored, given.rollouts, strict=True):
        assert scored.rollout == rollout
        assert scored.ref_logprobs is not None
        assert len(scored.ref_logprobs) == len(rollout.response_ids)
    learner = LearnerRank(config, model_dir, 0, 1, None)
    learner.setup()
    metrics = learner.train_step([experience]).metrics
    learner.close()
    assert metrics["learner/tokens"] == 2 * sum(actions for actions, _ in TURNS)
    assert metrics["learner/grad_norm"] == pytest.approx(_plain_norm(experience), rel=1e-4)
    shorter = scorer.score(_dialogues(last_is_trained=False))[1]
    assert abs(_plain_norm(shorter) / _plain_norm(experience) - 1) > 1e-2


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        (
            {"learner": {"tokens_per_row": 26}},
            "row",
            "27 positions, over learner.tokens_per_row = 26",
        ),
        (
            {"algorithm": {"type": "dr_grpo"}},
            "fixed_length",
            "18 trained tokens, over generation.max_response_tokens = 8",
        ),
    ],
)
def test_s40_a_row_that_cannot_be_trained_whole_fails_its_group_and_is_counted(
    model_dir: str, changes: dict[str, Any], reason: str, words: str
) -> None:
    config = _config(model_dir, scoring={"reference": False}, **changes)
    scorer = _scorer(config, model_dir)
    with pytest.raises(ScoringError, match=rf"group g00000000: \[{reason}\] rollout 0/0 .*{words}"):
        scorer.score(_dialogues())
    assert scorer.stats() == {f"errors/length/{reason}": 1, "num_in_flight": 0}
    held_out = replace(_dialogues(), ticket=Ticket(number=0, version=0, purpose="evaluate"))
    assert len(scorer.score(held_out)[1].scored) == 2
