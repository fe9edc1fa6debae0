"""stub"""

from __future__ import annotations

from typing import Literal

from rlhf_cluster.rewards.base import RewardSection


class ExactMatchConfig(RewardSection):
    type: Literal["exact_match"] = "exact_match"


class ExactMatch:
    pass
