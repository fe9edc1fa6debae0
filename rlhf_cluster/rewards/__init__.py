"""Rewards: one file each, one entry in `REWARDS`. Importing this loads no torch."""

from typing import Annotated

from pydantic import Field

from rlhf_cluster.rewards.exact_match import ExactMatch, ExactMatchConfig
from rlhf_cluster.rewards.numeric import Numeric, NumericConfig
from rlhf_cluster.rewards.python_function import PythonFunction, PythonFunctionConfig
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig

RewardConfig = Annotated[
    ExactMatchConfig | NumericConfig | PythonFunctionConfig | RewardModelConfig,
    Field(discriminator="type"),
]

REWARDS = {
    "exact_match": ExactMatch,
    "numeric": Numeric,
    "python": PythonFunction,
    "reward_model": RewardModel,
}

__all__ = ["REWARDS", "RewardConfig"]
