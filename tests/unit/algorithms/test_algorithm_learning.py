"""Every algorithm through the whole learner: it learns, reports what is in the table, and does not
depend on how rollouts are laid into micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.records import ExperienceGroup, FinishReason
from tests.support.builders.reference_objectives import POLICY_GRADIENTS
from tests.support.builders.tiny_learner import (
    random_groups,
    response_logprobs,
)
from tests.support.fakes.checked_metrics import CheckedMetrics

# PPO trains a critic and ReMax needs greedy answers: they have tests of their own
PLAIN = sorted(set(POLICY_GRADIENTS) - {"ppo", "remax"})


def sampled_by(learner: LearnerRank, groups: Sequence[ExperienceGroup]) -> list[ExperienceGroup]:
    """The groups as the learner itself would have sampled them, nearly: engines differ a little."""
    found = iter(response_logprobs(learner, groups))
    noise = np.random.default_rng(0)

    def of(scored: Any) -> Any:
        own = next(found)
        near = own + 1e-3 * noise.standard_normal(len(own))
        rollout = replace(scored.rollout, sampled_logprobs=near.astype(np.float32))
        return replace(
            scored,
            rollout=rollout,
            ref_logprobs=near.astype(np.float32),
            reward_parts={"only": scored.reward},
        )

    return [replace(g, scored=tuple(of(s) for s in g.scored)) for g in groups]


def gap(learner: LearnerRank, groups: Sequence[ExperienceGroup]) -> float:
    """How much more probable the tokens of good answers are than those of bad ones, in nats."""
    scored = [s for g in groups for s in g.scored]
    means = [v.mean() for v in response_logprobs(learner, groups)]
    good = [m for m, s in zip(means, scored, strict=True) if s.reward == 1]
    bad = [m for m, s in zip(means, scored, strict=True) if s.reward == 0]
    return float(np.mean(good) - np.mean(bad))


@pytest.mark.parametrize("name", PLAIN)
def test_s9_every_algorithm_raises_good_answers_over_bad_ones(
    start_learner: Any, name: str
) -> None:
    learner = start_learner(
        algorithm={"type": name, "kl_coef": 0.01},
        scoring={"reference": True, "rewards": [{"type": "exact_match", "name": "only"}]},
        learner={"learning_rate": 3e-3, "epochs": 2, "minibatches": 2},
    )
    groups = sampled_by(learner, random_groups(0, rewards=[1.0, 0.0] * 8))
    before = gap(learner, groups)
    metrics = learner.train_step(groups).metrics
    assert gap(learner, groups) > before
    CheckedMetrics().record(metrics)
    assert metrics["importance/log_ratio_p95"] > 0
    assert metrics["importance/effective_sample_size_by_staleness/0"] > 0
    assert metrics["learner/kl_coef"] == 0.01


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "gspo"},
        {"type": "grpo", "correction": {"type": "sequence_tis", "cap": 50.0}},
        {"type": "grpo", "correction": {"type": "sequence_mis", "low": 0.0, "high": 9.0}},
        {"type": "dr_grpo", "correction": {"type": "geometric_mask", "low": 0.5, "high": 2.0}},
    ],
    ids=["gspo", "sequence_tis", "sequence_mis", "geometric_mask"],
)
def test_s1_rules_over_whole_rollouts_do_not_depend_on_the_layout(
    start_learner: Any, algorithm: dict[str, Any]
) -> None:
    groups = None
    seen: list[dict[str, float]] = []
    for layout in ({"batching": "padded"}, {"tokens_per_micro_batch": 40}, {}):  # of about 250
        learner = start_learner(algorithm=algorithm, learner=layout)
        groups = groups or sampled_by(learner, random_groups(3))
        metrics = learner.train_step(groups).metrics
        seen.append({n: v for n, v in metrics.items() if not n.endswith("_s")})
    for other in seen[1:]:
        for name in ("learner/grad_norm", "learner/loss", "importance/capped_fraction"):
            # Advantages of one group cancel in the loss: what is left is as exact as its terms.
            assert other[name] == pytest.approx(seen[0][name], rel=1e-4, abs=1e-6), name


def test_the_kl_coefficient_of_the_next_step_follows_the_kl_of_this_one(start_learner: Any) -> None:
    control = {"type": "adaptive", "target": 0.5, "horizon": 16}
    learner = start_learner(
        algorithm={"kl_coef": 0.1, "kl_control": control}, scoring={"reference": True}
    )
    groups = random_groups(1, with_reference=True)
    first, second = (learner.train_step(groups).metrics for _ in range(2))
    assert first["learner/kl_coef"] == 0.1
    error = np.clip(first["learner/kl_ref_response"] / 0.5 - 1, -0.2, 0.2)
    assert second["learner/kl_coef"] == pytest.approx(0.1 * (1 + error))


def test_filtered_answers_are_in_no_denominator(start_learner: Any) -> None:
    learner = start_learner(algorithm={"type": "dapo", "overlong_filter": True})
    groups = random_groups(2)
    first = groups[0].scored[0]
    cut = replace(first, rollout=replace(first.rollout, finish_reason=FinishReason.LENGTH))
    groups[0] = replace(groups[0], scored=(cut, *groups[0].scored[1:]))
    tokens = sum(int(s.rollout.response_mask.sum()) for g in groups for s in g.scored)
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/tokens"] == tokens - first.rollout.response_mask.sum()


def test_an_entropy_bonus_raises_the_entropy(start_learner: Any) -> None:
    groups = random_groups(0, rewards=[0.5] * 16)  # no advantage: the bonus acts alone
    learner = start_learner(
        algorithm={"entropy_coef": 1.0}, learner={"learning_rate": 1e-3, "epochs": 2}
    )
    first, second = (learner.train_step(groups).metrics["learner/entropy"] for _ in range(2))
    assert second > first
    assert torch.isfinite(torch.tensor(second))
