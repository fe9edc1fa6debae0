"""Several optimizer steps a batch, and what they share: rates, weights of tokens, skipped steps."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.builders.tiny_learner import random_groups


def test_several_optimizer_steps_a_batch_clip_against_the_policy_at_its_start(
    start_learner: Any,
) -> None:
    learner = start_learner(
        learner={"learning_rate": 3e-2, "epochs": 3, "minibatches": 2, "max_grad_norm": 10.0}
    )
    groups = random_groups(4)
    metrics = learner.train_step(groups).metrics
    assert learner.version == 1
    assert metrics["learner/clip_fraction"] > 0, "later optimizer steps leave the trust region"
    single = start_learner(learner={"learning_rate": 3e-2, "minibatches": 1})
    assert single.train_step(groups).metrics["learner/clip_fraction"] == 0


def test_the_losses_of_a_replayed_group_are_weighed(start_learner: Any) -> None:
    """All the gradient is of group 0: it and the loss are linear in its weight."""
    groups = random_groups(2, rewards=[1.0, 0.0, 1.0, 0.0, *[0.5] * 12])
    whole = start_learner().train_step(groups).metrics
    groups[0] = replace(groups[0], weight=0.25)
    part = start_learner().train_step(groups).metrics
    assert whole["learner/grad_norm"] > 0
    for name in ("learner/grad_norm", "learner/loss"):
        assert part[name] == pytest.approx(0.25 * whole[name], rel=1e-4), name


def test_s37_rates_count_optimizer_steps_and_the_last_still_trains(start_learner: Any) -> None:
    learner = start_learner(
        learner={"schedule": "linear", "epochs": 2, "minibatches": 2},
        run={"steps": 8, "groups_per_step": 4},
    )
    rates = []
    for version in range(8):
        rates.append(
            learner.train_step(random_groups(version, version=version)).metrics[
                "learner/learning_rate"
            ]
        )
    assert rates == pytest.approx([1e-4 * (1 - (4 * v + 3) / 32) for v in range(8)])
    assert rates[-1] > 0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_s1_the_gradient_does_not_depend_on_micro_batches_or_batching(
    start_learner: Any, aggregation: str
) -> None:
    groups = random_groups(3)
    norms, losses = [], []
    for settings in (
        {"tokens_per_micro_batch": 16384},
        {"tokens_per_micro_batch": 32},
        {"tokens_per_micro_batch": 64, "batching": "padded"},
    ):
        learner = start_learner(
            learner=settings,
            algorithm={"type": "grpo", "group_size": 4, "aggregation": aggregation},
        )
        metrics = learner.train_step(groups).metrics
        norms.append(metrics["learner/grad_norm"])
        losses.append(metrics["learner/loss"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_skipped_step_leaves_the_ids_of_its_rollouts(start_learner: Any, tmp_path: Path) -> None:
    learner = start_learner(run={"root": str(tmp_path)})
    groups = random_groups(0)
    with torch.no_grad():
        norm = learner.policy.lm.base_model.norm.weight
        norm.to_local().fill_(math.nan)  # type: ignore[union-attr,operator]
    learner.train_step(groups)
    (record,) = (tmp_path / "tiny" / "skipped").glob("*.json")
    found = json.loads(record.read_text())
    assert found["version"] == 0
    assert found["rollout_ids"] == [s.rollout.rollout_id for g in groups for s in g.scored]
