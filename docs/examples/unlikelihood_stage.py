"""An offline stage in a package of yours: make unwanted answers less likely, -log(1 - p) per token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.data.units import Unit
from rlhf_cluster.offline.stage import Passes
from rlhf_cluster.offline.train_sft import DialogueStage
from rlhf_cluster.sections.offline_stage import StageSectionBase

if TYPE_CHECKING:  # importing the file loads no torch
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import TokenLoss, TrainedTokens


class UnlikelihoodSection(StageSectionBase):
    """Keys of `[stage]`."""

    type: str
    min_distance: float = 1e-6
    """Smallest 1 - p, so that the loss of a certain token is finite."""


class Unlikelihood(DialogueStage[UnlikelihoodSection]):
    """Reads rows as the stage `sft` does."""

    section_class = UnlikelihoodSection
    headline = "sft/loss"  # a metric of the table, for status and curve

    def loss(self, units: Sequence[Unit], passes: Passes) -> "TokenLoss":
        """Return a function that gives each micro-batch's share of the loss of all units."""
        num_tokens = sum(unit.num_trained for unit in units)

        def share(tokens: "TrainedTokens") -> "tuple[Tensor, Sums]":
            distance = (1 - tokens.logprobs.exp()).clamp(min=self.section.min_distance)
            total = -distance.log().sum()
            count = total.new_tensor(tokens.logprobs.numel())
            return total / num_tokens, {"sft/loss": (total, count)}

        return share
