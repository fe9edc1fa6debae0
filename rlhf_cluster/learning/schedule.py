"""The learning rate as a closed-form function of the optimizer step: no state, nothing to resume.

Steps are optimizer steps, counted from 0, whatever the number of rollouts or micro-batches. The
first step's rate is not 0, and decay reaches `minimum` only at step `total_steps`, one past the
last, so every step trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then constant, or linear or cosine decay towards `minimum`, or
    constant with a linear decay over the last `decay_steps` (`wsd`, warm-up, stable, decay).

    Source of `wsd`: MiniCPM, arXiv 2404.06395; its decay as a line, arXiv 2405.18392.
    """

    peak: float
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    minimum: float = 0.0
    decay_steps: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`.

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
