"""stub"""

from __future__ import annotations

from typing import Literal

from rlhf_cluster.rewards.base import RewardSection


class PythonFunctionConfig(RewardSection):
    type: Literal["python"] = "python"


class PythonFunction:
    pass
