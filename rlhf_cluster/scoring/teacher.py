"""The teacher: a frozen policy of its own folder that rates every sampled token.

Promises: those of `FrozenPolicy`; its tokenizer has the policy's tokens, or it is refused before a
group is scored. It never moves. Its vocabulary may be padded further than the policy's: a sampled
token's probability is then lower by what it gives to the padding, which is nothing in a trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.config.scoring import Scoring
from rlhf_cluster.config.sections import HeadDtype
from rlhf_cluster.data.tokenizer import refuse_other_tokens
from rlhf_cluster.records import Rollout
from rlhf_cluster.scoring.frozen import FrozenPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Teacher:
    """Several threads may call it; they take turns, `scoring.batch_groups` of them at once."""

    def __init__(
        self,
        folder: str,
        scoring: Scoring,
        tokenizer: PreTrainedTokenizerBase,
        device: str,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Loads the model of `folder`. Raises `ConfigError`."""
        refuse_other_tokens("scoring.teacher", folder, tokenizer)
        self._model = FrozenPolicy(
            "teacher",
            folder,
            scoring.dtype,
            device,
            scoring.tokens_per_batch,
            scoring.request_timeout_s,
            scoring.quantization,
            head_dtype,
        )
        self._together = self._model.together(scoring.batch_groups)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """[T] float32 for each rollout, in nats, at its temperature.

        Raises:
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline.
        """
        self._model.check(rollouts)
        return self._together(rollouts)
