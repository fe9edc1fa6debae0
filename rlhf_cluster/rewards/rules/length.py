"""A penalty of long responses, linear between two numbers of tokens.

0.0 up to `free_tokens`, -1.0 from `full_tokens` on, and on a line between them: with `full_tokens`
at the generation's limit, the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476,
equation 13). Tokens are those that the policy sampled, not what an environment put between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection


class LengthConfig(RewardSection):
    """Long responses are worth less."""

    type: Literal["length"] = "length"
    free_tokens: NonNegativeInt
    """Longest response in tokens that has no penalty."""
    full_tokens: PositiveInt
    """Shortest response in tokens that has the greatest penalty."""

    @model_validator(mode="after")
    def _check(self) -> LengthConfig:
        if self.free_tokens >= self.full_tokens:
            raise ValueError(
                f"free_tokens = {self.free_tokens} is not below full_tokens = {self.full_tokens}. "
                "Lower the one or raise the other"
            )
        return self


class Length:
    def __init__(self, config: LengthConfig, context: RewardContext) -> None:
        self._config = config

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Scores in [-1, 0]."""
        free, full = self._config.free_tokens, self._config.full_tokens
        over = [(int(r.response_mask.sum()) - free) / (full - free) for r in rollouts]
        return [-min(max(share, 0.0), 1.0) for share in over]

    def close(self) -> None:
        """Nothing to release."""
