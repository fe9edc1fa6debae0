"""How token losses become one number: the weight of every token in the loss of an optimizer step.

    token_mean      w = 1 / (trained tokens of all R rollouts)           every token counts the same
    sequence_mean   w = 1 / (R * trained tokens of its rollout)          every rollout counts the same
    fixed_length    w = 1 / (R * max_response_tokens)                    no weight follows a length

Weights depend on the whole optimizer step and are computed before anything is laid into
micro-batches; the loss is the plain sum of weight times token loss, so micro-batch size, ranks,
order and packing cannot change it. Rollouts without a trained token count in no denominator.

token_mean: Yu et al. 2025, arXiv 2503.14476 (DAPO). sequence_mean: Shao et al. 2024, arXiv
2402.03300 (GRPO). fixed_length: Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf_cluster.errors import RecordError

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def token_weights(
    num_tokens: Sequence[int], aggregation: Aggregation, max_tokens: int
) -> list[float]:
    """The weight of each token of each rollout.

    Args:
        num_tokens: trained tokens of each rollout of the optimizer step, 0 allowed.
        aggregation: see the module.
        max_tokens: `generation.max_response_tokens`, the divisor of `fixed_length`.

    Returns:
        One weight a rollout (all its tokens share it); 0 for a rollout without trained tokens.

    Raises:
        RecordError: more trained tokens than `max_tokens` with fixed_length.
    """
    total, num_rollouts = sum(num_tokens), sum(n > 0 for n in num_tokens)
    if aggregation == "token_mean":
        return [1 / total if n else 0.0 for n in num_tokens]
    if aggregation == "sequence_mean":
        return [1 / (num_rollouts * n) if n else 0.0 for n in num_tokens]
    if max(num_tokens, default=0) > max_tokens:
        raise RecordError(
            f"a rollout has {max(num_tokens)} trained tokens, over the fixed length {max_tokens}"
        )
    return [1 / (num_rollouts * max_tokens) if n else 0.0 for n in num_tokens]
