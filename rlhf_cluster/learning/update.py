"""The optimizer step: clip, refuse what is not finite, set the rate, step.

Promises: a gradient norm that is not finite changes no weight and no moment, is counted, and after
`MAX_SKIPPED_IN_A_ROW` of them in a row raises. Every rank decides the same, because the norm is
that of all ranks.
"""

from __future__ import annotations

import math

from rlhf_cluster.errors import DivergenceError
from rlhf_cluster.learning.backend import ShardedModel, clip_gradients
from rlhf_cluster.learning.schedule import Schedule

MAX_SKIPPED_IN_A_ROW = 5


class Updater:
    """Applies accumulated gradients to a sharded model, from a fresh optimizer on."""

    def __init__(self, model: ShardedModel, schedule: Schedule, max_grad_norm: float) -> None:
        self.model = model
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._skipped_in_a_row = 0
        self.num_skipped = 0
        model.reset_optimizer()

    @property
    def skips(self) -> tuple[int, int]:
        """(steps skipped so far, the last of them in a row): all of the updater's own state."""
        return self.num_skipped, self._skipped_in_a_row

    @skips.setter
    def skips(self, skips: tuple[int, int]) -> None:
        self.num_skipped, self._skipped_in_a_row = skips

    def apply(self, step: int, area: str = "learner") -> dict[str, float]:
        """Clip, step with the learning rate of `step`, clear the gradients.

        Returns:
            `{area}/grad_norm` before clipping and `{area}/grad_norm_part/{group}` of each parameter
            group (left out when not finite), `{area}/learning_rate`, and `{area}/skipped_steps`,
            all that were skipped so far.

        Raises:
            DivergenceError: the norm was not finite for the fifth time in a row.
        """
        norm, parts = clip_gradients(self.model.gradients(), self._max_grad_norm)
        rate = self._schedule.lr_at(step)
        metrics = {f"{area}/learning_rate": rate}
        if math.isfinite(norm):
            self.model.step(rate)
            self._skipped_in_a_row = 0
            metrics[f"{area}/grad_norm"] = norm
            metrics |= {f"{area}/grad_norm_part/{name}": part for name, part in parts.items()}
        else:
            self.model.clear_gradients()
            self._skipped_in_a_row += 1
            self.num_skipped += 1
        metrics[f"{area}/skipped_steps"] = float(self.num_skipped)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergenceError(
                f"the gradient norm was {norm} in step {step}, not finite for "
                f"{self._skipped_in_a_row} steps in a row. Lower {area}.learning_rate or "
                "learner.max_grad_norm, and look at the rewards and log-probabilities of the batch"
            )
        return metrics
