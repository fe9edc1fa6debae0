"""stub"""

from __future__ import annotations

from typing import Literal

from rlhf_cluster.rewards.base import RewardSection


class RewardModelConfig(RewardSection):
    type: Literal["reward_model"] = "reward_model"


class RewardModel:
    pass
