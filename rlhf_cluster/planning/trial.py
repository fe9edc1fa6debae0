"""A trial of the rewards on one prompt, before a run starts.

Rules and user functions are built (functions are imported in their child process), rules score one
made-up answer, so that a missing column shows now and not after minutes of generation. Reward
models are only looked for: loading them is the run's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import FinishReason, Prompt, Rollout
from rlhf_cluster.rewards import RewardConfig, build_rewards
from rlhf_cluster.rewards.base import Reward
from rlhf_cluster.rewards.failure import RewardFailure

RULES = ("exact_match", "numeric")


def try_rewards(configs: Sequence[RewardConfig], tokenizer_dir: str, prompt: Prompt) -> None:
    """Raises `ConfigError` naming the reward that cannot score answers to `prompt`."""
    for config in configs:
        name = config.name or config.type
        if config.model_paths:
            for path in map(Path, config.model_paths):
                if path.is_absolute() and not path.is_dir():
                    raise ConfigError(f"reward {name!r}: {path}: no such folder. Correct its path")
            continue
        reward, _ = build_rewards([config], tokenizer_dir, "cpu")[name]
        try:
            if config.type in RULES:
                cast(Reward, reward).score(prompt, [_made_up(prompt)], ["0"])
        except RewardFailure as failure:
            raise ConfigError(f"reward {name!r} cannot score this data set: {failure}") from failure
        finally:
            reward.close()


def _made_up(prompt: Prompt) -> Rollout:
    return Rollout(
        rollout_id="trial",
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=np.zeros(1, dtype=np.int32),
        sampled_logprobs=np.zeros(1, dtype=np.float32),
        versions=np.zeros(1, dtype=np.int32),
        response_mask=np.ones(1, dtype=bool),
        finish_reason=FinishReason.STOP,
        temperature=1.0,
        worker="trial",
        started_s=0.0,
        finished_s=0.0,
    )
