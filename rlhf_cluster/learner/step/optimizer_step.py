"""Optimizer step: clip, refuse a norm that is not finite, set the learning rate, step.

Promises:
- a gradient norm that is not finite changes no weight and no moment, and is counted;
  `MAX_SKIPPED_IN_A_ROW` of them in a row raise. Every rank decides the same, because the norm is
  that of all ranks;
- the learning rate is a closed-form function of the optimizer step: no state, nothing to resume;
- optimizer steps are counted from 0, whatever the number of rollouts or micro-batches. The rate of
  the first step is not 0, and decay reaches `minimum` only at step `total_steps`, one past the
  last, so every step trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rlhf_cluster.errors import DivergenceError
from rlhf_cluster.learner.sharding.sharded_model import (
    ShardedModel,
    clip_gradients,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning-rate schedule: linear warm-up to `peak`, then a course of kind `kind`.

    The kinds are constant, linear or cosine decay towards `minimum`, and `wsd` (warm-up, stable,
    decay): constant with a linear decay over the last `decay_steps`.

    Source of `wsd`: MiniCPM, arXiv 2404.06395; its linear decay: arXiv 2405.18392.
    """

    peak: float
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    minimum: float = 0.0
    decay_steps: int = 0

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of optimizer step `step`.

        warm-up:  peak (step + 1) / warmup_steps                      for step < warmup_steps
        linear:   minimum + (peak - minimum) (1 - x)
        cosine:   minimum + (peak - minimum) (1 + cos(pi x)) / 2
        with x = (step - warmup_steps) / (total_steps - warmup_steps), at most 1
        wsd:      minimum + (peak - minimum) min(1, (total_steps - step) / decay_steps), which is
                  peak until decay_steps are left, and minimum from total_steps on

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step = {step} must not be negative")
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        if self.kind == "wsd":
            left = max(0, self.total_steps - step)
            share = min(1.0, left / self.decay_steps) if self.decay_steps else float(left > 0)
            return self.minimum + (self.peak - self.minimum) * share
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        share = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.minimum + (self.peak - self.minimum) * share


MAX_SKIPPED_IN_A_ROW = 5


class Updater:
    """Optimizer steps of a sharded model, which start with a reset optimizer."""

    def __init__(self, model: ShardedModel, schedule: Schedule, max_grad_norm: float) -> None:
        self.model = model
        self._schedule = schedule
        self._max_grad_norm = max_grad_norm
        self._skipped_in_a_row = 0
        self.num_skipped = 0
        model.reset_optimizer()

    @property
    def skips(self) -> tuple[int, int]:
        """State of the updater: (steps skipped so far, consecutive ones up to the last step)."""
        return self.num_skipped, self._skipped_in_a_row

    @skips.setter
    def skips(self, skips: tuple[int, int]) -> None:
        self.num_skipped, self._skipped_in_a_row = skips

    def apply(self, step: int, area: str = "learner") -> dict[str, float]:
        """Clip the gradients, step with the learning rate of `step`, and clear the gradients.

        Returns:
            `{area}/grad_norm` before clipping and `{area}/grad_norm_part/{group}` of each parameter
            group (omitted if not finite), `{area}/learning_rate`, and `{area}/skipped_steps`,
            the number of all steps skipped so far.

        Raises:
            DivergenceError: the norm was not finite in `MAX_SKIPPED_IN_A_ROW` consecutive steps.
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
