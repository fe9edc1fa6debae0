"""Policy losses: the loss of each token, given log-ratios, and the weight of each token.

Losses are pure functions, neither weighted nor summed, of r = exp(log ratio) and the advantage A:

    clipped     -min(r A, clip(r, 1 - low, 1 + high) A)
    gated       -f(r) A,  f(r) = (4 / tau) sigmoid(tau (r - 1)),  tau by the sign of A
    cispo       -sg(clip(r, 1 - low, 1 + high)) A log pi
    plain       -r A

Token weights turn them into the loss of an optimizer step, the plain sum of weight times token
loss:

    token_mean      w = 1 / (trained tokens of all R rollouts)           every token has equal weight
    sequence_mean   w = 1 / (R * trained tokens of its rollout)          every rollout has equal weight
    fixed_length    w = 1 / (R * max_response_tokens)                    no weight depends on a length

Promises:
- shapes are checked, so nothing broadcasts;
- no gradient flows into advantages; where a bound applies, the gradient is exactly zero;
- weights are computed from the whole optimizer step before tokens are packed into micro-batches,
  so micro-batch size, ranks, order and packing cannot change the loss;
- rollouts without a trained token are in no denominator.

Sources: token_mean, Yu et al. 2025, arXiv 2503.14476 (DAPO); sequence_mean, Shao et al. 2024,
arXiv 2402.03300 (GRPO); fixed_length, Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO).

Shapes: N trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the negated clipped objective of each token (Schulman et al. 2017, arXiv 1707.06347).

    Unequal bounds: DAPO (Yu et al. 2025, arXiv 2503.14476). With `dual_clip` c, where
    A < 0 the loss is at most c |A| (Ye et al. 2020, arXiv 1912.09729).

    Args:
        log_ratio: [N], carries the gradient.
        advantages: [N].

    Returns:
        (loss [N], clipped [N] bool: a bound applies, so the gradient is zero).

    Raises:
        RecordError: shapes that differ.
    """
    _check(log_ratio, advantages)
    advantages = advantages.detach()
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss, clipped = -free.minimum(bounded), bounded < free
    if dual_clip is not None:
        largest = dual_clip * advantages.abs()
        beyond = loss > largest  # only where A < 0: elsewhere the loss is not positive
        loss, clipped = loss.where(~beyond, largest), clipped | beyond
    return loss, clipped.detach()


def gated_policy_loss(
    log_ratio: Tensor, advantages: Tensor, positive_temperature: float, negative_temperature: float
) -> Tensor:
    """Return the loss of each token with a soft gate instead of a clip (SAPO).

    Gao et al. 2025, arXiv 2511.20347.

    f(1) = 2 / tau and f'(1) = 1: near r = 1 the gradient is that of r A, and it fades as r leaves.

    Args:
        log_ratio: [N], carries the gradient.
        advantages: [N]; `positive_temperature` applies where positive, else the negative one.

    Raises:
        RecordError: shapes that differ.
    """
    _check(log_ratio, advantages)
    advantages = advantages.detach()
    tau = (advantages > 0).to(log_ratio.dtype)
    tau = tau * positive_temperature + (1 - tau) * negative_temperature
    gate = (tau * (log_ratio.exp() - 1)).sigmoid() * 4 / tau
    return -gate * advantages


def cispo_policy_loss(
    log_ratio: Tensor,
    learner_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return the REINFORCE loss of each token with a clipped ratio as its weight (CISPO).

    Every token keeps its gradient: the clip bounds the weight only. MiniMax 2025, arXiv 2506.13585.

    Args:
        log_ratio: [N], its gradient is stopped.
        learner_logprobs: [N], carries the gradient.
        advantages: [N].

    Returns:
        (loss [N], clipped [N] bool: the weight is a bound).

    Raises:
        RecordError: shapes that differ.
    """
    _check(log_ratio, advantages)
    _check(learner_logprobs, advantages)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages.detach() * learner_logprobs, weight != ratio


def plain_policy_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Return -r A of each token; its gradient at r = 1 is -A grad log pi (Williams 1992).

    Args:
        log_ratio: [N], carries the gradient.
        advantages: [N].

    Raises:
        RecordError: shapes that differ.
    """
    _check(log_ratio, advantages)
    return -log_ratio.exp() * advantages.detach()


def _check(log_ratio: Tensor, advantages: Tensor) -> None:
    if log_ratio.shape != advantages.shape or log_ratio.ndim != 1:
        raise RecordError(
            f"log_ratio {list(log_ratio.shape)} and advantages {list(advantages.shape)} must both "
            "be [N]"
        )


Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def token_weights(
    num_tokens: Sequence[int], aggregation: Aggregation, max_tokens: int
) -> list[float]:
    """Return the weight of the tokens of each rollout.

    Args:
        num_tokens: trained tokens of each rollout of the optimizer step, 0 allowed.
        aggregation: see the module.
        max_tokens: `generation.max_response_tokens`, the divisor of `fixed_length`.

    Returns:
        One weight per rollout, which all its tokens share; 0 for one without trained tokens.

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
            f"a rollout has {max(num_tokens)} trained tokens, more than the fixed length {max_tokens}"
        )
    return [1 / (num_rollouts * max_tokens) if n else 0.0 for n in num_tokens]
