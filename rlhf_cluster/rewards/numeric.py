"""stub"""

from __future__ import annotations

from typing import Literal

from rlhf_cluster.rewards.base import RewardSection


class NumericConfig(RewardSection):
    type: Literal["numeric"] = "numeric"


class Numeric:
    pass
