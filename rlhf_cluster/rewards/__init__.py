"""Rewards: one file each, one entry in `REWARDS`. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from rlhf_cluster.rewards.base import Reward, RewardContext, StepReward
from rlhf_cluster.rewards.equations import Equations, EquationsConfig
from rlhf_cluster.rewards.exact_match import ExactMatch, ExactMatchConfig
from rlhf_cluster.rewards.numeric import Numeric, NumericConfig
from rlhf_cluster.rewards.python_function import PythonFunction, PythonFunctionConfig
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig

RewardConfig = Annotated[
    EquationsConfig | ExactMatchConfig | NumericConfig | PythonFunctionConfig | RewardModelConfig,
    Field(discriminator="type"),
]

REWARDS: Mapping[str, Any] = {
    "equations": Equations,
    "exact_match": ExactMatch,
    "numeric": Numeric,
    "python": PythonFunction,
    "reward_model": RewardModel,
}
"""Classes by the `type` of their section; each is built as `cls(section, context)`."""

__all__ = ["REWARDS", "RewardConfig", "build_rewards"]


def build_rewards(
    configs: Sequence[RewardConfig],
    tokenizer_dir: str,
    device: str,
    wait_timeout_s: float = 300.0,
) -> dict[str, tuple[Reward | StepReward, float]]:
    """Each reward, ready to score, and its weight, by name and in the order of `configs`.

    Args:
        tokenizer_dir: folder of the policy's tokenizer.
        device: torch device of reward models.
        wait_timeout_s: how long a group may wait for a reward that other groups hold.

    Raises:
        ConfigError, DataError: one cannot serve; those already built are closed.
    """
    context = RewardContext(
        tokenizer_dir=tokenizer_dir, device=device, wait_timeout_s=wait_timeout_s
    )
    built: dict[str, tuple[Reward | StepReward, float]] = {}
    try:
        for config in configs:
            built[config.name or config.type] = (
                REWARDS[config.type](config, context),
                config.weight,
            )
    except BaseException:
        for reward, _ in built.values():
            reward.close()
        raise
    return built
