"""Builders of prompts, rollouts and groups for tests of rewards and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.records import FinishReason, Prompt, Rollout, RolloutGroup, Ticket
from rlhf_cluster.rewards.reward_failure import RewardFailure


def make_prompt(
    source: Any = "2 + 2 =", columns: Mapping[str, Any] | None = None, ids: Sequence[int] = (2, 3)
) -> Prompt:
    return Prompt(
        prompt_id="row-0",
        token_ids=np.array(ids, dtype=np.int32),
        source=source,
        columns=dict(columns or {}),
    )


def make_rollouts(
    prompt: Prompt,
    responses: Sequence[Sequence[int]],
    finish_reason: FinishReason = FinishReason.STOP,
    temperature: float = 1.0,
) -> tuple[Rollout, ...]:
    return tuple(
        Rollout(
            rollout_id=f"g0/{index}",
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            response_ids=np.array(ids, dtype=np.int32),
            sampled_logprobs=np.zeros(len(ids), dtype=np.float32),
            versions=np.zeros(len(ids), dtype=np.int32),
            response_mask=np.ones(len(ids), dtype=np.bool_),
            finish_reason=finish_reason,
            temperature=temperature,
            worker="generation-0",
            started_s=0.0,
            finished_s=1.0,
        )
        for index, ids in enumerate(responses)
    )


def make_group(
    prompt: Prompt, rollouts: Sequence[Rollout], number: int = 7, purpose: Any = "train"
) -> RolloutGroup:
    ticket = Ticket(number=number, version=0, purpose=purpose)
    return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))


def score(reward, *completions, columns=None, source="2 + 2 ="):
    prompt = make_prompt(source, columns or {"answer": "4"})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


def failure_of(reward, *completions):
    with pytest.raises(RewardFailure) as failure:
        score(reward, *completions)
    return failure.value
