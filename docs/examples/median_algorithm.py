"""An algorithm in a package of yours: GRPO's loss, with advantages relative to the group's median."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig

if TYPE_CHECKING:
    from torch import Tensor


class MedianSection(ClippedConfig):
    """Keys of the algorithm in a run file, in addition to those of every clipped algorithm."""

    type: str
    group_size: int = 8


class Median(PolicyGradient[MedianSection]):
    section_class = MedianSection

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        """Return one advantage per response. `group_ids` says which share a prompt."""
        advantages = np.zeros_like(rewards)
        for group in set(group_ids):
            members = np.array([other == group for other in group_ids])
            advantages[members] = rewards[members] - np.median(rewards[members])
        return advantages

    def surrogate(self, log_ratios: "Tensor", inputs: LossInputs) -> "tuple[Tensor, Sums]":
        """Return the loss of each token [N] and metric sums, named as in the table of metrics."""
        return clipped_surrogate(log_ratios, inputs, self.config)
