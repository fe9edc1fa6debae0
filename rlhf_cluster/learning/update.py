"""The optimizer step: clip, refuse what is not finite, set the rate, step.

Promises: a gradient norm that is not finite changes no weight and no moment, is counted, and after
`MAX_SKIPPED_IN_A_ROW` of them in a row raises. Every rank decides the same, because the norm is
that of all ranks.
"""

from __future__ import annotations

import math

import torch

from rlhf_cluster.errors import DivergenceError
from rlhf_cluster.learning.fsdp import clip_grad_norm
from rlhf_cluster.learning.policy import PolicyLM
from rlhf_cluster.learning.schedule import Schedule

MAX_SKIPPED_IN_A_ROW = 5


class Updater:
    """Applies accumulated gradients to a policy."""

    def __init__(
        self,
        policy: PolicyLM,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        max_grad_norm: float,
    ) -> None:
        self._policy = policy
        self.optimizer = optimizer
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._skipped_in_a_row = 0
        self.num_skipped = 0

    def apply(self, step: int, area: str = "learner") -> dict[str, float]:
        """Clip, step with the learning rate of `step`, clear the gradients.

        Returns:
            `{area}/grad_norm` before clipping (left out when not finite), `{area}/learning_rate`,
            and `{area}/skipped_steps`, all that were skipped so far.

        Raises:
            DivergenceError: the norm was not finite for the fifth time in a row.
        """
        norm = clip_grad_norm(self._policy.parameters(), self._max_grad_norm)
        rate = self._schedule.lr_at(step)
        metrics = {f"{area}/learning_rate": rate}
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self._skipped_in_a_row = 0
            metrics[f"{area}/grad_norm"] = norm
        else:
            self._skipped_in_a_row += 1
            self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        metrics[f"{area}/skipped_steps"] = float(self.num_skipped)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergenceError(
                f"the gradient norm was {norm} in step {step}, not finite for "
                f"{self._skipped_in_a_row} steps in a row. Lower learner.learning_rate or "
                "learner.max_grad_norm, and look at the rewards and log-probabilities of the batch"
            )
        return metrics
