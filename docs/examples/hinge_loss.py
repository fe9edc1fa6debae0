"""An offline objective in a package of yours: a hinge on the margin of the log-ratios (SLiC)."""

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from rlhf_cluster.algorithms.preference_loss_config import PairLoss
from rlhf_cluster.algorithms.preference_losses import Pairs

if TYPE_CHECKING:
    from torch import Tensor


class HingeLoss(PairLoss):
    """A loss is its own section: its keys are those of `loss` in a run file."""

    type: str
    beta: PositiveFloat = 0.1
    """Factor of the log-ratios, from which a margin of 1 is asked."""

    def objective(self, pairs: Pairs) -> "Tensor":
        """Return the loss of each pair [P]."""
        chosen, rejected = self.rewards(pairs)
        return (1 - (chosen - rejected)).clamp(min=0)

    def rewards(self, pairs: Pairs) -> "tuple[Tensor, Tensor]":
        """Return implicit rewards of the chosen and of the rejected responses, [P] each."""
        chosen, rejected = pairs.log_ratios
        return self.beta * chosen, self.beta * rejected
